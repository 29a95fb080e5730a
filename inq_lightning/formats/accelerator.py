"""Lossless conversion of quantized weights to the number formats that accelerators multiply.

Zero and ±2^k are exact in every floating-point format whose exponents reach far enough, so a grid of few bits fits:

====== ============================================== ======== =============
format a weight is                                    max bits bits a weight
====== ============================================== ======== =============
mxfp4  E2M1 × an E8M0 scale for each block of 32      4        4.25
mxfp6  E3M2 × an E8M0 scale for each block of 32      5        6.25
fp8    E4M3 × one power of two for the tensor         6        8
int8   ±1, ±2, ±4, ±8 × one power of two              4        8
====== ============================================== ======== =============

E2M1, E3M2, E8M0 and the blocks are those of the OCP Microscaling Formats (MX) specification, version 1.0. Every
conversion is decoded again and compared with the weights; -0.0 becomes 0.0.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from inq_lightning._common import atomic, one_of
from inq_lightning.core.layer import Layer
from inq_lightning.formats.contents import Contents
from inq_lightning.formats.layers import find_grids, grids_in_state
from inq_lightning.formats.tensors import NAMES, dtype_name, memory, plain_tensors, untie
from inq_lightning.grid import Grid, from_spec
from inq_lightning.grid.base import largest_multiple, table_order
from inq_lightning.grid.recognize import encode

FormatName = Literal["mxfp4", "mxfp6", "fp8", "int8"]

BLOCK = 32  # weights that share a scale in the MX formats
E8M0_BIAS = 127

_KEY = "inq_accelerator"
_VERSION = 2


class NumberFormat(NamedTuple):
    """One number format.

    Attributes:
        name: Its name in :data:`NUMBER_FORMATS`.
        max_bits: Largest bit width whose grids fit.
        bits_per_weight: Size of a weight in a file, the scales of whole blocks included.
        element_bits: Size of one element.
        mantissa_bits: Mantissa bits of one element; None where it is an integer.
    """

    name: FormatName
    max_bits: int
    bits_per_weight: float
    element_bits: int
    mantissa_bits: int | None

    @property
    def in_blocks(self) -> bool:
        """Whether blocks of 32 weights have scales of their own, as in the MX formats."""
        return self.element_bits < 8

    @property
    def exponent_bits(self) -> int:
        """Exponent bits of one element; 0 where it is an integer."""
        return 0 if self.mantissa_bits is None else self.element_bits - 1 - self.mantissa_bits

    @property
    def bias(self) -> int:
        """What is taken from an element's exponent field."""
        return (1 << self.exponent_bits - 1) - 1


NUMBER_FORMATS: dict[str, NumberFormat] = {
    target.name: target
    for target in (
        NumberFormat("mxfp4", 4, 4.25, 4, 1),
        NumberFormat("mxfp6", 5, 6.25, 6, 2),
        NumberFormat("fp8", 6, 8.0, 8, 3),
        NumberFormat("int8", 4, 8.0, 8, None),
    )
}


