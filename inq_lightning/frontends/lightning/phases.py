"""How long a phase will be, for those who make their learning-rate schedule last one."""

from __future__ import annotations

import math

from pytorch_lightning import Trainer

from inq_lightning._common import one_of
from inq_lightning.core.schedule import Unit
from inq_lightning.frontends.lightning import clock
from inq_lightning.frontends.lightning.find import find_inq


def phase_length(trainer: Trainer, unit: Unit = "step") -> int:
    """How long a learning-rate schedule should last that begins anew with each phase, for ``configure_optimizers``.

    Where phases differ it is the longest one: in the others the whole schedule is run in less time. Where nothing
    begins anew, without an INQCallback or with ``restart_lr=False``, it is the whole run.

    Args:
        trainer: The module's Trainer.
        unit: ``"step"`` for optimizer steps (batches under manual optimization), or ``"epoch"``.

    Raises:
        ValueError: Nothing says how long the run is, or see :meth:`~inq_lightning.Schedule.fit`.
    """
    one_of("unit", unit, Unit)
    trainer.fit_loop.setup_data()
    run, batches = clock.length(trainer), clock.parts(trainer)
    inq = find_inq(trainer)
    if inq is not None and inq.options.restart_lr:
        schedule = inq.options.phases.fit(run)
        counted, longest = schedule.unit, max(schedule.phase_lengths(run)[1:])
    else:
        counted = "epoch" if math.isfinite(run.epochs) else "step"
        longest = run.end(counted)
    if not math.isfinite(longest) or (counted != unit and not math.isfinite(trainer.num_training_batches)):
        raise ValueError(
            f"nothing says how many {unit}s a phase of this run has: set the Trainer's max_epochs or max_steps, or "
            "limit_train_batches where the data have no length"
        )
    if counted != unit:
        longest = longest * batches if unit == "step" else longest / batches
    return max(1, math.ceil(longest))
