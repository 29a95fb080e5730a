"""What else in a Trainer would undo the quantization: refused with a remedy, or set right.

Lightning exists as two packages with the same classes, so classes are told by their names.
"""

from __future__ import annotations

from typing import Any

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
    if callbacks_named(trainer, "INQCallback") != [own]:
        raise ValueError(
            "a Trainer takes one INQCallback: two would claim the same weights and the same place in checkpoints; give "
            "layers different widths with layer_bits"
        )
    for callback in callbacks_named(trainer, "WeightAveraging"):
        raise ValueError(
            f"{type(callback).__name__} saves and returns averaged weights, and averages of powers of two are none; "
            "average the full-precision network first, then quantize it without this callback"
        )
    for callback in callbacks_named(trainer, "ModelPruning"):
        raise ValueError(
            f"{type(callback).__name__} renames the weights while INQCallback quantizes them; prune first, make it "
            "permanent (make_pruning_permanent=True), then quantize with INQCallback(keep_zeros=True)"
        )


def check_optimizers(trainer: Trainer) -> None:
    """Refuse optimizers that move weights where frozen ones cannot be held.

    Raises:
        ValueError: There is one.
    """
    for optimizer in trainer.optimizers:
        name = type(optimizer).__name__
        if _is(optimizer, "LBFGS") or "LBFGS" in name:
            raise ValueError(
                f"{name} moves the weights several times within one step, where frozen weights cannot be held; use "
                "another optimizer, such as SGD or AdamW"
            )
        if "ScheduleFree" in name or all(callable(getattr(optimizer, swap, None)) for swap in ("train", "eval")):
            raise ValueError(
                f"{name} keeps weights of its own, averaged ones, and swaps them with the module's (its methods train "
                "and eval), frozen ones included; use one without, such as SGD or AdamW, with a learning-rate schedule"
            )


def check_averaging(trainer: Trainer, schedule: Schedule, origin: int) -> None:
    """Let nothing average weights before the last portion has begun.

    Args:
        trainer: The Trainer, about to train.
        schedule: The schedule, with its starts.
        origin: The epoch or step from which they count.

    Raises:
        ValueError: StochasticWeightAveraging begins too early.
    """
    assert schedule.starts is not None
    complete = origin + schedule.starts[-1]
    for callback in callbacks_named(trainer, "StochasticWeightAveraging"):
        begins = callback.swa_start
        if schedule.unit != "epoch" or begins <= complete:
            raise ValueError(
                f"StochasticWeightAveraging begins at epoch {begins} (counted from 0), but all weights are quantized "
                f"only from {schedule.unit} {complete} on, and averages of powers of two are none; let it begin later "
                f"(swa_epoch_start={complete + 2}, as a whole number) or average before quantizing"
            )


def callbacks_named(trainer: Trainer, name: str) -> list[Any]:
    """The Trainer's callbacks of a class of this name, or of one derived from it, from whichever package."""
    return [callback for callback in trainer.callbacks if _is(callback, name)]  # type: ignore[attr-defined]


def _is(thing: object, name: str) -> bool:
    """Whether a class of this name is among the bases of ``thing``, from whichever package."""
    return any(base.__name__ == name for base in type(thing).__mro__)
