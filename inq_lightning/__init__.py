"""Incremental Network Quantization for PyTorch Lightning: trained weights become 0 or powers of two."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from inq_lightning.core.frozen import FrozenWeight
from inq_lightning.core.schedule import PRESETS, Schedule
from inq_lightning.core.selection import select_parameters
from inq_lightning.grid import PowerOfTwoGrid

if TYPE_CHECKING:
    from inq_lightning.formats.onnx import export_onnx
    from inq_lightning.formats.packed import load_packed, save_packed
    from inq_lightning.frontends.lightning.callback import INQCallback
    from inq_lightning.runtime.modules import to_packed

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
    "INQCallback": "frontends.lightning.callback",
    "export_onnx": "formats.onnx",
    "load_packed": "formats.packed",
    "save_packed": "formats.packed",
    "to_packed": "runtime.modules",
}


def __getattr__(name: str) -> Any:
    """Import Lightning only where it is used: the core serves plain PyTorch loops and inference too."""
    if name in _LAZY:
        return getattr(import_module(f"inq_lightning.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
