"""How our callbacks deal with Lightning being two packages with the same classes."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, cast

from pytorch_lightning import Callback, Trainer

if not TYPE_CHECKING and find_spec("lightning") is not None:
    # LightningCLI of the unified package takes only subclasses of its own Callback. Beside the import above, this one
    # takes no time worth mentioning.
    import lightning.pytorch

    class Callback(Callback, lightning.pytorch.Callback):
        """A callback of both packages."""


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """The Trainer's callbacks, which Lightning's types do not list."""
    return cast("list[Callback]", trainer.callbacks)  # type: ignore[attr-defined]


def is_a(thing: object, name: str) -> bool:
    """Whether a class of this name is among the bases of ``thing``, from whichever package."""
    return any(base.__name__ == name for base in type(thing).__mro__)


__all__ = ["Callback", "callbacks_of", "is_a"]
