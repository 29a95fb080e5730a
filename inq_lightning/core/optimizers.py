"""What is asked of optimizers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.optim import Optimizer


def check_optimizers(optimizers: Sequence[Optimizer]) -> None:
    """Refuse optimizers that move weights where frozen ones cannot be held.

    Raises:
        ValueError: There is one.
    """
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError(
                "LBFGS moves the weights several times within one step, where frozen weights cannot be held; use "
                "another optimizer, such as SGD or AdamW"
            )
