"""What a file holds: it is read without running any of it, whatever wrote it."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inq_lightning._common import import_extra
from inq_lightning.core import state as saved_state
from inq_lightning.core.frozen import FrozenWeight
from inq_lightning.core.schedule import Schedule
from inq_lightning.formats.layers import candidate_grids
from inq_lightning.formats.onnx import DEQUANTIZED, METADATA_KEY
from inq_lightning.formats.packed import read_packed
from inq_lightning.grid import PowerOfTwoGrid
from inq_lightning.report.inspection import Inspection, inspect_state


def inspect_file(path: str | Path, reference: str | Path | None = None) -> Inspection:
    """Describe a file: a Lightning checkpoint, a state_dict, a packed artifact or an ONNX file.

    What it is, its content tells, not its name. Nothing in it is executed. Only a checkpoint with the state of
    `INQCallback`, an artifact and our ONNX files say which weights were quantized, at how many bits; elsewhere the
    weights tell by themselves, see :func:`~inq_lightning.formats.layers.candidate_grids`, and the bits are the fewest
    whose grid holds them.

    Args:
        path: The file.
        reference: A checkpoint or state_dict of the full-precision network, for the SNR.

    Raises:
        ValueError: One of the files is none of these, or is damaged, or they belong to different networks.
        OSError: One of the files cannot be read.
        ImportError: ONNX is needed and is not installed.
    """
    path = Path(path)
    original = None if reference is None else _weights(_read_checkpoint(Path(reference)), Path(reference))
    try:
        return _reader(path)(path, original)
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error


def _reader(path: Path) -> Callable[[Path, Mapping[str, Tensor] | None], Inspection]:
    """What reads a file, by its first bytes."""
    with path.open("rb") as file:
        head = file.read(9)
    if head[8:] == b"{":  # a safetensors file; the bytes before are its header's length, and may be anything
        return _inspect_packed
    if head[:4] == b"PK\x03\x04" or head[:1] == b"\x80":  # a zip archive; a pickle of older versions of torch
        return _inspect_checkpoint
    if head[:1] == b"\x08":  # protobuf's field 1, ONNX's IR version
        return _inspect_onnx
    raise ValueError("is neither a checkpoint nor a state_dict, a packed artifact or an ONNX file")


def _inspect_checkpoint(path: Path, reference: Mapping[str, Tensor] | None) -> Inspection:
    checkpoint, size = _read_checkpoint(path), path.stat().st_size
    weights = _weights(checkpoint, path)
    kind = "checkpoint" if "state_dict" in checkpoint else "state_dict"
    state = checkpoint.get("callbacks", {}).get("INQCallback") if kind == "checkpoint" else None
    if not state:
        return Inspection(kind, size, *inspect_state(weights, candidate_grids(weights), reference=reference))
    schedule = saved_state.check(state)
    missing = [name for name in state["layers"] if name not in weights]
    if missing:
        raise ValueError(f"the INQ state names {', '.join(missing)}, which the file's state_dict lacks")
    layers = {
        name: FrozenWeight(name, weights[name], layer["bits"], layer["underflow"])
        for name, layer in state["layers"].items()
    }
    saved_state.load(state, layers)
    # A layer of which nothing is frozen yet has a width, but no exponents.
    grids = {name: layer.grid or PowerOfTwoGrid(None, layer.bits) for name, layer in layers.items()}
    masks = {name: layer.mask for name, layer in layers.items()}
    described = inspect_state(weights, grids, frozen=masks, reference=reference)
    return Inspection(kind, size, *described, schedule, state["phase"])


def _inspect_packed(path: Path, reference: Mapping[str, Tensor] | None) -> Inspection:
    artifact = read_packed(path)
    grids: dict[str, PowerOfTwoGrid | None] = {x.name: PowerOfTwoGrid(x.n1, x.bits) for x in artifact.layers}
    grids |= dict.fromkeys(artifact.metadata["off_grid"])
    stored = {layer.name: layer.stored_bytes for layer in artifact.layers}
    described = inspect_state(artifact.state_dict, grids, stored=stored, reference=reference)
    schedule = artifact.metadata.get("schedule")
    return Inspection("packed", path.stat().st_size, *described, Schedule(**schedule) if schedule else None)


def _inspect_onnx(path: Path, reference: Mapping[str, Tensor] | None) -> Inspection:
    onnx = import_extra("onnx", "export")
    state, grids, stored = {}, {}, {}
    try:
        model = onnx.load(path)
        arrays = {x.name: onnx.numpy_helper.to_array(x) for x in model.graph.initializer}
        sizes = {x.name: len(x.raw_data) or arrays[x.name].nbytes for x in model.graph.initializer}
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        for name, layer in json.loads(metadata.get(METADATA_KEY, "{}")).items():
            grid = PowerOfTwoGrid(layer["n1"], layer["bits"])
            state[name], grids[name] = grid.decode(onnx_codes(name, grid, arrays, model.graph.node)), grid
            parts = [x for x in sizes if re.fullmatch(re.escape(name) + r"\.(codes|levels|scale|plane.*)", x)]
            stored[name] = sum(sizes.pop(part) for part in parts)
    except Exception as error:  # of protobuf, of JSON, or whatever a foreign hand has made of our file
        raise ValueError(f"cannot be read as an ONNX file: {error}") from error
    rest = {name: torch.from_numpy(arrays[name].copy()) for name in sizes if arrays[name].dtype.kind in "fiub"}
    described = inspect_state(state | rest, grids | candidate_grids(rest), stored=stored, reference=reference)
    return Inspection("onnx", path.stat().st_size, *described)


def onnx_codes(name: str, grid: PowerOfTwoGrid, arrays: Mapping[str, Any], nodes: Iterable[Any]) -> Tensor:
    """The codes of one weight of a file that :func:`~inq_lightning.formats.onnx.export_onnx` has written.

    Args:
        name: Name of the weight.
        grid: Its grid.
        arrays: The file's initializers.
        nodes: The graph's nodes.

    Returns:
        int8 codes in the weight's shape, as :meth:`~inq_lightning.grid.PowerOfTwoGrid.encode` returns them.

    Raises:
        ValueError: The file does not have them.
    """
    if f"{name}.levels" in arrays:  # indices into a table
        return torch.from_numpy(arrays[f"{name}.codes"].astype(int) - grid.magnitudes).to(torch.int8)
    lowest = 0
    if f"{name}.codes" in arrays:
        integers = arrays[f"{name}.codes"].astype("float32")
        lowest = DEQUANTIZED[grid.bits][1] + 1 - grid.magnitudes
    elif f"{name}.plane0" in arrays:
        integers = _planes(name, arrays, nodes)
    else:
        raise ValueError(f"the file has no codes of {name}")
    mantissa, exponent = torch.frexp(torch.from_numpy(integers))
    return ((exponent - lowest) * mantissa.sign()).to(torch.int8)


def _planes(name: str, arrays: Mapping[str, Any], nodes: Iterable[Any]) -> Any:
    """The integers that MatMulNBits multiplies: the sum of its planes, each in units of its scale."""
    node = next(node for node in nodes if f"{name}.plane0" in node.input)
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    bits, integers = attributes["bits"], 0.0
    for part in (part for part in arrays if re.fullmatch(re.escape(name) + r"\.plane\d+", part)):
        plane, unit = arrays[part], arrays[f"{part}.scale"].flat[0] / arrays[f"{name}.plane0.scale"].flat[0]
        digits = np.stack([plane >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)], -1)
        digits = digits.reshape(len(plane), -1)[:, : attributes["K"]].astype(np.float32)
        integers = integers + unit * (digits - (int(arrays[f"{part}.zero"].flat[0]) & (1 << bits) - 1))
    return integers


def _read_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `torch.save` has written."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: holds objects that only code could restore, which is not run here; save the network's state_dict "
            "alone, or its checkpoint without such hyperparameters"
        ) from error
    except Exception as error:
        raise ValueError(f"{path}: is damaged: {error}") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path}: holds a {type(checkpoint).__name__}, not a checkpoint or a state_dict")
    return checkpoint


def _weights(checkpoint: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint or state_dict, without what `torch.compile` adds to names."""
    state = checkpoint.get("state_dict", checkpoint)
    tensors = {n.replace("_orig_mod.", ""): x for n, x in dict(state).items() if isinstance(x, Tensor)}
    if not tensors:
        raise ValueError(f"{path}: holds no weights: neither a checkpoint nor a state_dict")
    return tensors
