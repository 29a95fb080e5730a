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

import copy
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from inq_lightning._common import import_extra
from inq_lightning.formats.layers import LayerGrid, encode, find_grids
from inq_lightning.formats.packed import plain_tensors, untie
from inq_lightning.grid import PowerOfTwoGrid

FormatName = Literal["mxfp4", "mxfp6", "fp8", "int8"]

BLOCK = 32  # weights that share a scale in the MX formats
_E8M0_BIAS = 127
_VERSION = 1


class Format(NamedTuple):
    """One number format.

    Attributes:
        name: Its name in :data:`FORMATS`.
        max_bits: Largest bit width whose grids fit.
        bits_per_weight: Size of a weight in a file, the scales of whole blocks included.
        element_bits: Size of one element.
        mantissa_bits: Mantissa bits of one element; None where it is an integer.
    """

    name: str
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


FORMATS = {
    target.name: target
    for target in (
        Format("mxfp4", 4, 4.25, 4, 1),
        Format("mxfp6", 5, 6.25, 6, 2),
        Format("fp8", 6, 8.0, 8, 3),
        Format("int8", 4, 8.0, 8, None),
    )
}


def save_accelerator(
    model: nn.Module,
    path: str | os.PathLike[str],
    format: FormatName,  # noqa: A002
    *,
    layers: Iterable[LayerGrid] | None = None,
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
        format: A key of :data:`FORMATS`.
        layers: `INQCallback.layers`; left out, the weights tell by themselves which grids they are on.
        allow_partial: Whether to keep weights that are not on a grid as they are, rather than refuse the network.

    Raises:
        ValueError: The format is unknown, the network is not fully quantized, has a state that is no plain tensor, a
            layer has too many bits or too extreme exponents for the format, or the file does not hold the weights bit
            for bit.
    """
    path = Path(path)
    target, grids = _fitting_grids(model, format, layers, allow_partial)
    own, tied = untie(plain_tensors(model.state_dict()), grids)
    tensors: dict[str, Tensor] = {}
    weights: dict[str, dict[str, Any]] = {}
    for name, value in own.items():
        if name in grids:
            weights[name] = {
                "bits": grids[name].bits,
                "n1": grids[name].n1,
                "shape": list(value.shape),
                "dtype": str(value.dtype).removeprefix("torch."),
            }
            _add(tensors, _to_tensors(name, value, grids[name], target))
        else:
            _add(tensors, {name: value.cpu().clone(memory_format=torch.contiguous_format)})
    description = {"version": _VERSION, "format": format, "weights": weights, "tied": tied}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, {"format": "pt", "inq_accelerator": json.dumps(description)})
        with safe_open(temporary, "pt") as file:
            for name, record in weights.items():
                _check_identical(name, own[name].cpu(), _from_tensors(file, name, record, target), target)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_accelerator(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Decode a file that :func:`save_accelerator` wrote.

    Returns:
        A state_dict for the network: every weight in its own dtype, bit for bit, and the other tensors.

    Raises:
        ValueError: The file was not written by :func:`save_accelerator`, or by a later version of it.
    """
    with safe_open(path, "pt") as file:
        metadata = (file.metadata() or {}).get("inq_accelerator")
        if metadata is None:
            raise ValueError(f"{path} has no inq_accelerator metadata; only files of save_accelerator can be read")
        description = json.loads(metadata)
        if description["version"] != _VERSION:
            raise ValueError(
                f"{path} has version {description['version']!r}, this release reads version {_VERSION}; read it with "
                "the release that wrote it"
            )
        weights, target = description["weights"], FORMATS[description["format"]]
        elements = "_packed" if target.in_blocks else ""
        parts = {part for name in weights for part in (name + elements, f"{name}_scale")}
        state = {name: file.get_tensor(name) for name in file.keys() if name not in parts}  # noqa: SIM118
        state |= {name: _from_tensors(file, name, record, target) for name, record in weights.items()}
    return state | {name: state[first] for name, first in description["tied"].items()}


def to_torchao(
    model: nn.Module,
    format: FormatName,  # noqa: A002
    *,
    layers: Iterable[LayerGrid] | None = None,
    allow_partial: bool = False,
) -> nn.Module:
    """Copy a quantized network, with its weights as torchao's tensor subclasses.

    ====== ============================ ================= ====================================================
    format subclass                     layers            products
    ====== ============================ ================= ====================================================
    mxfp4  ``MXTensor``                 Linear            activations are rounded to MXFP4 on the fly, too
    mxfp6  ``MXTensor``                 Linear            activations are rounded to MXFP6 on the fly, too
    fp8    ``Float8Tensor``             Linear            activations stay floating point
    int8   ``IntxUnpackedToInt8Tensor`` Linear and Conv2d activations stay floating point, outputs are identical
    ====== ============================ ================= ====================================================

    Weights of other layers stay as they are, and so does the network passed in. Weights that are not converted are
    copied, too.

    Args:
        model: The network.
        format: A key of :data:`FORMATS`.
        layers: `INQCallback.layers`; left out, the weights tell by themselves which grids they are on. What is not
            among them stays as it is.
        allow_partial: Whether to keep weights that are not on a grid as they are, rather than refuse the network.

    Raises:
        ImportError: torchao is missing.
        ValueError: The format is unknown, the network is not fully quantized, a layer does not fit the format, there
            is nothing to convert, or torchao does not give the weights back bit for bit.
    """
    target, grids = _fitting_grids(model, format, layers, allow_partial)
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d) if format == "int8" else (nn.Linear,)
    used_elsewhere = {
        id(p)
        for module in model.modules()
        if not isinstance(module, kinds) or isinstance(module, NonDynamicallyQuantizableLinear)  # out_proj of attention
        for p in module.parameters(recurse=False)
    }
    replaced: dict[int, Any] = {}
    for listed, parameter in model.named_parameters():
        name = listed.replace("_orig_mod.", "")
        if name in grids and id(parameter) not in used_elsewhere:
            weight = parameter.detach()
            converted = _to_subclass(name, weight, grids[name], target)
            _check_identical(name, weight, converted.dequantize(), target)
            replaced[id(parameter)] = nn.Parameter(converted, requires_grad=False)
    if not replaced:
        raise ValueError(
            f"nothing to convert: torchao multiplies {format} weights of {' and '.join(k.__name__ for k in kinds)} "
            "layers only, and none of them is quantized; save_accelerator writes those of every layer"
        )
    return copy.deepcopy(model, replaced)  # as if these parameters were copied already, so that ties hold


