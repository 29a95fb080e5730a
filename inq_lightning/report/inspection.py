"""What a file holds: on which grids its weights lie, how they spread over them, what that saves."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from inq_lightning.core.activation import PowerOfTwoActivation
from inq_lightning.core.activations import is_saved_activation
from inq_lightning.core.flow import INPUT
from inq_lightning.core.layer import Layer
from inq_lightning.core.schedule import Schedule
from inq_lightning.core.size import bytes_at, signal_and_noise, snr_db
from inq_lightning.formats.contents import Contents
from inq_lightning.formats.layers import off_grid
from inq_lightning.formats.registry import read_file
from inq_lightning.formats.tensors import memory, place
from inq_lightning.grid import Grid, PowerOfTwoGrid, fit_grid
from inq_lightning.grid.base import span
from inq_lightning.report.plots import Exponents, exponent_heatmap

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class InspectedLayer(Layer):
    """One weight tensor of a file.

    Attributes:
        bits: Code length of one weight; None where the tensor is not quantized.
        zeros: Share of zeros among the frozen weights, 0 to 1; None where there are none.
        exponents: Share of the frozen weights from ±2^k to below ±2^(k+1), by k, of all k that the grid has; empty
            where there are none.
        snr_db: 10·log10 of the power of the original weights over that of the differences from them, of the frozen
            weights, in dB; inf where nothing differs; None where no original is known.
        bytes_before: Size in memory.
        bytes_after: Size in the file where that stores codes; elsewhere what they would take at ``bits`` a weight, once
            all are frozen.
    """

    bits: int | None = None  # type: ignore[assignment]  # of a Layer, which is quantized or will be, it is known
    zeros: float | None = None
    exponents: dict[int, float] = field(default_factory=dict)
    snr_db: float | None = None
    bytes_before: int = 0
    bytes_after: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values; an SNR that is infinite becomes null, as JSON has no infinity."""
        finite = self.snr_db if self.snr_db is not None and math.isfinite(self.snr_db) else None
        return super().as_dict() | {"n1": self.n1, "n2": self.n2, "snr_db": finite}


class InspectedActivation(NamedTuple):
    """Where activations are rounded, and how.

    Attributes:
        name: The layer behind which, or before whose input.
        before: Whether it is the layer's input.
        bits: Code length of one value.
        signed: Whether there are negative codes.
        exponent: Of the step; None where it is not calibrated yet.
    """

    name: str
    before: bool
    bits: int
    signed: bool
    exponent: int | None

    @classmethod
    def of(cls, name: str, grid: Tensor) -> InspectedActivation:
        """Read what a state_dict keeps of it."""
        activation = PowerOfTwoActivation.of(grid)
        holder, _, attribute = name.removesuffix(".grid").rpartition(".")
        return cls(holder, attribute == INPUT, activation.bits, activation.signed, activation.exponent)


@dataclass(frozen=True)
class Inspection:
    """What a file holds.

    Attributes:
        kind: ``"checkpoint"`` (of Lightning), ``"state_dict"``, ``"packed"``, ``"onnx"``, ``"mxfp4"``, ``"mxfp6"``,
            ``"fp8"`` or ``"int8"``.
        file_bytes: Size of the file itself.
        layers: The network's matrices of weights, in the file's order, those included that are not quantized. Where the
            file does not tell which they are, all tensors of two dimensions or more.
        other_bytes: Size of all other tensors: biases, norms, buffers.
        reasons: Why weights are not quantized, by name, where the file tells.
        schedule: Portions, starts and unit of the run; None where the file does not tell.
        phase: How many portions had begun; None where the file does not tell.
        activations: Where activations are rounded, and how.
        integer: What the network in whole numbers takes, see :attr:`~inq_lightning.IntegerNetwork.summary`; None where
            the file has none.
    """

    kind: str
    file_bytes: int
    layers: tuple[InspectedLayer, ...]
    other_bytes: int
    reasons: Mapping[str, str] = field(default_factory=dict)
    schedule: Schedule | None = None
    phase: int | None = None
    activations: tuple[InspectedActivation, ...] = ()
    integer: Mapping[str, int] | None = None

    @property
    def fully_quantized(self) -> bool:
        """Whether every weight of every matrix of the network is on its grid."""
        return bool(self.layers) and all(layer.frozen == layer.numel for layer in self.layers)

    @property
    def quantized_fraction(self) -> float:
        """Share of the layers' weights that are on their grids, 0 to 1."""
        return sum(layer.frozen for layer in self.layers) / max(1, sum(layer.numel for layer in self.layers))

    @property
    def left_out(self) -> dict[str, str]:
        """The matrices that are not quantized, by name, with the reason; empty where the file does not tell it."""
        return {layer.name: self.reasons.get(layer.name, "") for layer in self.layers if layer.bits is None}

    @property
    def bytes_before(self) -> int:
        """Size of all tensors in memory."""
        return self.other_bytes + sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """The same with every quantized layer at its bits a weight."""
        return self.other_bytes + sum(layer.bytes_after for layer in self.layers)

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        derived = ("fully_quantized", "quantized_fraction", "left_out", "bytes_before", "bytes_after")
        values = asdict(self) | {"layers": [layer.as_dict() for layer in self.layers]}
        values["integer"] = None if self.integer is None else dict(self.integer)
        del values["reasons"]  # left_out has them
        return values | {name: getattr(self, name) for name in derived}

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
                layers[layer.name] = Exponents(counts, grid=layer.grid)
        if not layers:
            raise ValueError("no layer is quantized, so there are no exponents to draw")
        return exponent_heatmap(layers)


