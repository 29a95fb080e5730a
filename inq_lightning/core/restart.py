"""Putting learning rates and their schedulers back to where they began, as every author's INQ code does at a phase."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer


class LearningRateRestart:
    """Remembers how optimizers and schedulers are configured, and puts them back.

    Both have to be put back: most schedulers compute the next rate from the optimizer's present one.

    Args:
        optimizers: Freshly configured optimizers; what matters of them are the options of their parameter groups.
        schedulers: Freshly configured schedulers.
    """

    def __init__(self, optimizers: Sequence[Optimizer], schedulers: Sequence[Any]) -> None:
        self._groups = [
            (optimizer, copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]))
            for optimizer in optimizers
        ]
        self._schedulers = [(scheduler, copy.deepcopy(scheduler.state_dict())) for scheduler in schedulers]

    def __call__(self) -> None:
        """Restart. Parameter groups that were added later keep their options."""
        for optimizer, options in self._groups:
            for group, option in zip(optimizer.param_groups, options, strict=False):
                group.update(copy.deepcopy(option))
        for scheduler, state in self._schedulers:
            scheduler.load_state_dict(copy.deepcopy(state))
