"""What is asked of optimizers."""

from __future__ import annotations

from collections.abc import Sequence

from torch.optim import Optimizer

_MOVES_OFTEN = (
    "{name} moves the weights several times within one step, where frozen weights cannot be held; use another "
    "optimizer, such as SGD or AdamW"
)
_SWAPS = (
    "{name} keeps weights of its own, an average, and swaps them with the module's, frozen ones included (its methods "
    "train and eval); use an optimizer without such weights, such as SGD or AdamW, with a learning-rate schedule"
)


def check_optimizers(optimizers: Sequence[Optimizer]) -> None:
    """Refuse optimizers that move weights where frozen ones cannot be held.

    Raises:
        ValueError: There is one.
    """
    for optimizer in optimizers:
        while isinstance(within := getattr(optimizer, "optimizer", None), Optimizer):
            _check_name(optimizer)
            optimizer = within
        _check_name(optimizer)
        if callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None)):
            raise ValueError(_SWAPS.format(name=type(optimizer).__name__))


def _check_name(optimizer: Optimizer) -> None:
    """Refuse what is known by the names of its classes, from whichever library."""
    names = [base.__name__ for base in type(optimizer).__mro__]
    for part, reason in (("LBFGS", _MOVES_OFTEN), ("ScheduleFree", _SWAPS)):
        if any(part in name for name in names):
            raise ValueError(reason.format(name=names[0]))
