"""What a file of any format holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from inq_lightning.core.layer import Layer
from inq_lightning.core.schedule import Schedule


class Record(NamedTuple):
    """A network of whole numbers as an artifact keeps it beside the weights.

    Attributes:
        program: Its operations, as plain JSON values.
        tensors: What they need besides the weights, by name.
        weights: The weights that it was made of, float64, by parameter; empty in what was read.
    """

    program: dict[str, Any]
    tensors: dict[str, Tensor]
    weights: Mapping[str, Tensor] = {}


class Recordable(Protocol):
    """What an artifact can keep beside the weights: an :class:`~inq_lightning.IntegerNetwork`."""

    def record(self) -> Record:
        """It without the weights."""


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
        integer: The network in whole numbers; None where the file has none.
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
    integer: Record | None = None
