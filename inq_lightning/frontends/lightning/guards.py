"""What else in a Trainer would undo the quantization: refused with a remedy, or set right.

Lightning exists as two packages with the same classes, so classes are told by their names.
"""

from __future__ import annotations

import torch
from pytorch_lightning import Callback, Trainer

from inq_lightning.core.schedule import Schedule


def check_setup(trainer: Trainer, own: Callback) -> None:
    """Refuse strategies and callbacks that INQ cannot work with, before anything is loaded or trained.

    Args:
        trainer: The Trainer.
        own: The INQCallback that asks.

    Raises:
        ValueError: There is one; the message says what to use instead.
    """
    strategy = type(trainer.strategy).__name__
    if _is(trainer.strategy, "FSDPStrategy"):
        raise ValueError(
            f"{strategy} flattens the weights of several layers into one parameter, which has no grid; use FSDP2 "
            "through ModelParallelStrategy, whose sharded parameters INQCallback knows"
        )
    if _is(trainer.strategy, "DeepSpeedStrategy"):
        raise ValueError(
            f"{strategy} overwrites the module's weights from master copies of its own, frozen ones included; use ddp, "
            "or FSDP2 through ModelParallelStrategy"
        )
    for callback in _callbacks(trainer):
        name = type(callback).__name__
        if _is(callback, type(own).__name__) and callback is not own:
            raise ValueError(
                "a Trainer takes one INQCallback: two would claim the same weights and the same place in checkpoints; "
                "give layers different widths with layer_bits"
            )
        if _is(callback, "WeightAveraging"):
            raise ValueError(
                f"{name} saves and returns averaged weights, and averages of powers of two are none; average the "
                "full-precision network first, then quantize it without this callback"
            )
        if _is(callback, "ModelPruning"):
            raise ValueError(
                f"{name} renames the weights while INQCallback quantizes them; prune first, make it permanent "
                "(make_pruning_permanent=True), then quantize with INQCallback(keep_zeros=True)"
            )


def check_optimizers(trainer: Trainer) -> None:
    """Refuse optimizers that move weights where frozen ones cannot be held.

    Raises:
        ValueError: There is one.
    """
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError(
                "LBFGS moves the weights several times within one step, where frozen weights cannot be held; use "
                "another optimizer, such as SGD or AdamW"
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
    for callback in _callbacks(trainer):
        if _is(callback, "EarlyStopping"):
            if schedule.unit == "epoch":
                trainer.fit_loop.min_epochs = max(trainer.fit_loop.min_epochs or 0, complete + 1)
            else:
                trainer.fit_loop.epoch_loop.min_steps = max(trainer.fit_loop.min_steps or 0, complete + 1)
        if _is(callback, "StochasticWeightAveraging"):
            begins = callback.swa_start  # type: ignore[attr-defined]
            if schedule.unit != "epoch" or begins <= complete:
                raise ValueError(
                    f"StochasticWeightAveraging begins at epoch {begins} (counted from 0), but all weights are "
                    f"quantized only from {schedule.unit} {complete} on, and averages of powers of two are none; let "
                    f"it begin later (swa_epoch_start={complete + 2}, as a whole number) or average before quantizing"
                )


def forget_best(trainer: Trainer) -> None:
    """Let checkpoints of a monitored best begin anew: what was best so far is a network that was not yet quantized."""
    for callback in _callbacks(trainer):
        if _is(callback, "ModelCheckpoint") and callback.monitor is not None:  # type: ignore[attr-defined]
            worst = torch.tensor(torch.inf if callback.mode == "min" else -torch.inf)  # type: ignore[attr-defined]
            fresh: dict[str, object] = {
                "best_k_models": {},
                "best_model_path": "",
                "kth_best_model_path": "",
                "best_model_score": None,
            }
            for name, value in {**fresh, "kth_value": worst}.items():
                setattr(callback, name, value)


def _callbacks(trainer: Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined,no-any-return]


def _is(thing: object, name: str) -> bool:
    """Whether a class of this name is among the bases of ``thing``, from whichever package."""
    return any(base.__name__ == name for base in type(thing).__mro__)