def inspect_file(path: str | Path, reference: str | Path | None = None) -> Inspection:
    """Describe a file: a Lightning checkpoint, a state_dict, or what `inq-export` writes.

    What it is, its content tells, not its name. Nothing in it is executed. Only a checkpoint with the state of
    `INQCallback` and files of `inq-export` say which weights were quantized, at how many bits; elsewhere the weights
    tell by themselves: all of two dimensions or more count, and the bits are the fewest whose grid holds them.

    Args:
        path: The file.
        reference: A file of the full-precision network, for the SNR.

    Raises:
        ValueError: One of the files is of no known format, or is damaged, or they belong to different networks.
        OSError: One of the files cannot be read.
        ImportError: ONNX is needed and is not installed.
    """
    original = None if reference is None else read_file(reference).state_dict
    contents = read_file(path)
    try:
        layers, other = inspect_state(
            contents.state_dict,
            _grids(contents),
            frozen=contents.masks,
            stored=contents.stored,
            reference=original,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return Inspection(
        kind=contents.kind,
        file_bytes=Path(path).stat().st_size,
        layers=layers,
        other_bytes=other,
        reasons=contents.metadata.get("left_out", {}),
        schedule=contents.schedule,
        phase=contents.phase,
        activations=tuple(
            InspectedActivation.of(name, tensor)
            for name, tensor in contents.state_dict.items()
            if is_saved_activation(name)
        ),
        integer=None if contents.integer is None else contents.integer.program.get("summary"),
    )


def _grids(contents: Contents) -> dict[str, Grid | None]:
    """The grids that the file tells, and, where it does not tell all, those that the other matrices tell."""
    # A layer of which nothing is frozen yet has a width, but no exponents.
    told: dict[str, Grid | None] = {
        layer.name: layer.grid or PowerOfTwoGrid(None, layer.bits) for layer in contents.layers or ()
    }
    if contents.off_grid is not None:
        return told | dict.fromkeys(contents.off_grid)
    others = off_grid(contents.state_dict, told)
    return told | {name: fit_grid(contents.state_dict[name]) for name in others if name not in told}


def inspect_layer(
    name: str,
    weight: Tensor,
    grid: Grid | None,
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
        ValueError: ``reference`` has another shape, or frozen weights are not on the grid.
    """
    if reference is not None and reference.shape != weight.shape:
        raise ValueError(
            f"{name} has the shape {tuple(weight.shape)}, but {tuple(reference.shape)} in the reference; give the "
            "full-precision file of the same network"
        )
    shape, numel, before = tuple(weight.shape), weight.numel(), memory([weight])
    if grid is None:
        return InspectedLayer(name, shape, bytes_before=before, bytes_after=before)
    chosen = weight.reshape(-1) if frozen is None else weight[frozen]
    codes = grid.encode(chosen.nan_to_num())
    off = int((grid.decode(codes, weight.dtype) != chosen).count_nonzero())
    if off:
        raise ValueError(
            f"{name}: {off} weights that the saved state calls frozen are not on its grid; the state and the weights "
            "do not belong together"
        )
    zeros, exponents = _shares(grid, codes) if chosen.numel() else (None, {})
    snr = None
    if reference is not None and chosen.numel():
        original = reference.reshape(-1) if frozen is None else reference[frozen]
        snr = float(snr_db(*signal_and_noise(original, chosen)))
    after = bytes_at(numel, grid.bits) if chosen.numel() == numel else before
    return InspectedLayer(
        name=name,
        shape=shape,
        bits=grid.bits,
        grid=grid if chosen.numel() else None,
        frozen=chosen.numel(),
        zeros=zeros,
        exponents=exponents,
        snr_db=snr,
        bytes_before=before,
        bytes_after=after if stored is None else stored,
    )


def _shares(grid: Grid, codes: Tensor) -> tuple[float, dict[int, float]]:
    """Shares of the zeros and of each exponent among codes."""
    places = span(grid.codes)
    found = torch.bincount(codes.int() - places.start, minlength=len(places)).tolist()
    zeros, counts = 0, Counter[int]()
    for multiple, count in zip(grid.multiples(torch.tensor(places)).tolist(), found, strict=True):
        if multiple:
            counts[math.frexp(multiple)[1] - 1 + grid.step] += count
        else:
            zeros += count
    return zeros / codes.numel(), {k: counts[k] / codes.numel() for k in sorted(counts)}


def inspect_state(
    state: Mapping[str, Tensor],
    grids: Mapping[str, Grid | None],
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
        if (where := place(name, tensor)) in seen:
            continue
        seen.add(where)
        if name not in grids:
            other += memory([tensor])
            continue
        if reference is not None and name not in reference:
            raise ValueError(f"the reference has no {name}; give the full-precision file of the same network")
        original = None if reference is None else reference[name]
        layers.append(
            inspect_layer(name, tensor, grids[name], (frozen or {}).get(name), original, (stored or {}).get(name))
        )
    return tuple(layers), other
