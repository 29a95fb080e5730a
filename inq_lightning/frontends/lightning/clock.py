"""What a Trainer's settings mean for a schedule: how long the run is, where it stands."""

from __future__ import annotations

import math
from dataclasses import replace

from pytorch_lightning import Trainer

from inq_lightning.core.schedule import Schedule, Unit


def position(trainer: Trainer, unit: Unit) -> int:
    """The epoch or optimizer step that the Trainer is at, counted from 0."""
    return trainer.current_epoch if unit == "epoch" else trainer.global_step


def length(trainer: Trainer, unit: Unit) -> float:
    """How many epochs or optimizer steps the Trainer runs; inf where nothing says so. Known once training starts."""
    epochs = _limit(trainer.max_epochs)
    steps = _limit(trainer.max_steps)
    steps_per_epoch = math.inf  # unknown: data without a length, or a module that steps its optimizers by itself
    if math.isfinite(trainer.num_training_batches) and trainer.lightning_module.automatic_optimization:
        steps_per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
    if unit == "step":
        return min(steps, epochs * steps_per_epoch)
    return min(epochs, math.ceil(steps / steps_per_epoch)) if math.isfinite(steps_per_epoch * steps) else epochs


def fit_schedule(schedule: Schedule, trainer: Trainer, origin: int) -> Schedule:
    """Spread an open schedule over what is left of the run after ``origin``, and make sure that it reaches 1.

    A run limited by ``max_steps`` alone has no number of epochs; there an open schedule counts in steps.

    Raises:
        ValueError: The run is too short, or has no end that a schedule could be spread over.
    """
    if schedule.starts is None and schedule.unit == "epoch" and not math.isfinite(_limit(trainer.max_epochs)):
        schedule = replace(schedule, unit="step")
    total = length(trainer, schedule.unit) - origin
    if schedule.starts is None:
        if _is_trial(trainer):
            total = max(total, len(schedule.portions))
        if not math.isfinite(total):
            raise ValueError(
                "an open schedule is spread over the Trainer's run, but this one has no end: set max_epochs or "
                "max_steps, or say when each portion begins, such as schedule={0: 0.5, 4: 0.75, 8: 0.875, 12: 1.0}"
            )
        schedule = schedule.spread(int(total))
    check_length(schedule, trainer, origin)
    return schedule


def check_length(schedule: Schedule, trainer: Trainer, origin: int) -> None:
    """Refuse a Trainer that stops before the schedule, counted from ``origin``, reaches 1; a trial run may.

    Raises:
        ValueError: The run is too short.
    """
    if not _is_trial(trainer):
        schedule.check_fits(length(trainer, schedule.unit) - origin)


def _is_trial(trainer: Trainer) -> bool:
    return bool(getattr(trainer, "fast_dev_run", False))


def _limit(value: int | None) -> float:
    return math.inf if value is None or value < 0 else value
