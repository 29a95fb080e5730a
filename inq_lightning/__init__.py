"""Incremental Network Quantization for PyTorch Lightning: trained weights become 0 or powers of two."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from inq_lightning._version import __version__

if TYPE_CHECKING:
    from inq_lightning.closed_form.quantize import quantize
    from inq_lightning.core.frozen import FrozenWeight
    from inq_lightning.core.options import Options
    from inq_lightning.core.quantizer import Quantizer
    from inq_lightning.core.schedule import PRESETS, Schedule
    from inq_lightning.core.selection import select_parameters
    from inq_lightning.formats.onnx import export_onnx
    from inq_lightning.formats.packed import load_packed, save_packed
    from inq_lightning.frontends.lightning.callback import INQCallback
    from inq_lightning.frontends.lightning.monitor import INQMonitor
    from inq_lightning.frontends.lightning.progress import INQProgressBar
    from inq_lightning.grid import PowerOfTwoGrid
    from inq_lightning.runtime.modules import to_packed

__all__ = [
    "PRESETS",
    "FrozenWeight",
    "INQCallback",
    "INQMonitor",
    "INQProgressBar",
    "Options",
    "PowerOfTwoGrid",
    "Quantizer",
    "Schedule",
    "__version__",
    "export_onnx",
    "load_packed",
    "quantize",
    "save_packed",
    "select_parameters",
    "to_packed",
]

_HOMES = {
    "closed_form.quantize": ["quantize"],
    "core.frozen": ["FrozenWeight"],
    "core.options": ["Options"],
    "core.quantizer": ["Quantizer"],
    "core.schedule": ["PRESETS", "Schedule"],
    "core.selection": ["select_parameters"],
    "formats.onnx": ["export_onnx"],
    "formats.packed": ["load_packed", "save_packed"],
    "frontends.lightning.callback": ["INQCallback"],
    "frontends.lightning.monitor": ["INQMonitor"],
    "frontends.lightning.progress": ["INQProgressBar"],
    "grid": ["PowerOfTwoGrid"],
    "runtime.modules": ["to_packed"],
}


def __getattr__(name: str) -> Any:
    """Import each name where it is used: inference needs no Lightning, ``--version`` no torch."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"inq_lightning.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
