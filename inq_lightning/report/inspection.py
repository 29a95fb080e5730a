"""What is known of a network's weights: on which grids they lie, how they spread over them, what that saves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inq_lightning._common import import_extra
from inq_lightning.core.schedule import Schedule
from inq_lightning.grid import PowerOfTwoGrid
from inq_lightning.report.metrics import SignalToQuantizationNoise
from inq_lightning.report.plots import Exponents, exponent_heatmap

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Group

_BARS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class InspectedLayer:
    """One weight tensor.

    Attributes:
        name: Its name in the file.
        shape: Its shape.
        numel: Number of weights.
        bits: Code length of one weight; None where the tensor is not quantized.
        n1: Exponent of the largest level; None without a grid, and for a tensor of zeros.
        n2: Exponent of the smallest level; None likewise.
        frozen: How many weights are on the grid for good.
        zeros: Share of zeros among these, 0 to 1; None where there are none.
        exponents: Share of ±2^k among these, by k from n2 to n1; empty where there are none.
        snr_db: 10·log10 of the power of the original weights over that of the differences from them, of the frozen
            weights, in dB; inf where nothing differs; None where no original is known.
        bytes_before: Size in memory.
        bytes_after: Size in the file where that stores codes; elsewhere what they would take at ``bits`` a weight, once
            all are frozen.
    """

    name: str
    shape: tuple[int, ...]
    numel: int
    bits: int | None = None
    n1: int | None = None
    n2: int | None = None
    frozen: int = 0
    zeros: float | None = None
    exponents: dict[int, float] = field(default_factory=dict)
    snr_db: float | None = None
    bytes_before: int = 0
    bytes_after: int = 0


@dataclass(frozen=True)
class Inspection:
    """What a file holds.

    Attributes:
        kind: ``"checkpoint"`` (of Lightning), ``"state_dict"``, ``"packed"`` or ``"onnx"``.
        file_bytes: Size of the file itself.
        layers: The weights that INQ is about, in the file's order.
        other_bytes: Size of all other tensors: biases, norms, buffers, what was left out of the quantization.
        schedule: Portions, starts and unit of the run; None where the file does not tell.
        phase: How many portions had begun; None where the file does not tell.
    """

    kind: str
    file_bytes: int
    layers: tuple[InspectedLayer, ...]
    other_bytes: int
    schedule: Schedule | None = None
    phase: int | None = None

    @property
    def fully_quantized(self) -> bool:
        """Whether every weight of every layer is on its grid."""
        return bool(self.layers) and all(layer.frozen == layer.numel for layer in self.layers)

    @property
    def quantized_fraction(self) -> float:
        """Share of the layers' weights that are on their grids, 0 to 1."""
        return sum(layer.frozen for layer in self.layers) / max(1, sum(layer.numel for layer in self.layers))

    @property
    def bytes_before(self) -> int:
        """Size of all tensors in memory."""
        return self.other_bytes + sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """The same with every quantized layer at its bits a weight."""
        return self.other_bytes + sum(layer.bytes_after for layer in self.layers)

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values; an SNR that is infinite becomes null, as JSON has no infinity."""
        fields = asdict(self)
        for layer in fields["layers"]:
            if layer["snr_db"] is not None and not math.isfinite(layer["snr_db"]):
                layer["snr_db"] = None
        derived = ("fully_quantized", "quantized_fraction", "bytes_before", "bytes_after")
        return fields | {name: getattr(self, name) for name in derived}

    def figure(self) -> Figure:
        """A heat map: a row for each quantized layer, a column for each exponent.

        Raises:
            ValueError: No layer is quantized.
        """
        layers = {}
        for layer in self.layers:
            if layer.frozen and layer.zeros is not None:
                shares: list[tuple[int | None, float]] = [(None, layer.zeros), *layer.exponents.items()]
                counts = {k: round(share * layer.frozen) for k, share in shares if share}
                layers[layer.name] = Exponents(counts, n1=layer.n1, n2=layer.n2)
        if not layers:
            raise ValueError("no layer is quantized, so there are no exponents to draw")
        return exponent_heatmap(layers)

    def table(self) -> Group:
        """The inspection as aligned text, in a terminal or a file; one row a layer."""
        grid = import_extra("rich.table", "train").Table
        escape = import_extra("rich.markup", "train").escape
        partial = any(0 < layer.frozen < layer.numel for layer in self.layers)
        snr = any(layer.snr_db is not None for layer in self.layers)

        layers = grid(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
        layers.add_column("layer", overflow="fold")
        for column in ("shape", "bits", *(["frozen"] if partial else []), "zeros", "n2"):
            layers.add_column(column, justify="right")
        layers.add_column("shares", no_wrap=True)
        for column in ("n1", *(["SNR/dB"] if snr else []), "before/B", "after/B"):
            layers.add_column(column, justify="right")
        for layer in self.layers:
            layers.add_row(
                escape(layer.name),
                "×".join(map(str, layer.shape)),
                _text(layer.bits),
                *([f"{layer.frozen / max(1, layer.numel):.1%}"] if partial else []),
                _text(layer.zeros, ".1%"),
                _text(layer.n2),
                _bars(list(layer.exponents.values())),
                _text(layer.n1),
                *([_text(layer.snr_db, ".1f")] if snr else []),
                f"{layer.bytes_before:,}",
                f"{layer.bytes_after:,}",
            )

        summary = grid(box=None, pad_edge=False, show_header=False)
        summary.add_column("")
        summary.add_column("", overflow="fold")
        summary.add_row("kind", self.kind)
        if self.schedule is not None:
            summary.add_row("portions", ", ".join(f"{portion:g}" for portion in self.schedule.portions))
            if self.schedule.starts is not None:
                starts = ", ".join(map(str, self.schedule.starts))
                summary.add_row("starts", f"{starts} ({self.schedule.unit}s)")
            if self.phase is not None:
                summary.add_row("phase", f"{self.phase} of {len(self.schedule.portions)}")
        summary.add_row("quantized fraction", f"{self.quantized_fraction:.6g}")
        summary.add_row("fully quantized", "yes" if self.fully_quantized else "no")
        summary.add_row("all tensors", f"{self.bytes_before:,} bytes before, {self.bytes_after:,} after")
        summary.add_row("file", f"{self.file_bytes:,} bytes")
        group: Group = import_extra("rich.console", "train").Group(layers, "", summary)
        return group


def inspect_layer(
    name: str,
    weight: Tensor,
    grid: PowerOfTwoGrid | None,
    frozen: Tensor | None = None,
    reference: Tensor | None = None,
    stored: int | None = None,
) -> InspectedLayer:
    """Describe one weight tensor.

    Args:
        name: Its name.
        weight: Floating-point weights of any shape.
        grid: Its grid; None where it has none.
        frozen: bool of the same shape, True where a weight is on the grid for good; None: everywhere.
        reference: The original weights, same shape; None where they are unknown.
        stored: How many bytes its codes take in the file; None where it stores floats.

    Raises:
        ValueError: ``reference`` has another shape.
    """
    if reference is not None and reference.shape != weight.shape:
        raise ValueError(
            f"{name} has the shape {tuple(weight.shape)}, but {tuple(reference.shape)} in the reference; give the "
            "full-precision file of the same network"
        )
    numel = weight.numel()
    before = numel * weight.element_size()
    if grid is None:
        return InspectedLayer(name, tuple(weight.shape), numel, bytes_before=before, bytes_after=before)
    chosen = weight.reshape(-1) if frozen is None else weight[frozen]
    counts = torch.bincount(grid.encode(chosen).abs().int(), minlength=1 + grid.magnitudes).tolist()
    total = max(1, chosen.numel())
    after = (numel * grid.bits + 7) // 8 if chosen.numel() == numel else before
    snr = None
    if reference is not None and chosen.numel():
        metric = SignalToQuantizationNoise()
        metric.update(reference.reshape(-1) if frozen is None else reference[frozen], chosen)
        snr = float(metric.compute())
    return InspectedLayer(
        name=name,
        shape=tuple(weight.shape),
        numel=numel,
        bits=grid.bits,
        n1=grid.n1,
        n2=grid.n2,
        frozen=chosen.numel(),
        zeros=counts[0] / total if chosen.numel() else None,
        exponents={} if grid.n2 is None else {grid.n2 + k: count / total for k, count in enumerate(counts[1:])},
        snr_db=snr,
        bytes_before=before,
        bytes_after=after if stored is None else stored,
    )


def inspect_state(
    state: Mapping[str, Tensor],
    grids: Mapping[str, PowerOfTwoGrid | None],
    *,
    frozen: Mapping[str, Tensor] | None = None,
    stored: Mapping[str, int] | None = None,
    reference: Mapping[str, Tensor] | None = None,
) -> tuple[tuple[InspectedLayer, ...], int]:
    """Describe the tensors of a network.

    Args:
        state: The tensors by name.
        grids: The layers' grids, see :func:`~inq_lightning.formats.layers.candidate_grids`.
        frozen: See :func:`inspect_layer`, by name; what has none is frozen everywhere.
        stored: See :func:`inspect_layer`, by name.
        reference: The full-precision network's tensors by name; None where they are unknown.

    Returns:
        The layers, and the size of all other tensors in bytes. A tensor under two names counts once.

    Raises:
        ValueError: ``reference`` is of another network.
    """
    layers, other, seen = [], 0, set()
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        if name not in grids:
            other += tensor.numel() * tensor.element_size()
            continue
        if reference is not None and name not in reference:
            raise ValueError(f"the reference has no {name}; give the full-precision file of the same network")
        original = None if reference is None else reference[name]
        layers.append(
            inspect_layer(name, tensor, grids[name], (frozen or {}).get(name), original, (stored or {}).get(name))
        )
    return tuple(layers), other


def _text(value: float | None, form: str = "") -> str:
    return "" if value is None else format(value, form)


def _bars(shares: Sequence[float]) -> str:
    """A bar for each share, the highest one full; only zero has none."""
    highest = max(shares, default=0.0)
    return "".join(_BARS[math.ceil(share / highest * 8)] if share else _BARS[0] for share in shares)
