"""What a file of any format holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from inq_lightning.core.layer import Layer
from inq_lightning.core.schedule import Schedule


@dataclass(frozen=True)
class Contents:
    """What every reader of a file returns.

    Attributes:
        kind: What the file is: ``"checkpoint"`` (of Lightning), ``"state_dict"``, or a format of `inq-export`.
        state_dict: The tensors by name, quantized ones decoded, tied ones sharing their memory.
        layers: One record for each quantized parameter; serves as ``layers`` wherever `INQCallback.layers` does. None
            where the file tells only the weights.
        off_grid: Names of weights that could be quantized and are on no grid; None where the file does not tell.
        masks: bool, True where a weight is frozen, by name; what has none is frozen everywhere.
        stored: Size of a weight's codes in the file, in bytes, by name; empty where it stores floats.
        schedule: What the network was quantized under; None where the file does not tell.
        phase: How many portions had begun; None likewise.
        metadata: What else the file says about itself.
        extra_state: What the network's state_dict holds besides tensors, by name.
    """

    kind: str
    state_dict: dict[str, Tensor]
    layers: list[Layer] | None = None
    off_grid: Sequence[str] | None = None
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    stored: Mapping[str, int] = field(default_factory=dict)
    schedule: Schedule | None = None
    phase: int | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    extra_state: Mapping[str, Any] = field(default_factory=dict)
