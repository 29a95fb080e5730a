"""Checkpoints of Lightning and state_dicts: what they hold, without the code that trained it."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from inq_lightning.core import state as saved_state
from inq_lightning.core.frozen import unpack_mask
from inq_lightning.core.layer import Layer, plain_name
from inq_lightning.core.schedule import Schedule
from inq_lightning.formats import accelerator, packed
from inq_lightning.formats.contents import Contents
from inq_lightning.formats.tensors import read_head
from inq_lightning.grid import from_spec

_ZIP = b"PK\x03\x04"
_EXTRA = "_extra_state"  # what torch calls it


def recognizes(head: bytes) -> bool:
    """Whether a file that begins like this may be a checkpoint or a state_dict, of torch or of safetensors."""
    zipped, pickled = head.startswith(_ZIP), head[:1] == b"\x80"  # the latter by older versions of torch
    return zipped or pickled or (_is_safetensors(head) and not any(x.recognizes(head) for x in (accelerator, packed)))


def _is_safetensors(head: bytes) -> bool:
    return head[8:9] == b"{"  # the bytes before are its header's length, and may be anything


class Withheld:
    """Stands for an object of a checkpoint that only code could restore, which is not run."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def withholding(path: str | os.PathLike[str] | None) -> AbstractContextManager[None]:
    """While torch loads this file safely, let it take a :class:`Withheld` for each object that it would refuse.

    Such are the hyperparameters of modules that are built with an optimizer to be completed, ``functools.partial``.
    """
    if path is None or not read_head(path).startswith(_ZIP):
        return nullcontext()
    unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    return torch.serialization.safe_globals([(Withheld, name) for name in unsafe])


def holds_withheld(value: Any) -> bool:
    """Whether something in a checkpoint is, or holds, what was withheld."""
    if isinstance(value, Mapping):
        return any(map(holds_withheld, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(holds_withheld, value))
    return isinstance(value, Withheld) or value is Withheld


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Load what `torch.save` or safetensors has written; no code in it is run, see :class:`Withheld`.

    Raises:
        ValueError: The file is damaged, holds what only code could restore, or is neither.
        OSError: There is no such file.
    """
    head = read_head(path)
    if not recognizes(head):
        raise ValueError(f"{path} cannot be read as a checkpoint or a state_dict: it is neither")
    try:
        if _is_safetensors(head):
            return load_file(path)
        with withholding(path):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} cannot be read as a checkpoint: it holds objects that only code could restore, which is not run "
            "here; save the network's state_dict alone, or its checkpoint without such hyperparameters"
        ) from error
    except Exception as error:  # of zip archives, of pickles, of safetensors
        raise ValueError(f"{path} cannot be read as a checkpoint: it is damaged: {error}") from error
    if holds_withheld(checkpoint.get("state_dict") if isinstance(checkpoint, dict) else checkpoint):
        raise ValueError(
            f"{path} cannot be read as a checkpoint: its state_dict holds objects that only code could restore, which "
            "is not run here; save the tensors of the state_dict alone"
        )
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint or a state_dict")
    return checkpoint


def read_checkpoint(path: str | os.PathLike[str]) -> Contents:
    """Read a Lightning checkpoint or a saved state_dict; no code in it is run.

    Only a checkpoint with the state of `INQCallback` tells layers, schedule and phase; ``metadata["left_out"]`` tells
    why the other weights are not quantized.

    Raises:
        ValueError: The file is neither, or is damaged.
        OSError: There is no such file.
    """
    checkpoint = load_checkpoint(path)
    kind = "checkpoint" if "state_dict" in checkpoint else "state_dict"
    tensors = dict(checkpoint["state_dict"] if kind == "checkpoint" else checkpoint)
    weights = {plain_name(name): value for name, value in tensors.items() if isinstance(value, Tensor)}
    extra = {plain_name(n): v for n, v in tensors.items() if n.split(".")[-1] == _EXTRA and not isinstance(v, Tensor)}
    if not weights:
        raise ValueError(f"{path} holds no weights: it is neither a Lightning checkpoint nor a state_dict")
    state = checkpoint.get("callbacks", {}).get("INQCallback") if kind == "checkpoint" else None
    if not state:
        return Contents(kind, weights, extra_state=extra)
    try:
        state = saved_state.check(state)
        masks = {name: _mask(name, layer, weights) for name, layer in state["layers"].items()}
        layers = [_layer(name, layer) for name, layer in state["layers"].items()]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    said = _said(checkpoint)
    return Contents(
        kind,
        weights,
        layers,
        off_grid=[name for name in said["left_out"] if name in weights] if said else None,
        masks=masks,
        schedule=Schedule(**state["schedule"]),
        phase=state["phase"],
        metadata=said,
        extra_state=extra,
    )


def _said(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of its network as a whole; empty where it is an older one, or says something else."""
    said = checkpoint.get("inq")
    left_out = said.get("left_out") if isinstance(said, dict) else None
    if not isinstance(said, dict) or not isinstance(left_out, dict):
        return {}
    return said if all(isinstance(text, str) for pair in left_out.items() for text in pair) else {}


def _layer(name: str, state: Mapping[str, Any]) -> Layer:
    grid = None if state["grid"] is None else from_spec(state["grid"])
    return Layer(name, tuple(state["shape"]), state["bits"], grid, state["frozen"])


def _mask(name: str, state: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Tensor:
    """Which of a layer's weights the callback has frozen."""
    if name not in weights:
        raise ValueError(
            f"the INQ state names {name}, which the file's state_dict lacks; where the module renames its weights in "
            "state_dict(), load the checkpoint into it and save it with save_packed or export_onnx in Python"
        )
    shape = weights[name].shape
    mask = unpack_mask(state["mask"], shape)
    if list(shape) != state["shape"] or int(mask.count_nonzero()) != state["frozen"]:
        raise ValueError(
            f"the INQ state has {state['frozen']} frozen weights of {state['shape']} in {name}, the file "
            f"{int(mask.count_nonzero())} of {list(shape)}; they do not belong together"
        )
    return mask
