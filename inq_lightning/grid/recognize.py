"""Which grid trained weights lie on."""

from __future__ import annotations

import torch
from torch import Tensor

from inq_lightning.grid.base import FLOATS, Grid
from inq_lightning.grid.levels import Levels, LevelsName, levels_of
from inq_lightning.grid.power_of_two import MAX_BITS, MIN_BITS, PowerOfTwoGrid, exponent_range

_PART = 1 << 16  # weights at a time: intermediate results stay in the cache


def fit_grid(weight: Tensor) -> PowerOfTwoGrid | None:
    """Find the grid of fewest bits that holds every weight exactly; of several, one of the paper's levels.

    Args:
        weight: Floating-point weights of any shape.

    Returns:
        The grid, with levels that have a name; None where a weight is neither zero nor a power of two, or where they
        span too many exponents, for 8 bits or for a grid that their dtype holds, or where that has no grids, as float8.
    """
    if weight.dtype not in FLOATS:
        return None
    mantissa, exponent = torch.frexp(weight.detach())
    nonzero = weight != 0
    if not bool(nonzero.any()):
        return PowerOfTwoGrid(None, MIN_BITS)
    if not bool((mantissa[nonzero].abs() == 0.5).all()):  # inf and nan have another mantissa
        return None
    exponents = exponent[nonzero] - 1
    least = int(exponents.min())
    used = {least + k for k in torch.bincount(exponents - least).nonzero().flatten().tolist()}
    families: tuple[LevelsName, ...] = ("paper", "full", "dense") if bool(nonzero.all()) else ("paper", "full")
    for bits in range(MIN_BITS, MAX_BITS + 1):
        for name in families if bits < MAX_BITS else families[:1]:
            if grid := _placed(levels_of(name, bits), used, bits, *exponent_range(weight.dtype)):
                return grid
    return None


def _placed(family: Levels, used: set[int], bits: int, lowest: int, highest: int) -> PowerOfTwoGrid | None:
    """The lowest grid of some levels that has all these exponents, and none that the dtype does not hold, if any."""
    span = family.exponents[-1]
    for n2 in range(max(lowest, max(used) - span), min(min(used), highest - span) + 1):
        if used <= {n2 + k for k in family.exponents}:
            return PowerOfTwoGrid(n2 + span, bits, family=family)
    return None


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
