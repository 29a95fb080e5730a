"""Callbacks that end or remember a run by a metric: they begin anew when everything is quantized."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.utilities import rank_zero_info

from inq_lightning.frontends.lightning.base import callbacks_named


class EarlyStoppingHold:
    """Lets no EarlyStopping end a run before everything is quantized; each phase makes its metric worse for a while.

    Its hooks run as ever, but that they ask the Trainer to stop is not heard. Nothing else is touched: a Timer, for
    one, still stops the run.
    """

    def __init__(self) -> None:
        self._stoppers: list[Any] = []
        self._told: list[Any] = []

    def hold(self, trainer: Trainer) -> None:
        """Hear them no more."""
        self.release()
        self._stoppers = callbacks_named(trainer, "EarlyStopping")
        for stopper in self._stoppers:
            for hook in _hooks(stopper):
                setattr(stopper, hook, partial(self._unheard, getattr(stopper, hook), stopper))

    def release(self) -> None:
        """Let them be heard again."""
        for stopper in self._stoppers:
            for hook in _hooks(stopper):
                vars(stopper).pop(hook, None)
        self._stoppers, self._told = [], []

    def _unheard(self, hook: Any, stopper: Any, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Run a hook, and take back that it asks the Trainer to stop."""
        stops = trainer.should_stop
        hook(trainer, *args, **kwargs)
        if stops or not trainer.should_stop:
            return
        trainer.should_stop = False
        if stopper not in self._told:
            self._told.append(stopper)
            rank_zero_info(
                f"{type(stopper).__name__} of {getattr(stopper, 'monitor', 'a metric')} asks to stop in epoch "
                f"{trainer.current_epoch}; training goes on until everything is quantized: then its patience and best "
                "score begin anew."
            )


def forget_best(trainer: Trainer) -> None:
    """Let what is remembered of a monitored metric begin anew: so far it was that of a network not yet quantized."""
    for saver in callbacks_named(trainer, "ModelCheckpoint"):
        if saver.monitor is not None:
            _reset(saver, best_k_models={}, best_model_path="", kth_best_model_path="", best_model_score=None)
            _reset(saver, kth_value=_worst(saver))
    for stopper in callbacks_named(trainer, "EarlyStopping"):
        reason = getattr(stopper, "stopping_reason", None)
        _reset(stopper, best_score=_worst(stopper), wait_count=0, stopped_epoch=0, stopping_reason_message=None)
        _reset(stopper, stopping_reason=getattr(type(reason), "NOT_STOPPED", None))


def _reset(callback: Any, **values: Any) -> None:
    """Set those attributes that the callback has: its class may be somebody else's of the same name."""
    for name, value in values.items():
        if hasattr(callback, name):
            setattr(callback, name, value)


def _worst(callback: Any) -> torch.Tensor:
    return torch.tensor(-torch.inf if getattr(callback, "mode", "min") == "max" else torch.inf)


def _hooks(callback: Callback) -> set[str]:
    """The hooks that its classes have made their own."""
    classes = [kind for kind in type(callback).__mro__ if kind.__name__ not in ("Callback", "object")]
    return {name for kind in classes for name in vars(kind) if name.startswith("on_")}
