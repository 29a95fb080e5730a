"""Incremental Network Quantization for PyTorch Lightning: trained weights become 0 or powers of two."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from inq_lightning.frozen import FrozenWeight
from inq_lightning.grid import PowerOfTwoGrid
from inq_lightning.schedule import PRESETS, Schedule
from inq_lightning.selection import select_parameters

if TYPE_CHECKING:
    from inq_lightning.callback import INQCallback
    from inq_lightning.export.artifact import load_packed, save_packed
    from inq_lightning.export.onnx import export_onnx
    from inq_lightning.export.packed import to_packed

__version__ = "0.1.0"
__all__ = [
    "PRESETS",
    "FrozenWeight",
    "INQCallback",
    "PowerOfTwoGrid",
    "Schedule",
    "export_onnx",
    "load_packed",
    "save_packed",
    "select_parameters",
    "to_packed",
]

_LAZY = {
    "INQCallback": "callback",
    "export_onnx": "export.onnx",
    "load_packed": "export.artifact",
    "save_packed": "export.artifact",
    "to_packed": "export.packed",
}


def __getattr__(name: str) -> Any:
    """Import Lightning only where it is used: the core serves plain PyTorch loops and inference too."""
    if name in _LAZY:
        return getattr(import_module(f"inq_lightning.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
