"""What is known of one quantized parameter, and what parameters are called."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn

from inq_lightning.grid import Grid

# Attributes under which wrappers keep what they wrap: torch.compile's and Fabric's.
_WRAPPERS = {"_orig_mod", "_forward_module", "_original_module"}


@dataclass(frozen=True)
class Layer:
    """One quantized parameter.

    Attributes:
        name: Its name in ``module.named_parameters()``, without what wrappers add, see :func:`plain_name`.
        shape: Its shape.
        bits: Code length of one weight.
        grid: Its grid; None before any of its weights is frozen.
        frozen: How many of its weights are frozen on the grid for good.
    """

    name: str
    shape: tuple[int, ...]
    bits: int
    grid: Grid | None = None
    frozen: int = 0

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def n1(self) -> int | None:
        """Exponent of the largest level; None without a grid of powers of two, and where the only level is 0."""
        return getattr(self.grid, "n1", None)

    @property
    def n2(self) -> int | None:
        """Exponent of the smallest level; None likewise."""
        return getattr(self.grid, "n2", None)

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values, the grid as its spec."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        plain = {"shape": list(self.shape), "grid": None if self.grid is None else self.grid.spec()}
        return values | plain | {"numel": self.numel}


def plain_name(name: str) -> str:
    """A parameter's name without the parts that `torch.compile` and Fabric put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def named_weights(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """All parameters by their plain names, a tied one under each of its names."""
    return ((plain_name(name), p) for name, p in module.named_parameters(remove_duplicate=False))


def computed_tensors(module: nn.Module) -> dict[int, Tensor]:
    """Copies of what hooks have computed last, such as the older weight_norm's weight: a memo for ``copy.deepcopy``.

    By themselves they cannot be copied, as they are no leaves of the graph of gradients.
    """
    attributes = (value for layer in module.modules() for value in vars(layer).values())
    return {id(t): t.detach().clone() for t in attributes if isinstance(t, Tensor) and not t.is_leaf}
