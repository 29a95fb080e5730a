"""Inference modules that keep one byte a weight in memory: integer codes, decoded or multiplied as they are."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from inq_lightning.export.grids import LayerGrid, find_grids
from inq_lightning.grid import PowerOfTwoGrid

Activations = Literal["float", "int8"]

LINEAR_BITS = 5  # up to here a weight is an integer of at most ±128 times 2^n2
BLOCK = 1 << 20  # codes that stay in a core's cache while several rows are multiplied by them
SMALL = 1 << 17  # codes of a layer below which integer products cost more than they save
LONGEST = 131_071  # inputs whose products of at most 128·128 still add up within int32


def to_packed(
    model: nn.Module,
    *,
    activations: Activations = "float",
    layers: Iterable[LayerGrid] | None = None,
    allow_partial: bool = False,
) -> nn.Module:
    """Copy a quantized network for inference, with int8 codes in the place of its float weights.

    Swapped are the modules whose type is exactly `Linear`, `Conv1d` to `Conv3d` or `ConvTranspose1d` to
    `ConvTranspose3d`. Their state_dict has ``codes`` (int8, the shape of the weight) and ``grid`` (int64, see
    :class:`Packed`) in the place of ``weight``; ``weight`` stays readable, decoded anew each time. Kept in floating
    point are all other quantized layers (LSTM, attention, embedding, subclasses that may compute something else,
    parametrized layers) and weights shared with one of these. Weights shared among swapped layers share their codes,
    until ``.to()`` moves the model.

    Convolutions decode their weight and compute as before: bit-identical. So do linear layers of 6 bits and more, of
    fewer than 2^17 weights, and wherever the following does not apply. It applies to eager float32 inference on a CPU
    with VNNI instructions, outside autocast and without gradients to the input:

    - ``activations="float"``: each row of the input becomes fixed-point numbers of 24 bits, whose products with
      the integer weights are exact. One output differs from the exact one by at most 2^-22 · max|x| · Σ|w| over its
      row of weights, besides its own rounding.
    - ``activations="int8"``: linear layers of up to 5 bits and at least 2^17 weights round each row of the input to
      multiples of max|x| / 127, on any device. One output differs by at most max|x| / 254 · Σ|w| and float's
      rounding. No gradient reaches the input of these layers.

    Args:
        model: The network; left as it is.
        activations: What the inputs of large linear layers are rounded to, see above.
        layers: `INQCallback.layers`, the record of what was quantized; see
            :func:`~inq_lightning.export.grids.find_grids`.
        allow_partial: Whether to keep layers that are not on a grid in floating point, rather than refuse the network.

    Returns:
        The copy, on the same device. Load its state_dict into another `to_packed` of the same architecture.

    Raises:
        ValueError: ``activations`` is unknown, or parameters are not on their grids.
    """
    if activations not in get_args(Activations):
        raise ValueError(f"activations must be one of {', '.join(get_args(Activations))}, got {activations!r}")
    grids = find_grids(model, layers, allow_partial)
    swapped = {
        id(module.weight): grids[name]
        for prefix, module in model.named_modules(remove_duplicate=False)
        if type(module) in PACKED and (name := f"{prefix}.weight".lstrip(".").replace("_orig_mod.", "")) in grids
    }
    for module in model.modules():
        if type(module) not in PACKED:
            for parameter in module.parameters(recurse=False):
                swapped.pop(id(parameter), None)  # stays in memory anyway
    # Copied without the weights that are about to go: each is its own copy.
    weights = {id(p): p for p in model.parameters() if id(p) in swapped}
    packed = copy.deepcopy(model, dict(weights))
    codes = {key: _encode(swapped[key], weight.detach()) for key, weight in weights.items()}
    for module in packed.modules():
        weight = module._parameters.get("weight") if type(module) in PACKED else None
        if weight is not None and id(weight) in swapped:
            del module._parameters["weight"]
            # Hooks and settings stay what they are, and so does isinstance.
            module.__class__ = PACKED[type(module)]
            cast("Packed", module)._fill(codes[id(weight)], swapped[id(weight)], weight.dtype, activations)
    return packed


def _encode(grid: PowerOfTwoGrid, weight: Tensor) -> Tensor:
    """int8 codes: up to 5 bits the weight as a multiple of 2^n2, with 127 for +128; else the grid's own."""
    codes = grid.encode(weight)
    if grid.bits > LINEAR_BITS or grid.n2 is None:
        return codes
    multiple = torch.ldexp(codes.sign().float(), (codes.abs().int() - 1).clamp_(min=0))
    return multiple.clamp_(max=127).to(torch.int8)


class Packed(nn.Module):
    """What packed layers have in common.

    Attributes:
        codes: int8, the shape of the weight.
        grid: int64 of shape (3,): bits, n2, and whether the codes contain 127 for +128.
    """

    codes: Tensor
    grid: Tensor
    activations: Activations
    _like: Tensor

    def _fill(self, codes: Tensor, grid: PowerOfTwoGrid, dtype: torch.dtype, activations: Activations) -> None:
        linear = grid.bits <= LINEAR_BITS
        wide = linear and bool((codes == 127).any())
        self.register_buffer("codes", codes)
        self.register_buffer("grid", torch.tensor([grid.bits, grid.n2 or 0, wide], device=codes.device))
        self.register_buffer("_like", codes.new_empty(0, dtype=dtype), persistent=False)  # follows .to(dtype)
        self.activations = activations
        self._read_grid()

    def _read_grid(self) -> None:
        bits, self._n2, wide = (int(number) for number in self.grid)
        self._linear, self._wide = bits <= LINEAR_BITS, bool(wide)
        self._scale = math.ldexp(1.0, self._n2)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._read_grid()

    def _decode(self) -> Tensor:
        """The weight in floating point, bit for bit what was packed; not kept."""
        dtype = self._like.dtype
        # Half precision may lack the exponents of the steps, not those of the result.
        wider = torch.float64 if dtype is torch.float64 or self._n2 < -126 else torch.float32
        codes = self.codes.to(wider)
        if not self._linear:
            return torch.ldexp(codes.sign(), codes.abs() + (self._n2 - 1)).to(dtype)
        if not self._wide:
            return codes.mul_(self._scale).to(dtype)
        negative = functional.threshold(codes.mul_(-self._scale), -126 * self._scale, -128 * self._scale, inplace=True)
        return negative.neg_().to(dtype)

    weight: Any = property(_decode)


