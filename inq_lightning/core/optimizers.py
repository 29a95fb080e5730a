"""What is asked of optimizers, and what is done after their steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

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


class StepHooks:
    """Runs an action after every step of some optimizers.

    Attributes:
        complete: Whether all of them take a hook.
    """

    def __init__(self, optimizers: Sequence[Optimizer], action: Callable[[], None]) -> None:
        self._action = action
        self._ran = False
        self._handles: list[RemovableHandle] = []
        self.complete = True
        for optimizer in optimizers:
            try:
                self._handles.append(optimizer.register_step_post_hook(self._after_step))
            except AttributeError:  # a wrapper that never initialized its base class
                self.complete = False

    def ran(self) -> bool:
        """Whether the action ran since this was asked last."""
        ran, self._ran = self._ran, False
        return ran

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._action()
        self._ran = True
