"""What our callbacks are subclasses of: Lightning exists as two packages with the same classes."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from pytorch_lightning import Callback

if not TYPE_CHECKING and find_spec("lightning") is not None:
    # LightningCLI of the unified package takes only subclasses of its own Callback. Beside the import above, this one
    # takes no time worth mentioning.
    import lightning.pytorch

    class Callback(Callback, lightning.pytorch.Callback):
        """A callback of both packages."""


__all__ = ["Callback"]