def _fitting_grids(
    model: nn.Module,
    wanted: str,
    layers: Iterable[LayerGrid] | None,
    allow_partial: bool,
) -> tuple[Format, dict[str, PowerOfTwoGrid]]:
    if wanted not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {wanted!r}")
    target = FORMATS[wanted]
    limit = target.max_bits
    grids = find_grids(model, layers, allow_partial)
    large = {name: grid.bits for name, grid in grids.items() if grid.bits > limit}
    if large:
        fitting = [name for name, other in FORMATS.items() if other.max_bits >= max(large.values())]
        raise ValueError(
            f"{target.name} holds weights of at most {limit} bits, but "
            + ", ".join(f"{name} has {bits}" for name, bits in large.items())
            + f"; use {' or '.join(fitting) or 'save_packed, which holds every bit width'}"
        )
    for name, grid in grids.items():
        _scale_exponent(name, grid, target)
    return target, grids


def _scale_exponent(name: str, grid: PowerOfTwoGrid, target: Format) -> int:
    """Exponent of a tensor's scale: its largest level becomes the largest element 2^k, or its smallest the integer 1.

    Raises:
        ValueError: The scale cannot be stored.
    """
    if grid.n1 is None or grid.n2 is None:
        return 0
    # The largest 2^k of these formats: exponent field all ones, less the bias of 2^(bits - 1) - 1.
    exponent = grid.n1 - (1 << target.exponent_bits - 1) if target.mantissa_bits is not None else grid.n2
    kind, lowest = ("E8M0", -_E8M0_BIAS) if target.in_blocks else ("float32", -126)
    if not lowest <= exponent <= 127:
        raise ValueError(
            f"{name} goes up to 2^{grid.n1}, so its scale in {target.name} would be 2^{exponent}, outside the range 2^"
            f"{lowest} … 2^127 of {kind}; use save_packed"
        )
    return exponent


def _elements(weight: Tensor, grid: PowerOfTwoGrid, target: Format) -> Tensor:
    """Bit patterns of the elements, uint8, one a byte, in the shape of the weight."""
    width, mantissa = target.element_bits, target.mantissa_bits
    if mantissa is None:
        powers = [1 << k for k in range(grid.magnitudes)]
        negative = [256 - p for p in powers]
    else:
        subnormal = [1 << k for k in range(mantissa)]
        normal = [k << mantissa for k in range(1, 1 << target.exponent_bits)]
        powers = (subnormal + normal)[-grid.magnitudes :]
        negative = [1 << width - 1 | p for p in powers]
    # Indexed by the code itself: a negative code counts from the end.
    table = torch.tensor([0, *powers, *reversed(negative)], dtype=torch.uint8, device=weight.device)
    return table[encode(grid, weight).int()]


def _pack(elements: Tensor, width: int) -> Tensor:
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


