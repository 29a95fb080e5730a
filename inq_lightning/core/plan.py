"""What a run will do to a network, told before it begins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.parameter import UninitializedParameter

from inq_lightning._common import import_extra
from inq_lightning.core.frozen import frozen_count
from inq_lightning.core.layer import plain_name
from inq_lightning.core.schedule import Schedule, Unit
from inq_lightning.core.selection import Selected
from inq_lightning.report.metrics import BitsPerWeight

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True)
class PlannedLayer:
    """One parameter that will be quantized.

    Attributes:
        name: Name of the parameter.
        shape: Its shape.
        bits: Code length of one weight.
        numel: Number of weights.
        kept: How many of them are zero already and stay so (``keep_zeros``); portions count the others.
        frozen: How many are frozen once each phase has begun, kept zeros included; one number a phase.
    """

    name: str
    shape: tuple[int, ...]
    bits: int
    numel: int
    kept: int
    frozen: tuple[int, ...]


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
    """What will happen to a network, and when; :func:`dataclasses.asdict` makes plain JSON values of it.

    Attributes:
        layers: The parameters that will be quantized, in the module's order.
        phases: The phases, in the order of time.
        unit: What the phases' starts count, ``"epoch"`` or ``"step"``.
        floating: The parameters that stay in floating point, in the module's order.
        bytes_before: Size of all parameters as they are in memory.
        bytes_after: The same with every quantized parameter at its bits a weight.
    """

    layers: tuple[PlannedLayer, ...]
    phases: tuple[PlannedPhase, ...]
    unit: Unit
    floating: tuple[FloatingTensor, ...]
    bytes_before: int
    bytes_after: int

    @classmethod
    def of(cls, module: nn.Module, selected: Sequence[Selected], schedule: Schedule, keep_zeros: bool = False) -> Plan:
        """Work out the plan; nothing changes.

        Args:
            module: The network.
            selected: What :func:`~inq_lightning.core.selection.select_parameters` selects of it.
            schedule: The schedule, spread over the run where its length is known.
            keep_zeros: Whether weights that are zero now stay zero, see :class:`~inq_lightning.INQCallback`.

        Raises:
            ValueError: A parameter has no shape yet.
        """
        layers = tuple(_planned(s, schedule, keep_zeros) for s in selected)
        total = sum(layer.numel for layer in layers)
        starts: Sequence[int | None] = schedule.starts or [None] * len(schedule.portions)
        frozen = [sum(counts) for counts in zip(*(layer.frozen for layer in layers), strict=True)]
        widths = {layer.name: layer.bits for layer in layers}
        before, after, floating = BitsPerWeight(), BitsPerWeight(), []
        for name, parameter in module.named_parameters():
            name = plain_name(name)
            if isinstance(parameter, UninitializedParameter):
                raise ValueError(f"{name} belongs to a lazy layer and has no size yet; run one batch through it first")
            before.update(parameter.detach())
            after.update(parameter.detach(), widths.get(name))
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
            bytes_before=(int(before.bits) + 7) // 8,
            bytes_after=(int(after.bits) + 7) // 8,
        )

    def table(self) -> Group:
        """The plan as tables for a terminal."""
        table = import_extra("rich.table", "train").Table
        escape = import_extra("rich.markup", "train").escape

        layers = table(title="Selected layers")
        zeros = any(layer.kept for layer in self.layers)
        layers.add_column("layer", overflow="fold")
        for column in ("shape", "bits", "weights", *(["zeros that stay"] if zeros else [])):
            layers.add_column(column, justify="right")
        for layer in self.layers:
            kept = [f"{layer.kept:,}"] if zeros else []
            layers.add_row(escape(layer.name), _shape(layer.shape), str(layer.bits), f"{layer.numel:,}", *kept)

        phases = table(title="Phases")
        for column in ("phase", f"begins at {self.unit}", "portion", "weights frozen", "of them new", "fraction"):
            phases.add_column(column, justify="right")
        before = 0
        for number, phase in enumerate(self.phases, 1):
            start = "?" if phase.start is None else str(phase.start)
            counts = f"{phase.frozen:,}", f"{phase.frozen - before:,}", f"{phase.fraction:.6g}"
            phases.add_row(str(number), start, f"{phase.portion:g}", *counts)
            before = phase.frozen

        # Biases and norms go without saying; a whole matrix or kernel that stays is worth its name.
        large = [escape(tensor.name) for tensor in self.floating if len(tensor.shape) > 1]
        size = table(title="Size of all parameters", show_header=False)
        size.add_column("")
        size.add_column("", justify="right", overflow="fold")
        size.add_row("weights to quantize", f"{sum(layer.numel for layer in self.layers):,}")
        size.add_row("in floating point", f"{sum(math.prod(tensor.shape) for tensor in self.floating):,}")
        if large:
            size.add_row("among these", ", ".join(large))
        size.add_row("bytes before", f"{self.bytes_before:,}")
        size.add_row("bytes after", f"{self.bytes_after:,}")
        group: Group = import_extra("rich.console", "train").Group(layers, phases, size)
        return group


def _planned(selected: Selected, schedule: Schedule, keep_zeros: bool) -> PlannedLayer:
    weight, numel, kept = selected.parameter.detach(), selected.parameter.numel(), 0
    if keep_zeros:
        pruned = weight if selected.pruning_mask is None else weight * selected.pruning_mask
        kept = int((pruned == 0).count_nonzero())
    counts = tuple(frozen_count(portion, numel, kept) for portion in schedule.portions)
    return PlannedLayer(selected.name, tuple(weight.shape), selected.bits, numel, kept, counts)


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))
