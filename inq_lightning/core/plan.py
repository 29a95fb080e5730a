"""What a run will do to a network, told before it begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from torch.nn.parameter import UninitializedParameter

from inq_lightning.core import sharding
from inq_lightning.core.coverage import Coverage
from inq_lightning.core.frozen import fit_levels, frozen_count
from inq_lightning.core.layer import Layer, plain_name
from inq_lightning.core.schedule import Schedule, Unit
from inq_lightning.core.selection import Selected, Selection
from inq_lightning.core.size import size_of
from inq_lightning.grid import Underflow
from inq_lightning.grid.levels import LevelsLike, plain


@dataclass(frozen=True)
class PlannedLayer(Layer):
    """One parameter that will be quantized.

    Attributes:
        levels: Its levels, see :class:`~inq_lightning.Options`.
        kept: How many of its weights are zero already and stay so (``keep_zeros``); portions count the others.
        counts: How many are frozen once each phase has begun, kept zeros included.
    """

    levels: LevelsLike = "paper"
    kept: int = 0
    counts: tuple[int, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values; ``frozen`` has one number a phase."""
        values = super().as_dict()
        return values | {"frozen": list(values.pop("counts")), "levels": plain(self.levels)}


@dataclass(frozen=True)
class PlannedPhase:
    """One rise of the quantized portion.

    Attributes:
        portion: Accumulated portion of the schedule.
        start: Epoch or step at which the phase begins, counted from 0; None while the length of the run is unknown.
        frozen: How many weights are frozen from then on, all layers together.
        fraction: The same as a share of the selected weights: `INQCallback.quantized_fraction` during the phase.
    """

    portion: float
    start: int | None
    frozen: int
    fraction: float


@dataclass(frozen=True)
class FloatingTensor:
    """One parameter that stays as it is.

    Attributes:
        name: Name of the parameter.
        shape: Its shape.
    """

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """What will happen to a network, and when.

    Attributes:
        layers: The parameters that will be quantized, in the module's order.
        phases: The phases, in the order of time.
        unit: What the phases' starts count, ``"epoch"`` or ``"step"``.
        floating: The parameters that stay in floating point, in the module's order.
        coverage: How much of the network's matrices of weights will be quantized, and why the others will not.
        bytes_before: Size of all parameters as they are in memory.
        bytes_after: The same with every quantized parameter at its bits a weight.
    """

    layers: tuple[PlannedLayer, ...]
    phases: tuple[PlannedPhase, ...]
    unit: Unit
    floating: tuple[FloatingTensor, ...]
    coverage: Coverage
    bytes_before: int
    bytes_after: int

    @classmethod
    def of(
        cls,
        module: nn.Module,
        selected: Selection,
        schedule: Schedule,
        keep_zeros: bool = False,
        underflow: Underflow = "nearest",
    ) -> Plan:
        """Work out the plan; nothing changes.

        Args:
            module: The network.
            selected: What :func:`~inq_lightning.core.selection.select_parameters` selects of it.
            schedule: The schedule, spread over the run where its length is known.
            keep_zeros: Whether weights that are zero now stay zero, see :class:`~inq_lightning.INQCallback`.
            underflow: What becomes of weights below the smallest level.

        Raises:
            ValueError: A parameter has no shape yet.
        """
        layers = tuple(_planned(s, schedule, keep_zeros, underflow) for s in selected)
        total = sum(layer.numel for layer in layers)
        starts: Sequence[int | None] = schedule.starts or [None] * len(schedule.portions)
        frozen = [sum(counts) for counts in zip(*(layer.counts for layer in layers), strict=True)]
        widths = {layer.name: layer.bits for layer in layers}
        floating = []
        for name, parameter in module.named_parameters():
            name = plain_name(name)
            if isinstance(parameter, UninitializedParameter):
                raise ValueError(f"{name} belongs to a lazy layer and has no size yet; run one batch through it first")
            if name not in widths:
                floating.append(FloatingTensor(name, tuple(parameter.shape)))
        return cls(
            layers=layers,
            phases=tuple(
                PlannedPhase(portion, start, count, count / total)
                for portion, start, count in zip(schedule.portions, starts, frozen, strict=True)
            ),
            unit=schedule.unit,
            floating=tuple(floating),
            coverage=selected.coverage,
            bytes_before=size_of(module).bytes,
            bytes_after=size_of(module, widths).bytes,
        )

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return asdict(self) | {"layers": [layer.as_dict() for layer in self.layers]}


def _planned(selected: Selected, schedule: Schedule, keep_zeros: bool, underflow: Underflow) -> PlannedLayer:
    weight, numel, kept = selected.parameter.detach(), selected.parameter.numel(), 0
    reduce = sharding.reduction(weight)
    levels = fit_levels(sharding.local(weight), selected.bits, selected.levels, underflow == "truncate", reduce)
    if keep_zeros:
        pruned = weight if selected.pruning_mask is None else weight * selected.pruning_mask
        kept = int((pruned == 0).count_nonzero())
    counts = tuple(frozen_count(portion, numel, kept) for portion in schedule.portions)
    return PlannedLayer(selected.name, tuple(weight.shape), selected.bits, levels=levels, kept=kept, counts=counts)
