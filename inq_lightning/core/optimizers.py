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
    """Refuse optimizers that move weights where frozen ones cannot be held, also within others that wrap them.

    They are known by what they are: their classes' names, from whichever library, and their methods.

    Raises:
        ValueError: There is one.
    """
    for optimizer in optimizers:
        known = [optimizer]
        for one in known:
            within = [o for o in vars(one).values() if isinstance(o, Optimizer) and all(o is not k for k in known)]
            known += within
            names = [base.__name__ for base in type(one).__mro__]
            swaps = all(callable(getattr(one, method, None)) for method in ("train", "eval"))
            if any("LBFGS" in name for name in names):
                raise ValueError(_MOVES_OFTEN.format(name=names[0]))
            if any("ScheduleFree" in name for name in names) or (
                swaps and not within
            ):  # a wrapper's methods may be idle
                raise ValueError(_SWAPS.format(name=names[0]))
