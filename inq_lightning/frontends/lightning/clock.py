"""What a Trainer's settings mean for a schedule: how long the run is, where it stands, why it ended."""

from __future__ import annotations

import math
from collections.abc import Mapping

from pytorch_lightning import Trainer
from pytorch_lightning.utilities.types import LRSchedulerConfig

from inq_lightning.core.schedule import Length, Unit

STOPPED = "was told to stop (trainer.should_stop), by a Timer, max_time or other code"


def position(trainer: Trainer, unit: Unit) -> int:
    """The epoch or optimizer step that the Trainer is at, counted from 0."""
    return trainer.current_epoch if unit == "epoch" else trainer.global_step


def length(trainer: Trainer) -> Length:
    """How long the Trainer runs. Known once training starts."""
    steps_per_epoch, manual = math.inf, not trainer.lightning_module.automatic_optimization
    if math.isfinite(trainer.num_training_batches) and not manual:
        steps_per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
    trial = bool(getattr(trainer, "fast_dev_run", False))
    return Length(limit(trainer.max_epochs), limit(trainer.max_steps), steps_per_epoch, trial, manual)


def parts(trainer: Trainer) -> int:
    """Optimizer steps of the present epoch, batches under manual optimization; 1 where unknown."""
    batches = trainer.num_training_batches
    return math.ceil(batches / trainer.accumulate_grad_batches) if math.isfinite(batches) else 1


def scheduler_steps(trainer: Trainer, config: LRSchedulerConfig) -> Mapping[str, float]:
    """How often a scheduler is stepped over the whole run: after every so many epochs or steps; inf where unknown.

    Under manual optimization the module steps it, most often once an epoch or once a batch: both are returned.
    """
    run, batches = length(trainer), trainer.num_training_batches
    if not trainer.lightning_module.automatic_optimization:
        if math.isfinite(run.epochs):
            return {"epoch": run.epochs, "step": run.epochs * batches}
        return {"step": run.steps // len(trainer.optimizers)}
    if config.interval == "epoch":
        return {"epoch": run.total("epoch") // config.frequency}
    if not math.isfinite(batches):
        return {"step": run.total("step") // config.frequency}
    every = trainer.accumulate_grad_batches
    stepped = [i for i in range(1, int(batches) + 1) if i % every == 0 or i == batches]  # Lightning counts batches
    share = sum(i % config.frequency == 0 for i in stepped) / len(stepped)
    return {"step": round(run.total("step") * share) if math.isfinite(run.total("step")) else math.inf}


def limit(value: int | None) -> float:
    """``max_epochs`` or ``max_steps`` as a number; inf for None and -1."""
    return math.inf if value is None or value < 0 else value


def why_nothing_ran(trainer: Trainer) -> str:
    """What kept the Trainer from running a batch."""
    if trainer.should_stop:
        return f"{STOPPED} before the first batch"
    return (
        f"had no batch to run, with limit_train_batches={trainer.limit_train_batches}, "
        f"max_epochs={trainer.max_epochs}, max_steps={trainer.max_steps} and the data that it was given"
    )
