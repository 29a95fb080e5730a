"""What every grid can do, whatever its values are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Reduction(NamedTuple):
    """Turns a sum or a maximum over one piece of a tensor into that over all its shards; a plain tensor has one piece.

    Attributes:
        sum: Adds up a tensor of partial sums.
        max: Takes the largest of a tensor of partial maxima.
    """

    sum: Callable[[Tensor], Tensor] = lambda partial: partial
    max: Callable[[Tensor], Tensor] = lambda partial: partial


#: Types that weights on a grid may have.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: For a tensor that is in one piece.
WHOLE = Reduction()


class Grid(Protocol):
    """The finite set of values that one tensor may take: integers times a power of two, each with a code.

    Everything after the choice of a grid asks it through these names; files and checkpoints keep its :meth:`spec`.
    """

    @property
    def bits(self) -> int:
        """Code length of one weight."""

    @property
    def codes(self) -> Sequence[int]:
        """All codes, ascending."""

    @property
    def levels(self) -> Tensor:
        """All values, ascending: float64, exact, shape (len(codes),)."""

    @property
    def step(self) -> int:
        """Exponent of the unit: every level is an integer times 2^step."""

    @property
    def storage_dtype(self) -> torch.dtype:
        """The narrowest type in which every level is 0 or a normal number."""

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Refuse a dtype that cannot hold every level exactly (ValueError)."""

    def round(self, w: Tensor) -> Tensor:
        """Round finite weights in a dtype that holds the grid; same shape, dtype, device and memory format."""

    def quantize(self, w: Tensor) -> Tensor:
        """:meth:`round`, refusing nan, inf and a dtype that does not hold the grid (ValueError)."""

    def encode(self, w: Tensor) -> Tensor:
        """:meth:`quantize`, and return int8 codes in the shape and memory format of ``w``."""

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values that codes stand for, in their shape and memory format; refuses others' codes (ValueError)."""

    def multiples(self, codes: Tensor) -> Tensor:
        """The same divided by 2^step: whole numbers, float64."""

    def spec(self) -> dict[str, Any]:
        """Everything that :func:`~inq_lightning.grid.from_spec` needs, as plain JSON values."""


def span(codes: Sequence[int]) -> range:
    """All whole numbers from the lowest code to the highest, 0 also where it is none."""
    return range(codes[0], codes[-1] + 1)


def table_order(codes: Sequence[int]) -> list[int]:
    """Codes in the order of a table that is indexed by the code itself, where a negative one counts from the end."""
    return [*range(codes[-1] + 1), *range(codes[0], 0)]


def largest_multiple(grid: Grid) -> int:
    """The largest magnitude of a grid in units of 2^step; 0 for a grid of zeros."""
    return int(grid.multiples(torch.tensor(grid.codes)).abs().max())
