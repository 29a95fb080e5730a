"""Quantized networks on torchao's tensor subclasses, which hold accelerators' number formats."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from inq_lightning._common import LazyExtra
from inq_lightning.core.layer import Layer, computed_tensors, plain_name
from inq_lightning.formats.accelerator import (
    BLOCK,
    E8M0_BIAS,
    FormatName,
    NumberFormat,
    check_identical,
    elements_of,
    fitting_grids,
    pack_elements,
    scale_exponent,
)
from inq_lightning.grid import Grid

quantization = LazyExtra("torchao.quantization", "export")
mx_tensor = LazyExtra("torchao.prototype.mx_formats.mx_tensor", "export")
common = LazyExtra("torchao.quantization.quantize_.common", "export")


def to_torchao(
    model: nn.Module,
    format: FormatName,  # noqa: A002
    *,
    layers: Iterable[Layer] | None = None,
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
        format: A key of :data:`~inq_lightning.formats.accelerator.NUMBER_FORMATS`.
        layers: `INQCallback.layers`; left out, the weights tell by themselves which grids they are on. What is not
            among them stays as it is.
        allow_partial: Whether to keep weights that are not on a grid as they are, rather than refuse the network.

    Raises:
        ImportError: torchao is missing.
        ValueError: The format is unknown, the network is not fully quantized, a layer does not fit the format, there
            is nothing to convert, or torchao does not give the weights back bit for bit.
    """
    target, grids = fitting_grids(model, format, layers, allow_partial)
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d) if format == "int8" else (nn.Linear,)
    used_elsewhere = {
        id(p)
        for module in model.modules()
        if not isinstance(module, kinds) or isinstance(module, NonDynamicallyQuantizableLinear)  # out_proj of attention
        for p in module.parameters(recurse=False)
    }
    replaced: dict[int, Any] = {}
    for listed, parameter in model.named_parameters():
        name = plain_name(listed)
        if name in grids and id(parameter) not in used_elsewhere:
            weight = parameter.detach()
            converted = _to_subclass(name, weight, grids[name], target)
            check_identical(name, weight, converted.dequantize(), target)
            replaced[id(parameter)] = nn.Parameter(converted, requires_grad=False)
    if not replaced:
        raise ValueError(
            f"nothing to convert: torchao multiplies {format} weights of {' and '.join(k.__name__ for k in kinds)} "
            "layers only, and none of them is quantized; save_accelerator writes those of every layer"
        )
    return copy.deepcopy(
        model, replaced | computed_tensors(model)
    )  # as if these parameters were copied already, so that ties hold


def _to_subclass(name: str, weight: Tensor, grid: Grid, target: NumberFormat) -> Any:
    """The weight as torchao keeps it."""
    exponent = scale_exponent(name, grid, target)
    elements = elements_of(weight, grid, exponent, target)
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
    emulated = common.KernelPreference.EMULATED
    element = torch.float4_e2m1fn_x2 if target.name == "mxfp4" else "fp6_e3m2"
    shape = (*weight.shape[:-1], weight.shape[-1] // BLOCK)
    scale = torch.full(shape, exponent + E8M0_BIAS, dtype=torch.uint8, device=weight.device)
    return mx_tensor.MXTensor(
        pack_elements(elements, 4) if target.name == "mxfp4" else elements,  # torchao keeps six bits in a byte
        scale.view(torch.float8_e8m0fnu),
        element,
        BLOCK,
        weight.dtype,
        emulated,
        mx_tensor.QuantizeTensorToMXKwargs(elem_dtype=element, kernel_preference=emulated),
        False,
    )
