"""Inference modules that keep one byte a weight in memory: integer codes, decoded or multiplied as they are."""

from __future__ import annotations

import copy
import functools
import math
import sys
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
SPARSE = 100  # one code in so many may be corrected one by one, rather than all at once
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

    - ``activations="float"``: each row of the input becomes fixed-point numbers of 23 bits, whose products with
      the integer weights are exact. One output differs from the exact one by at most 2^-22 · max|x| · Σ|w| over its
      row of weights, where max|x| is 2^-100 or more, besides its own rounding.
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
            cast("Packed", module)._fill(*codes[id(weight)], swapped[id(weight)], weight.dtype, activations)
    return packed


def _encode(grid: PowerOfTwoGrid, weight: Tensor) -> tuple[Tensor, int]:
    """int8 codes, and the sign that they carry: see :class:`Packed`."""
    codes = grid.encode(weight)
    if grid.bits > LINEAR_BITS or grid.n2 is None:
        return codes, 1
    multiple = torch.ldexp(codes.sign().float(), (codes.abs().int() - 1).clamp_(min=0))
    sign = -1 if bool((multiple == 128).any()) else 1
    return multiple.mul_(sign).clamp_(max=127).to(torch.int8), sign


class Packed(nn.Module):
    """What packed layers have in common.

    Attributes:
        codes: int8, the shape of the weight. Up to 5 bits, the weight as a multiple of 2^n2, or the negative of it:
            int8 holds -128 but not 128, for which 127, no power of two, stands where a layer has both. With more bits,
            the codes of :meth:`PowerOfTwoGrid.encode <inq_lightning.grid.PowerOfTwoGrid.encode>`.
        grid: int64 of shape (3,): bits, n2, and the sign of the codes.
    """

    codes: Tensor
    grid: Tensor
    activations: Activations
    _zero: Tensor

    def _fill(
        self, codes: Tensor, sign: int, grid: PowerOfTwoGrid, dtype: torch.dtype, activations: Activations
    ) -> None:
        self.register_buffer("codes", codes)
        self.register_buffer("grid", torch.tensor([grid.bits, grid.n2 or 0, sign], device=codes.device))
        self.register_buffer("_zero", codes.new_zeros((), dtype=dtype), persistent=False)  # follows .to(dtype)
        self.activations = activations
        self._read_grid()

    def _read_grid(self) -> None:
        bits, self._n2, sign = (int(number) for number in self.grid)
        self._linear = bits <= LINEAR_BITS
        self._wide = self._linear and sign < 0 and bool((self.codes == 127).any())
        self._scale = math.ldexp(sign, self._n2)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._read_grid()

    def _decode(self) -> Tensor:
        """The weight in floating point, bit for bit what was packed; not kept."""
        zero, dtype = self._zero, self._zero.dtype
        if dtype.itemsize < 4 or (dtype is torch.float32 and self._n2 < -126):
            zero = zero.double()  # the step may be too small for the type, and the result not
        if not self._linear:
            codes = self.codes.to(zero.dtype)
            return torch.ldexp(codes.sign(), codes.abs() + (self._n2 - 1)).to(dtype)
        weight = torch.add(zero, self.codes, alpha=self._scale)  # in the type of zero; 0 times -1 would be -0.0
        if self._wide:
            functional.threshold(weight, 126.5 * self._scale, 128 * self._scale, inplace=True)
        return weight.to(dtype)

    weight: Any = property(_decode)