def save_accelerator(
    model: nn.Module,
    path: str | os.PathLike[str],
    format: FormatName,  # noqa: A002
    *,
    layers: Iterable[Layer] | None = None,
    allow_partial: bool = False,
) -> None:
    """Write a quantized network as a safetensors file with its weights in an accelerator's number format.

    A quantized weight ``NAME`` of the MX formats becomes ``NAME_packed`` (uint8 elements) and ``NAME_scale`` (uint8,
    E8M0); one of ``fp8`` or ``int8`` becomes ``NAME`` (float8_e4m3fn or int8, its own shape) and ``NAME_scale``
    (float32, shape (1,)). All other tensors are stored as they are. The layout of the MX formats:

    - Dimensions after the first are flattened, so that blocks lie along what a product sums over: a convolution of
      shape (out, in, h, w) has rows of in·h·w weights. Each row is filled up with zeros to whole blocks of 32.
    - Elements are a little-endian stream of bits: the first one is in the lowest bits of the first byte. Two E2M1 are
      a byte (the even one in the low nibble), four E3M2 are three bytes. Shape (rows, 16 or 24 times blocks).
    - A scale byte e stands for 2^(e - 127). Shape (rows, blocks).

    The file is read back and compared with the weights before it gets its name.

    Args:
        model: The network, on any device.
        path: The file to write.
        format: A key of :data:`NUMBER_FORMATS`.
        layers: `INQCallback.layers`; left out, the weights tell by themselves which grids they are on.
        allow_partial: Whether to keep weights that are not on a grid as they are, rather than refuse the network.

    Raises:
        ValueError: The format is unknown, the network is not fully quantized, has a state that is no plain tensor, a
            layer has too many bits or too extreme exponents for the format, or the file does not hold the weights bit
            for bit.
    """
    path = Path(path)
    target, grids = fitting_grids(model, format, layers, allow_partial)
    state = plain_tensors(model.state_dict())
    in_state = grids_in_state(model, state, grids)
    own, tied = untie(state, in_state)
    tensors: dict[str, Tensor] = {}
    weights: dict[str, dict[str, Any]] = {}
    for name, value in own.items():
        if (grid := in_state.get(name)) is not None:
            weights[name] = {"grid": grid.spec(), "shape": list(value.shape), "dtype": dtype_name(value.dtype)}
            _add(tensors, _to_tensors(name, value, grid, target))
        else:
            _add(tensors, {name: value.cpu().clone(memory_format=torch.contiguous_format)})
    description = {"version": _VERSION, "format": format, "weights": weights, "tied": tied}
    with atomic(path) as partial:
        # save_file would make it private.
        partial.write_bytes(save(tensors, {"format": "pt", _KEY: json.dumps(description)}))
        with safe_open(partial, "pt") as file:
            for name, record in weights.items():
                check_identical(name, own[name].cpu(), _from_tensors(file, name, record, target), target)


def recognizes(head: bytes) -> bool:
    """Whether a file with this header is one of :func:`save_accelerator`."""
    return head[8:9] == b"{" and f'"{_KEY}"'.encode() in head


