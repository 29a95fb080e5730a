"""Which grid trained weights lie on."""

from __future__ import annotations

import torch
from torch import Tensor

from inq_lightning.grid.base import FLOATS, Grid
from inq_lightning.grid.power_of_two import MAX_BITS, MIN_BITS, PowerOfTwoGrid, exponent_range

_PART = 1 << 16  # weights at a time: intermediate results stay in the cache


def fit_grid(weight: Tensor) -> PowerOfTwoGrid | None:
    """Find the grid of fewest bits that holds every weight exactly.

    Args:
        weight: Floating-point weights of any shape.

    Returns:
        The grid, or None where a weight is neither zero nor a power of two, where they span too many exponents, for 8
        bits or for a grid that their dtype holds, or where that has no grids, as float8.
    """
    if weight.dtype not in FLOATS:
        return None
    mantissa, exponent = torch.frexp(weight.detach())
    nonzero = weight != 0
    if not bool(nonzero.any()):
        return PowerOfTwoGrid(None, MIN_BITS)
    if not bool((mantissa[nonzero].abs() == 0.5).all()):  # inf and nan have another mantissa
        return None
    exponents = exponent[nonzero]
    n1, n2 = int(exponents.max()) - 1, int(exponents.min()) - 1
    bits = max(MIN_BITS, 2 + (n1 - n2).bit_length())
    lowest, highest = exponent_range(weight.dtype)
    n1 = max(n1, lowest - 1 + (1 << bits - 2))  # no level below what the dtype holds
    return PowerOfTwoGrid(n1, bits) if bits <= MAX_BITS and lowest <= n2 and n1 <= highest else None


def holds(grid: Grid, weight: Tensor) -> bool:
    """Whether every weight is a level of the grid."""
    if weight.dtype not in FLOATS:
        return False
    return all(bool(torch.isfinite(part).all()) and torch.equal(grid.round(part), part) for part in _parts(weight))


def encode(grid: Grid, weight: Tensor) -> Tensor:
    """Contiguous codes of a large weight, as the grid's ``encode`` returns them, in little memory."""
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for target, part in zip(_parts(codes), _parts(weight), strict=True):
        target.copy_(grid.encode(part))
    return codes


def _parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """A tensor's elements in the order of their indices, by the cacheful."""
    return torch.split(tensor.detach().reshape(-1), _PART)
