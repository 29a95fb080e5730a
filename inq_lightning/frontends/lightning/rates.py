"""Learning rates: the Trainer's schedulers and where it stands, told to the engine, which fits them to the phases."""

from __future__ import annotations

import math
from typing import Any

from pytorch_lightning import Trainer
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn

from inq_lightning.core.quantizer import Quantizer
from inq_lightning.frontends.lightning import clock


def schedulers(trainer: Trainer) -> list[Any]:
    """The schedulers of all optimizers."""
    return [config.scheduler for config in trainer.lr_scheduler_configs]


def fit(trainer: Trainer, quantizer: Quantizer) -> None:
    """Let each phase have a whole schedule, and say what is done about each scheduler."""
    steps = {id(c.scheduler): clock.scheduler_steps(trainer, c) for c in trainer.lr_scheduler_configs}
    known = quantizer.timetable.unit == "step" or math.isfinite(trainer.num_training_batches)
    obstacle = None if known else "nothing says how many batches an epoch has"
    fits = quantizer.fit_rates(clock.length(trainer), steps, obstacle=obstacle)
    for fitted, say in ((True, rank_zero_info), (False, rank_zero_warn)):
        texts = [one.text for one in fits if one.fits == fitted]
        if texts:
            say("Learning rate: " + " ".join(texts))


def follow(trainer: Trainer, quantizer: Quantizer, batch: int) -> None:
    """Bring learning rates to where they belong before this batch of the epoch."""
    unit = quantizer.timetable.unit
    part, parts = (batch // trainer.accumulate_grad_batches, clock.parts(trainer)) if unit == "epoch" else (0, 1)
    quantizer.follow_rates(clock.position(trainer, unit), part, parts, schedulers(trainer))
