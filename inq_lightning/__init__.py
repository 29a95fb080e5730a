"""Incremental Network Quantization for PyTorch Lightning: trained weights become 0 or powers of two."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inq_lightning._version import __version__ as __version__

if TYPE_CHECKING:
    from inq_lightning.closed_form.quantize import quantize
    from inq_lightning.core.activation import PowerOfTwoActivation
    from inq_lightning.core.activations import calibrate_activations, quantize_activations
    from inq_lightning.core.frozen import FrozenWeight
    from inq_lightning.core.options import Options
    from inq_lightning.core.quantizer import Quantizer
    from inq_lightning.core.schedule import PRESETS, Schedule
    from inq_lightning.core.selection import select_parameters
    from inq_lightning.formats.accelerator import read_accelerator, save_accelerator
    from inq_lightning.formats.checkpoint import read_checkpoint
    from inq_lightning.formats.layers import find_grids
    from inq_lightning.formats.onnx import export_onnx, read_onnx, session_options
    from inq_lightning.formats.packed import load_packed, read_packed, save_packed
    from inq_lightning.frontends.fabric import FabricINQ
    from inq_lightning.frontends.huggingface import INQTrainerCallback as INQTrainerCallback
    from inq_lightning.frontends.lightning.callback import INQCallback
    from inq_lightning.frontends.lightning.monitor import INQMonitor
    from inq_lightning.frontends.lightning.phases import phase_length
    from inq_lightning.frontends.lightning.progress import INQProgressBar
    from inq_lightning.frontends.lightning.teacher import Teacher, distill
    from inq_lightning.frontends.loop import INQ
    from inq_lightning.grid import Levels, PowerOfTwoGrid, fit_grid
    from inq_lightning.integer.c import export_c
    from inq_lightning.integer.load import load_integer
    from inq_lightning.integer.lower import lower
    from inq_lightning.integer.network import IntegerNetwork
    from inq_lightning.integer.onnx import export_integer_onnx
    from inq_lightning.report.inspection import inspect_file
    from inq_lightning.runtime.modules import to_packed
    from inq_lightning.runtime.torchao import to_torchao

if not Path(__file__).with_name("conf").joinpath("__init__.py").exists():  # a checkout has conf/ beside this folder
    __path__.append(str(Path(__file__).parents[1]))

__all__ = [  # what no extra is needed for: "from inq_lightning import *" imports all of it
    "INQ",
    "PRESETS",
    "FabricINQ",
    "FrozenWeight",
    "INQCallback",
    "INQMonitor",
    "INQProgressBar",
    "IntegerNetwork",
    "Levels",
    "Options",
    "PowerOfTwoActivation",
    "PowerOfTwoGrid",
    "Quantizer",
    "Schedule",
    "Teacher",
    "calibrate_activations",
    "distill",
    "export_c",
    "export_integer_onnx",
    "export_onnx",
    "find_grids",
    "fit_grid",
    "inspect_file",
    "load_integer",
    "load_packed",
    "lower",
    "phase_length",
    "quantize",
    "quantize_activations",
    "read_accelerator",
    "read_checkpoint",
    "read_onnx",
    "read_packed",
    "save_accelerator",
    "save_packed",
    "select_parameters",
    "session_options",
    "to_packed",
    "to_torchao",
]

_HOMES = {
    "closed_form.quantize": ["quantize"],
    "core.activation": ["PowerOfTwoActivation"],
    "core.activations": ["calibrate_activations", "quantize_activations"],
    "core.frozen": ["FrozenWeight"],
    "core.options": ["Options"],
    "core.quantizer": ["Quantizer"],
    "core.schedule": ["PRESETS", "Schedule"],
    "core.selection": ["select_parameters"],
    "formats.accelerator": ["read_accelerator", "save_accelerator"],
    "formats.checkpoint": ["read_checkpoint"],
    "formats.layers": ["find_grids"],
    "formats.onnx": ["export_onnx", "read_onnx", "session_options"],
    "formats.packed": ["load_packed", "read_packed", "save_packed"],
    "frontends.fabric": ["FabricINQ"],
    "frontends.huggingface": ["INQTrainerCallback"],
    "frontends.lightning.callback": ["INQCallback"],
    "frontends.lightning.monitor": ["INQMonitor"],
    "frontends.lightning.phases": ["phase_length"],
    "frontends.lightning.progress": ["INQProgressBar"],
    "frontends.lightning.teacher": ["Teacher", "distill"],
    "frontends.loop": ["INQ"],
    "grid": ["Levels", "PowerOfTwoGrid", "fit_grid"],
    "integer.c": ["export_c"],
    "integer.load": ["load_integer"],
    "integer.lower": ["lower"],
    "integer.network": ["IntegerNetwork"],
    "integer.onnx": ["export_integer_onnx"],
    "report.inspection": ["inspect_file"],
    "runtime.modules": ["to_packed"],
    "runtime.torchao": ["to_torchao"],
}


def __getattr__(name: str) -> Any:
    """Import each name where it is used: inference needs no Lightning, ``--version`` no torch."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"inq_lightning.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*(name for names in _HOMES.values() for name in names), *(n for n in globals() if n.startswith("__"))]