def read_accelerator(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Decode a file that :func:`save_accelerator` wrote.

    Returns:
        A state_dict for the network: every weight in its own dtype, bit for bit, and the other tensors.

    Raises:
        ValueError: The file was not written by :func:`save_accelerator`, was by a later version of it, or is damaged.
        OSError: There is no such file.
    """
    return read(path).state_dict


def read(path: str | os.PathLike[str]) -> Contents:
    """:func:`read_accelerator`, and what else the file tells."""
    try:
        with safe_open(path, "pt") as file:
            return _read(path, file)
    except (SafetensorError, KeyError, TypeError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"{path} is damaged: {error}; copy or export it again") from error


def _read(path: str | os.PathLike[str], file: Any) -> Contents:
    metadata = (file.metadata() or {}).get(_KEY)
    if metadata is None:
        raise ValueError(f"{path} has no {_KEY} metadata; only files of save_accelerator can be read")
    description = json.loads(metadata)
    if description["version"] not in (1, _VERSION):
        raise ValueError(
            f"{path} has version {description['version']!r}, this release reads versions 1 and {_VERSION}; read it "
            "with the release that wrote it"
        )
    weights, target = description["weights"], NUMBER_FORMATS[description["format"]]
    parts = {name: (f"{name}_packed" if target.in_blocks else name, f"{name}_scale") for name in weights}
    stored = {part for pair in parts.values() for part in pair}
    state = {name: file.get_tensor(name) for name in file.keys() if name not in stored}  # noqa: SIM118
    state |= {name: _from_tensors(file, name, record, target) for name, record in weights.items()}
    return Contents(
        kind=target.name,
        state_dict=state | {name: state[first] for name, first in description["tied"].items()},
        layers=[_layer(name, record) for name, record in weights.items()],
        stored={name: memory(map(file.get_tensor, pair)) for name, pair in parts.items()},
        metadata=description,
    )


def _layer(name: str, record: Mapping[str, Any]) -> Layer:
    shape = tuple(record["shape"])
    # Version 1 had bits and n1 in the place of the spec.
    grid = from_spec(record.get("grid") or {"kind": "power_of_two", "n1": record["n1"], "bits": record["bits"]})
    return Layer(name, shape, grid.bits, grid, math.prod(shape))


def fitting_grids(
    model: nn.Module,
    wanted: str,
    layers: Iterable[Layer] | None,
    allow_partial: bool,
) -> tuple[NumberFormat, dict[str, Grid]]:
    """A number format by its name, and the grids of a network, all of which fit it.

    Raises:
        ValueError: There is no such format, the network is not fully quantized, or a layer does not fit.
    """
    one_of("format", wanted, NUMBER_FORMATS)
    target = NUMBER_FORMATS[wanted]
    limit = target.max_bits
    grids = find_grids(model, layers, allow_partial)
    large = {name: grid.bits for name, grid in grids.items() if grid.bits > limit}
    if large:
        fitting = [name for name, other in NUMBER_FORMATS.items() if other.max_bits >= max(large.values())]
        raise ValueError(
            f"{target.name} holds weights of at most {limit} bits, but "
            + ", ".join(f"{name} has {bits}" for name, bits in large.items())
            + f"; use {' or '.join(fitting) or 'save_packed, which holds every bit width'}, or keep these in floating "
            "point: pass layers without them (inq-export: --exclude NAME)"
        )
    for name, grid in grids.items():
        scale_exponent(name, grid, target)
    return target, grids


def scale_exponent(name: str, grid: Grid, target: NumberFormat) -> int:
    """Exponent of a tensor's scale: its largest level becomes the largest element 2^k, or its unit the integer 1.

    Raises:
        ValueError: The scale cannot be stored.
    """
    largest = largest_multiple(grid)
    if not largest:
        return 0
    highest = grid.step + largest.bit_length() - 1
    # The largest 2^k of these formats: exponent field all ones, less the bias.
    exponent = grid.step if target.mantissa_bits is None else highest - target.bias - 1
    kind, lowest = ("E8M0", -E8M0_BIAS) if target.in_blocks else ("float32", -126)
    if not lowest <= exponent <= 127:
        raise ValueError(
            f"{name} goes up to 2^{highest}, so its scale in {target.name} would be 2^{exponent}, outside the range 2^"
            f"{lowest} … 2^127 of {kind}; use save_packed"
        )
    return exponent


def elements_of(weight: Tensor, grid: Grid, exponent: int, target: NumberFormat) -> Tensor:
    """Bit patterns of the elements in units of 2^exponent: uint8, one a byte, in the shape of the weight."""
    values = torch.ldexp(grid.multiples(torch.tensor(table_order(grid.codes))), torch.tensor(grid.step - exponent))
    patterns = [_pattern(value, target) for value in values.tolist()]
    table = torch.tensor(patterns, dtype=torch.uint8, device=weight.device)
    return table[encode(grid, weight).int()]


def _pattern(value: float, target: NumberFormat) -> int:
    """The element that is this number; that it is, decoding shows."""
    if target.mantissa_bits is None or not value:
        return int(value) & 0xFF
    exponent = max(math.frexp(value)[1] - 1, 1 - target.bias)
    digits = int(math.ldexp(abs(value), target.mantissa_bits - exponent))
    sign = int(value < 0) << target.element_bits - 1
    return sign | digits + (exponent + target.bias - 1 << target.mantissa_bits)


def pack_elements(elements: Tensor, width: int) -> Tensor:
    """A little-endian stream of bits along the last dimension, whose length is a multiple of 4."""
    if width == 4:
        return elements[..., 0::2] | elements[..., 1::2] << 4
    a, b, c, d = (elements[..., k::4] for k in range(4))
    return torch.stack([a | b << 6, b >> 2 | c << 4, c >> 4 | d << 2], dim=-1).flatten(-2)  # uint8 drops what overflows


def _unpack(packed: Tensor, width: int) -> Tensor:
    if width == 4:
        return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
    x, y, z = (packed[..., k::3] for k in range(3))
    return torch.stack([x & 63, x >> 6 | (y & 15) << 2, y >> 4 | (z & 3) << 4, z >> 2], dim=-1).flatten(-2)


def _to_tensors(name: str, weight: Tensor, grid: Grid, target: NumberFormat) -> dict[str, Tensor]:
    """What a file holds of one weight."""
    exponent = scale_exponent(name, grid, target)
    elements = elements_of(weight, grid, exponent, target).cpu()
    if not target.in_blocks:
        elements = elements.view(torch.int8 if target.name == "int8" else torch.float8_e4m3fn)
        return {name: elements, f"{name}_scale": torch.tensor([math.ldexp(1.0, exponent)])}
    rows = elements.flatten(1) if elements.dim() > 1 else elements.flatten()
    rows = nn.functional.pad(rows, (0, -rows.shape[-1] % BLOCK))
    scale = torch.full((*rows.shape[:-1], rows.shape[-1] // BLOCK), exponent + E8M0_BIAS, dtype=torch.uint8)
    return {f"{name}_packed": pack_elements(rows, target.element_bits), f"{name}_scale": scale}


def _from_tensors(file: Any, name: str, record: Mapping[str, Any], target: NumberFormat) -> Tensor:
    """Decode one weight by the definition of the format, which shares nothing with how it was encoded."""
    shape, dtype = record["shape"], NAMES[record["dtype"]]
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    scale = file.get_tensor(f"{name}_scale")
    if not target.in_blocks:
        stored: Tensor = file.get_tensor(name)
        return stored.to(wide).mul_(scale).to(dtype)
    width, mantissa = target.element_bits, target.mantissa_bits
    values = torch.tensor([_minifloat(bits, width, mantissa or 0) for bits in range(1 << width)], dtype=wide)
    scales = torch.tensor([math.ldexp(1.0, e - E8M0_BIAS) for e in range(255)] + [math.nan], dtype=wide)
    rows = values[_unpack(file.get_tensor(f"{name}_packed"), width).int()]
    rows.mul_(scales[scale.int()].repeat_interleave(BLOCK, dim=-1))
    columns = math.prod(shape[1:] if len(shape) > 1 else shape)
    return rows[..., :columns].reshape(shape).to(dtype)


def _minifloat(bits: int, width: int, mantissa_bits: int) -> float:
    """The number that a pattern of sign, exponent and mantissa bits stands for; no infinities, no nan."""
    exponent_bits = width - 1 - mantissa_bits
    sign, field = bits >> width - 1, bits >> mantissa_bits & (1 << exponent_bits) - 1
    fraction = math.ldexp(bits & (1 << mantissa_bits) - 1, -mantissa_bits) + (field > 0)
    bias = (1 << exponent_bits - 1) - 1
    return (-1.0) ** sign * math.ldexp(fraction, max(field, 1) - bias)


def check_identical(name: str, weight: Tensor, decoded: Tensor, target: NumberFormat) -> None:
    """Refuse a conversion that does not give back every bit.

    Raises:
        ValueError: It does not; the message names the layer.
    """
    if decoded.dtype is not weight.dtype or not torch.equal(decoded, weight):
        raise ValueError(
            f"{name} does not come back bit for bit from {target.name}: its levels or its scale leave what "
            f"{weight.dtype} or the library computes exactly; keep the weights in float32, use save_packed, or "
            'quantize with levels="paper", whose levels lie closest together'
        )


def _add(tensors: dict[str, Tensor], new: Mapping[str, Tensor]) -> None:
    taken = [name for name in new if name in tensors]
    if taken:
        raise ValueError(f"the network has a tensor of its own called {taken[0]}; rename it, the file needs the name")
    tensors.update(new)
