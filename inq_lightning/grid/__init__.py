"""Which values a weight may take."""

from collections.abc import Mapping
from typing import Any

from inq_lightning._common import one_of
from inq_lightning.grid.base import Grid, Reduction
from inq_lightning.grid.levels import Levels, LevelsLike, LevelsOption
from inq_lightning.grid.power_of_two import MAX_BITS, MIN_BITS, Exponent, PowerOfTwoGrid, Underflow
from inq_lightning.grid.recognize import fit_grid

__all__ = [
    "GRIDS",
    "MAX_BITS",
    "MIN_BITS",
    "Exponent",
    "Grid",
    "Levels",
    "LevelsLike",
    "LevelsOption",
    "PowerOfTwoGrid",
    "Reduction",
    "Underflow",
    "fit_grid",
    "from_spec",
]

#: Every kind of grid, by what its specs call it.
GRIDS = {"power_of_two": PowerOfTwoGrid}


def from_spec(spec: Mapping[str, Any]) -> Grid:
    """Make the grid again whose :meth:`~inq_lightning.grid.Grid.spec` this is.

    Raises:
        ValueError: It is no spec of a grid that this release knows.
    """
    one_of("the kind of a grid", spec.get("kind"), GRIDS)
    try:
        return GRIDS[spec["kind"]].from_spec(spec)
    except TypeError as error:
        raise ValueError(f"{dict(spec)} describes no grid: {error}") from error