class PackedLinear(Packed, nn.Linear):
    """A linear layer on codes."""

    _top: tuple[Tensor, Tensor] | None = None

    def _read_grid(self) -> None:
        super()._read_grid()
        self._top = None
        if self._wide:
            rows, columns = (self.codes == 127).nonzero(as_tuple=True)
            if len(rows) * SPARSE < self.codes.numel():
                self._top = rows[None], columns

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Map (..., in_features) to (..., out_features)."""
        if not self._linear or self.codes.numel() < SMALL or self.in_features > LONGEST:
            return functional.linear(input, self.weight, self.bias)
        exact = self._can_multiply_integers(input)
        if self.activations == "float" and not exact:
            return functional.linear(input, self.weight, self.bias)
        rows = input.reshape(-1, self.in_features)
        digits, scale = (_fixed_point if self.activations == "float" else _int8)(rows)
        if exact:
            product = self._multiply(digits, rows, scale)
        else:
            product = functional.linear(digits[0].to(input.dtype), self.weight).mul_(scale)
        if self.bias is not None:
            product += self.bias
        return product.view(*input.shape[:-1], self.out_features)

    def _can_multiply_integers(self, x: Tensor) -> bool:
        """Whether int8 products are at hand that are faster than float ones."""
        if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype is not torch.float32:
            return False
        if self._zero.dtype is not x.dtype or x.numel() == 0 or torch.is_autocast_enabled("cpu"):
            return False
        return not (torch.is_grad_enabled() and x.requires_grad) and _has_fast_int8()

    def _multiply(self, digits: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
        """Products of ``rows`` with the weights.

        Args:
            digits: int8 (d, m, in_features), the lowest first.
            rows: float32 (m, in_features), what the digits stand for.
            scale: float32 (m, 1), the worth of the lowest digit.

        Returns:
            float32 of shape (m, out_features).
        """
        d, m, _ = digits.shape
        few = m <= 2  # oneDNN multiplies a single row much faster than several
        parts = list(digits.view(d * m, 1, -1)) if few else [digits.view(d * m, -1)]
        sparse = few and self._top is not None
        # All rows go over a block of codes while it is in the cache.
        size = max(16, BLOCK // self.in_features) if len(parts) > 1 else self.out_features
        blocks = torch.split(self.codes, size)
        sums = torch.cat([_products(parts, block, self._wide and not sparse) for block in blocks], 1)
        sums = sums.view(d, m, -1)
        product = sums[0].double()
        for place, digit in enumerate(sums[1:], 1):
            product.add_(digit, alpha=256**place)
        product = product.mul_(scale * self._scale).float()
        if sparse and self._top is not None:
            top, columns = self._top
            product.scatter_add_(1, top.expand(m, -1), rows[:, columns].mul_(self._scale))
        return product


def _products(parts: list[Tensor], block: Tensor, wide: bool) -> Tensor:
    """int32 products of int8 rows with a block of the integer weights; ``wide`` where 127 stands for 128."""
    codes = block.t()
    product = torch.cat([torch._int_mm(part, codes) for part in parts])
    if wide:  # add 1 there, which is max(code, 126) - 126
        top = block.clamp(min=126).t()
        product += torch.cat([torch._int_mm(part, top) - 126 * part.sum(1, keepdim=True) for part in parts])
    return product


@functools.cache
def _has_fast_int8() -> bool:
    supported = getattr(torch.cpu, "_is_vnni_supported", None)  # private, as _int_mm is: torch may drop either
    return hasattr(torch, "_int_mm") and supported is not None and bool(supported()) and torch._C._has_mkldnn


def _fixed_point(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Each row as three int8 digits to base 256, the lowest first, 23 bits in all; and the worth of the lowest."""
    # A power of two, so that whole numbers stay exact, held by float32 for the smallest rows too; nan for inf and nan.
    largest = torch.linalg.vector_norm(rows, math.inf, 1, keepdim=True).clamp_(min=2.0**-100)
    scale = largest.div_(torch.frexp(largest).mantissa).mul_(2.0**-22)
    number = (rows / scale).round_().int()
    # Bytes hold digits from 0 to 255: with 128 added to each they carry as they should, and a flipped highest bit takes
    # the 128 away again.
    number.add_(0x808080).bitwise_xor_(0x808080)
    digits = number.view(torch.int8).view(*rows.shape, 4)[..., :3] if sys.byteorder == "little" else _shifted(number)
    return digits.permute(2, 0, 1).contiguous(), scale


def _shifted(number: Tensor) -> Tensor:
    return torch.stack([number.to(torch.int8), (number >> 8).to(torch.int8), (number >> 16).to(torch.int8)], -1)


def _int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to multiples of max|x| / 127."""
    scale = torch.linalg.vector_norm(rows, math.inf, 1, keepdim=True).div_(127)
    scale = scale.clamp_(min=torch.finfo(scale.dtype).tiny)
    scale = scale.masked_fill_(scale == math.inf, math.nan)
    return (rows / scale).round_().clamp_(-127, 127).to(torch.int8)[None], scale


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
