"""What a checkpoint tells about a quantized network, without the code that trained it."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from inq_lightning.core import state as saved_state
from inq_lightning.core.schedule import Schedule


class LayerRecord(NamedTuple):
    """What a checkpoint says about one quantized parameter.

    Attributes:
        name: Name of the parameter.
        bits: Code length of one weight.
        n1: Exponent of the largest level; None for a layer of zeros.
    """

    name: str
    bits: int
    n1: int | None


class Checkpoint(NamedTuple):
    """What :func:`read_checkpoint` returns.

    Attributes:
        state_dict: The tensors, by the names that the trained module gives them.
        layers: One record for each quantized parameter; None where the file tells only the weights.
        schedule: What the network was quantized under; None likewise.
    """

    state_dict: dict[str, Tensor]
    layers: list[LayerRecord] | None
    schedule: Schedule | None


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a Lightning checkpoint or a saved state_dict; no code in it is run.

    Raises:
        ValueError: The file is neither, or is damaged.
        OSError: There is no such file.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a checkpoint or a state_dict: {error}") from error
    weights = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else None
    if not isinstance(weights, dict) or not any(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"{path} holds no weights: it is neither a Lightning checkpoint nor a state_dict")
    state = checkpoint.get("callbacks", {}).get("INQCallback") if weights is not checkpoint else None
    if not state:
        return Checkpoint(weights, None, None)
    schedule = saved_state.check(state)
    layers = [LayerRecord(name, layer["bits"], layer["n1"]) for name, layer in state["layers"].items()]
    return Checkpoint(weights, layers, schedule)