class PackedLinear(Packed, nn.Linear):
    """A linear layer on codes."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Map (..., in_features) to (..., out_features)."""
        if not self._linear or self.codes.numel() < SMALL or self.in_features > LONGEST:
            return functional.linear(input, self.weight, self.bias)
        exact = self._can_multiply_integers(input)
        if self.activations == "float" and not exact:
            return functional.linear(input, self.weight, self.bias)
        rows = input.reshape(-1, self.in_features)
        if self.activations == "float":
            digits, scale = _fixed_point(rows)
        else:
            digits, scale = _int8(rows)
        if exact:
            sums = self._multiply(torch.cat(digits)).double().view(len(digits), -1, self.out_features)
            product = sums[0]
            for more in sums[1:]:
                product = product.mul_(256).add_(more)
            product = product.mul_(scale.double() * self._scale).to(input.dtype)
        else:
            product = functional.linear(digits[0].to(input.dtype), self.weight) * scale
        if self.bias is not None:
            product = product + self.bias
        return product.view(*input.shape[:-1], self.out_features)

    def _can_multiply_integers(self, x: Tensor) -> bool:
        """Whether int8 products are at hand that are faster than float ones."""
        if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype is not torch.float32:
            return False
        if self._like.dtype is not x.dtype or x.numel() == 0 or torch.is_autocast_enabled("cpu"):
            return False
        return not (torch.is_grad_enabled() and x.requires_grad) and _has_fast_int8()

    def _multiply(self, rows: Tensor) -> Tensor:
        """int32 products of int8 ``rows`` (m, in_features) with the integer weights: (m, out_features)."""
        few = rows.shape[0] <= 8  # oneDNN's product with a single row is much the fastest while the block is in cache
        parts = torch.split(rows, 1) if few else (rows,)
        extra = rows.int().sum(1, keepdim=True).mul_(126) if self._wide else None
        outputs = []
        for block in torch.split(self.codes, max(16, BLOCK // self.in_features)):
            output = torch.cat([torch._int_mm(part, block.t()) for part in parts])
            if extra is not None:  # 127 stands for 128: add 1 there, which is max(code, 126) - 126
                top = block.clamp(min=126).t()
                output += torch.cat([torch._int_mm(part, top) for part in parts]).sub_(extra)
            outputs.append(output)
        return torch.cat(outputs, 1)


def _has_fast_int8() -> bool:
    supported = getattr(torch.cpu, "_is_vnni_supported", None)  # private, as _int_mm is: torch may drop either
    return hasattr(torch, "_int_mm") and supported is not None and bool(supported()) and torch._C._has_mkldnn


def _fixed_point(rows: Tensor) -> tuple[list[Tensor], Tensor]:
    """Split each row into three int8 digits to base 256, highest first, times a power of two: 24 bits in all."""
    largest = rows.abs().amax(1, keepdim=True)
    # Balanced digits reach 127.5·2^16, a little less than 2^23. Below 2^-100 a power of two would leave float32.
    exponent = torch.frexp(largest * 1.004).exponent.clamp_(-100, 128)
    number = torch.ldexp(rows, 23 - exponent).round_().int()
    low = number.to(torch.int8)  # wraps around: the balanced digit
    number = (number - low) >> 8
    middle = number.to(torch.int8)
    high = ((number - middle) >> 8).to(torch.int8)
    return [high, middle, low], torch.ldexp(largest * 0 + 1, exponent - 23)  # nan where the row has inf or nan


def _int8(rows: Tensor) -> tuple[list[Tensor], Tensor]:
    """Round each row to multiples of max|x| / 127."""
    scale = rows.abs().amax(1, keepdim=True) / 127
    scale = scale.clamp(min=torch.finfo(scale.dtype).tiny)
    return [(rows / scale).round_().clamp_(-127, 127).to(torch.int8)], scale + scale * 0  # inf becomes nan


class PackedConv1d(Packed, nn.Conv1d):
    """`Conv1d` on codes."""


class PackedConv2d(Packed, nn.Conv2d):
    """`Conv2d` on codes."""


class PackedConv3d(Packed, nn.Conv3d):
    """`Conv3d` on codes."""


class PackedConvTranspose1d(Packed, nn.ConvTranspose1d):
    """`ConvTranspose1d` on codes."""


class PackedConvTranspose2d(Packed, nn.ConvTranspose2d):
    """`ConvTranspose2d` on codes."""


class PackedConvTranspose3d(Packed, nn.ConvTranspose3d):
    """`ConvTranspose3d` on codes."""


PACKED: dict[type[nn.Module], type[Packed]] = {
    nn.Linear: PackedLinear,
    nn.Conv1d: PackedConv1d,
    nn.Conv2d: PackedConv2d,
    nn.Conv3d: PackedConv3d,
    nn.ConvTranspose1d: PackedConvTranspose1d,
    nn.ConvTranspose2d: PackedConvTranspose2d,
    nn.ConvTranspose3d: PackedConvTranspose3d,
}
