"""Incremental Network Quantization for PyTorch Lightning: trained weights become 0 or powers of two."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from inq_lightning.frozen import FrozenWeight
from inq_lightning.grid import PowerOfTwoGrid
from inq_lightning.schedule import PRESETS, Schedule
from inq_lightning.selection import select_parameters

if TYPE_CHECKING:
    from inq_lightning.callback import INQCallback

__version__ = "0.1.0"
__all__ = ["PRESETS", "FrozenWeight", "INQCallback", "PowerOfTwoGrid", "Schedule", "select_parameters"]


def __getattr__(name: str) -> Any:
    """Import Lightning only where it is used: the core serves plain PyTorch loops too."""
    if name == "INQCallback":
        from inq_lightning.callback import INQCallback

        return INQCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