def _to_tensors(name: str, weight: Tensor, grid: PowerOfTwoGrid, target: Format) -> dict[str, Tensor]:
    """What a file holds of one weight."""
    exponent = _scale_exponent(name, grid, target)
    elements = _elements(weight, grid, target).cpu()
    if not target.in_blocks:
        elements = elements.view(torch.int8 if target.name == "int8" else torch.float8_e4m3fn)
        return {name: elements, f"{name}_scale": torch.tensor([math.ldexp(1.0, exponent)])}
    rows = elements.flatten(1) if elements.dim() > 1 else elements.flatten()
    rows = nn.functional.pad(rows, (0, -rows.shape[-1] % BLOCK))
    scale = torch.full((*rows.shape[:-1], rows.shape[-1] // BLOCK), exponent + _E8M0_BIAS, dtype=torch.uint8)
    return {f"{name}_packed": _pack(rows, target.element_bits), f"{name}_scale": scale}


def _from_tensors(file: Any, name: str, record: Mapping[str, Any], target: Format) -> Tensor:
    """Decode one weight by the definition of the format, which shares nothing with how it was encoded."""
    shape, dtype = record["shape"], getattr(torch, record["dtype"])
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    scale = file.get_tensor(f"{name}_scale")
    if not target.in_blocks:
        stored: Tensor = file.get_tensor(name)
        return stored.to(wide).mul_(scale).to(dtype)
    width, mantissa = target.element_bits, target.mantissa_bits
    values = torch.tensor([_minifloat(bits, width, mantissa or 0) for bits in range(1 << width)], dtype=wide)
    scales = torch.tensor([math.ldexp(1.0, e - _E8M0_BIAS) for e in range(255)] + [math.nan], dtype=wide)
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


def _to_subclass(name: str, weight: Tensor, grid: PowerOfTwoGrid, target: Format) -> Any:
    quantization = import_extra("torchao.quantization", "export")
    exponent = _scale_exponent(name, grid, target)
    elements = _elements(weight, grid, target)
    ones = (1,) * weight.dim()
    if target.name == "int8":
        if weight.dtype is torch.float64:
            raise ValueError(f"{name} is float64, which torchao's IntxUnpackedToInt8Tensor does not take; use .float()")
        scale = torch.full(ones, math.ldexp(1.0, exponent), dtype=weight.dtype, device=weight.device)
        return quantization.IntxUnpackedToInt8Tensor(
            elements.view(torch.int8),
            scale,
            torch.zeros_like(scale, dtype=torch.int8),
            target_dtype=torch.int8,
            block_size=tuple(weight.shape),
            dtype=weight.dtype,
            activation_quantization=None,
        )
    if target.name == "fp8":
        scale = torch.full(ones, math.ldexp(1.0, exponent), device=weight.device)
        return quantization.Float8Tensor(
            elements.view(torch.float8_e4m3fn), scale, block_size=list(weight.shape), dtype=weight.dtype
        )
    if weight.shape[-1] % BLOCK:
        raise ValueError(
            f"{name} has {weight.shape[-1]} columns, which torchao's MXTensor takes only in multiples of {BLOCK}; use "
            "fp8 or int8, save_accelerator, which fills up the last block, or layers without this one"
        )
    mx = import_extra("torchao.prototype.mx_formats.mx_tensor", "export")
    kernels = import_extra("torchao.quantization.quantize_.common", "export").KernelPreference
    element = torch.float4_e2m1fn_x2 if target.name == "mxfp4" else "fp6_e3m2"
    shape = (*weight.shape[:-1], weight.shape[-1] // BLOCK)
    scale = torch.full(shape, exponent + _E8M0_BIAS, dtype=torch.uint8, device=weight.device)
    return mx.MXTensor(
        _pack(elements, 4) if target.name == "mxfp4" else elements,  # torchao keeps six bits in a byte
        scale.view(torch.float8_e8m0fnu),
        element,
        BLOCK,
        weight.dtype,
        kernels.EMULATED,
        mx.QuantizeTensorToMXKwargs(elem_dtype=element, kernel_preference=kernels.EMULATED),
        False,
    )


def _check_identical(name: str, weight: Tensor, decoded: Tensor, target: Format) -> None:
    if decoded.dtype is not weight.dtype or not torch.equal(decoded, weight):
        raise ValueError(
            f"{name} does not come back bit for bit from {target.name}: its levels or its scale leave what "
            f"{weight.dtype} or the library computes exactly; keep the weights in float32, or use save_packed"
        )


def _add(tensors: dict[str, Tensor], new: Mapping[str, Tensor]) -> None:
    taken = [name for name in new if name in tensors]
    if taken:
        raise ValueError(f"the network has a tensor of its own called {taken[0]}; rename it, the file needs the name")
    tensors.update(new)
