"""What else in a Trainer would undo the quantization: refused with a remedy, or set right.

Lightning exists as two packages with the same classes, so classes are told by their names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from inq_lightning.core.schedule import Schedule
from inq_lightning.frontends.lightning.base import callbacks_of, is_a

if TYPE_CHECKING:
    from pytorch_lightning import Callback, Trainer


def check_setup(trainer: Trainer, own: Callback) -> None:
    """Refuse strategies and callbacks that INQ cannot work with, before anything is loaded or trained.

    Args:
        trainer: The Trainer.
        own: The INQCallback that asks.

    Raises:
        ValueError: There is one; the message says what to use instead.
    """
    check_strategy(trainer.strategy)
    for callback in callbacks_of(trainer):
        name = type(callback).__name__
        if is_a(callback, type(own).__name__) and callback is not own:
            raise ValueError(
                "a Trainer takes one INQCallback: two would claim the same weights and the same place in checkpoints; "
                "give layers different widths with layer_bits"
            )
        if is_a(callback, "WeightAveraging"):
            raise ValueError(
                f"{name} saves and returns averaged weights, and averages of powers of two are none; average the "
                "full-precision network first, then quantize it without this callback"
            )
        if is_a(callback, "ModelPruning"):
            raise ValueError(
                f"{name} renames the weights while INQCallback quantizes them; prune first, make it permanent "
                "(make_pruning_permanent=True), then quantize with INQCallback(keep_zeros=True)"
            )


def show_rates_last(trainer: Trainer) -> None:
    """Let LearningRateMonitor look at the learning rates after they have been put back, wherever it is listed."""
    trainer.callbacks = sorted(  # type: ignore[attr-defined]
        callbacks_of(trainer), key=lambda callback: is_a(callback, "LearningRateMonitor")
    )


def check_strategy(strategy: object) -> None:
    """Refuse strategies, of a Trainer or of Fabric, that show no parameters which could be kept exact.

    Raises:
        ValueError: It is one; the message says what to use instead.
    """
    name = type(strategy).__name__
    if is_a(strategy, "FSDPStrategy"):
        raise ValueError(
            f"{name} flattens the weights of several layers into one parameter, which has no grid; use FSDP2 through "
            "ModelParallelStrategy, whose sharded parameters INQ knows"
        )
    if is_a(strategy, "DeepSpeedStrategy"):
        raise ValueError(
            f"{name} overwrites the module's weights from master copies of its own, frozen ones included; use ddp, or "
            "FSDP2 through ModelParallelStrategy"
        )


def hold_until_complete(trainer: Trainer, schedule: Schedule, origin: int) -> None:
    """Let nothing stop or average before the last portion has begun.

    Args:
        trainer: The Trainer, about to train.
        schedule: The schedule, with its starts.
        origin: The epoch or step from which they count.

    Raises:
        ValueError: StochasticWeightAveraging begins too early.
    """
    assert schedule.starts is not None
    complete = origin + schedule.starts[-1]
    for callback in callbacks_of(trainer):
        if is_a(callback, "EarlyStopping"):
            if schedule.unit == "epoch":
                trainer.fit_loop.min_epochs = max(trainer.fit_loop.min_epochs or 0, complete + 1)
            else:
                trainer.fit_loop.epoch_loop.min_steps = max(trainer.fit_loop.min_steps or 0, complete + 1)
        if is_a(callback, "StochasticWeightAveraging"):
            begins = callback.swa_start  # type: ignore[attr-defined]
            if schedule.unit != "epoch" or begins <= complete:
                raise ValueError(
                    f"StochasticWeightAveraging begins at epoch {begins} (counted from 0), but all weights are "
                    f"quantized only from {schedule.unit} {complete} on, and averages of powers of two are none; let "
                    f"it begin later (swa_epoch_start={complete + 2}, as a whole number) or average before quantizing"
                )


def forget_best(trainer: Trainer) -> None:
    """Let checkpoints of a monitored best begin anew: what was best so far is a network that was not yet quantized."""
    for callback in callbacks_of(trainer):
        if is_a(callback, "ModelCheckpoint") and callback.monitor is not None:  # type: ignore[attr-defined]
            worst = torch.tensor(torch.inf if callback.mode == "min" else -torch.inf)  # type: ignore[attr-defined]
            fresh: dict[str, object] = {
                "best_k_models": {},
                "best_model_path": "",
                "kth_best_model_path": "",
                "best_model_score": None,
            }
            for name, value in {**fresh, "kth_value": worst}.items():
                setattr(callback, name, value)
