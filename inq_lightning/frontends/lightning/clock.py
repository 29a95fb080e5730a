"""What a Trainer's settings mean for a schedule: how long the run is, where it stands."""

from __future__ import annotations

import math

from pytorch_lightning import Trainer

from inq_lightning.core.schedule import Length, Unit


def position(trainer: Trainer, unit: Unit) -> int:
    """The epoch or optimizer step that the Trainer is at, counted from 0."""
    return trainer.current_epoch if unit == "epoch" else trainer.global_step


def length(trainer: Trainer) -> Length:
    """How long the Trainer runs. Known once training starts."""
    steps_per_epoch = math.inf
    if math.isfinite(trainer.num_training_batches) and trainer.lightning_module.automatic_optimization:
        steps_per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
    trial = bool(getattr(trainer, "fast_dev_run", False))
    return Length(limit(trainer.max_epochs), limit(trainer.max_steps), steps_per_epoch, trial)


def limit(value: int | None) -> float:
    """``max_epochs`` or ``max_steps`` as a number; inf for None and -1."""
    return math.inf if value is None or value < 0 else value
