"""The INQCallback among a Trainer's callbacks, for those that show what it does."""

from __future__ import annotations

from pytorch_lightning import Trainer

from inq_lightning.frontends.lightning.base import callbacks_of
from inq_lightning.frontends.lightning.callback import INQCallback


def find_inq(trainer: Trainer) -> INQCallback | None:
    """The Trainer's INQCallback; None where it has none, as while a full-precision network trains."""
    return next((callback for callback in callbacks_of(trainer) if isinstance(callback, INQCallback)), None)
