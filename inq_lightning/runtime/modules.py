"""Inference modules that keep one byte a weight in memory: integer codes, decoded or multiplied as they are."""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Iterable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from inq_lightning._common import one_of
from inq_lightning.core.layer import Layer, computed_tensors, plain_name
from inq_lightning.formats.layers import find_grids
from inq_lightning.grid import Grid, PowerOfTwoGrid
from inq_lightning.grid.base import largest_multiple, table_order
from inq_lightning.grid.levels import LevelsName, levels_of

Activations = Literal["float", "int8"]

LARGEST = 128  # multiple of a grid's unit up to which codes in int8 are the multiples themselves
SMALL = 1 << 17  # codes of a layer below which multiplying by codes costs more than it saves
WIDTH = 256  # outputs computed at a time: one pass of the processor's registers over the inputs
NARROW = 128  # outputs below which the 8 bytes a row of the table weigh too much
SEGMENT = 128  # products in one float32 sum, which keep its rounding below that of a matrix product
FEW_SUMS = 4  # rows of input up to which weighted sums are faster than decoding a block for a matrix product
FEW_PRODUCTS = 16  # the same for int8: oneDNN multiplies a single row much faster than several
SPARSE = 50  # one code in so many may be corrected one by one
_FAMILIES: tuple[LevelsName, ...] = ("paper", "full", "dense")
LONGEST = 131_071  # inputs whose products of at most 128·128 still add up within int32


def to_packed(
    model: nn.Module,
    *,
    activations: Activations = "float",
    layers: Iterable[Layer] | None = None,
    allow_partial: bool = False,
) -> nn.Module:
    """Copy a quantized network for inference, with int8 codes in the place of its float weights.

    Swapped are the modules whose type is exactly `Linear`, `Conv1d` to `Conv3d` or `ConvTranspose1d` to
    `ConvTranspose3d`. Their state_dict has ``codes`` (int8, the shape of the weight) and ``grid`` (int64, see
    :class:`Packed`) in the place of ``weight``; ``weight`` stays readable, decoded anew each time. Kept in floating
    point are all other quantized layers (LSTM, attention, embedding, subclasses that may compute something else,
    parametrized layers) and weights shared with one of these. Weights shared among swapped layers share their codes,
    until ``.to()`` moves the model or ``load_state_dict`` fills it.

    Convolutions decode their weight and compute as before: bit-identical, in the memory format of the network. So do
    linear layers, except for those of up to 5 bits and at least 2^17 weights:

    - ``activations="float"``: in float32 inference on an x86 CPU, without compilation, autocast and gradients to the
      input, layers of at least 128 outputs multiply by the codes as they are, in float32, summing up to 128 products
      at a time. The error is about that of float32 torch; one output's is at most
      2^-24 · (256 + in_features / 128) · 2^(n1 + 1) · Σ|x|, besides rounding the sum.
    - ``activations="int8"``: each row of the input is rounded to multiples of max|x| / 127, on any device. One output
      differs by at most max|x| / 254 · Σ|w| and float's rounding. No gradient reaches the input of these layers.

    Args:
        model: The network; left as it is.
        activations: What the inputs of large linear layers are rounded to, see above.
        layers: `INQCallback.layers`, the record of what was quantized; see
            :func:`~inq_lightning.formats.layers.find_grids`.
        allow_partial: Whether to keep layers that are not on a grid in floating point, rather than refuse the network.

    Returns:
        The copy, on the same device. Load its state_dict into another `to_packed` of the same architecture, whatever
        its bits and activations.

    Raises:
        ValueError: ``activations`` is unknown, parameters are not on their grids, or these have levels that no name
            stands for.
    """
    one_of("activations", activations, Activations)
    grids = find_grids(model, layers, allow_partial)
    other = [name for name, grid in grids.items() if getattr(grid, "family", "paper") not in _FAMILIES]
    if other:
        raise ValueError(
            f"{', '.join(other)} {'has' if len(other) == 1 else 'have'} levels of your own, which packed modules do "
            f"not multiply by: they know {', '.join(_FAMILIES)}; use export_onnx, or save_packed and the network itself"
        )
    swapped = {
        id(module.weight): grids[name]
        for prefix, module in model.named_modules(remove_duplicate=False)
        if type(module) in PACKED and (name := plain_name(f"{prefix}.weight".lstrip("."))) in grids
    }
    for module in model.modules():
        if type(module) not in PACKED:
            for parameter in module.parameters(recurse=False):
                swapped.pop(id(parameter), None)  # stays in memory anyway
    # Copied without the weights that are about to go: each is its own copy.
    weights = {id(p): p for p in model.parameters() if id(p) in swapped}
    packed = copy.deepcopy(model, weights | computed_tensors(model))
    codes = {key: _encode(swapped[key], weight.detach()) for key, weight in weights.items()}
    first: dict[int, Packed] = {}
    for module in packed.modules():
        weight = module._parameters.get("weight") if type(module) in PACKED else None
        if weight is not None and id(weight) in swapped:
            del module._parameters["weight"]
            # Hooks and settings stay what they are, and so does isinstance.
            module.__class__ = PACKED[type(module)]
            layer = cast("Packed", module)
            if (twin := first.setdefault(id(weight), layer)) is not layer:
                layer._share(twin)
            else:
                layer._fill(*codes.pop(id(weight)), swapped[id(weight)], weight.dtype, activations)
    return packed


def _encode(grid: Grid, weight: Tensor) -> tuple[Tensor, int]:
    """int8 codes, and the sign that they carry: see :class:`Packed`."""
    codes = grid.encode(weight)
    if largest_multiple(grid) > LARGEST:
        return codes, 1
    table = grid.multiples(torch.tensor(table_order(grid.codes))).float()
    multiples = table.to(codes.device)[codes.int()]
    sign = -1 if bool((multiples == 128).any()) else 1
    return multiples.mul_(sign).clamp_(max=127).to(torch.int8), sign


class Packed(nn.Module):
    """What packed layers have in common.

    Attributes:
        codes: int8, the shape of the weight. Up to 5 bits, the weight as a multiple of the grid's 2^step, or the
            negative of it: int8 holds -128 but not 128, for which 127, no power of two, stands where a layer has both.
            With more bits, the codes of the grid's ``encode``. Large linear layers in float mode have them in their
            state_dict only, see :class:`PackedLinear`.
        grid: int64 of shape (4,): bits, step, the sign of the codes, and the levels: 0 the paper's, 1 full, 2 dense.
    """

    codes: Tensor
    grid: Tensor
    activations: Activations
    _zero: Tensor
    _levels: Tensor | None  # by code, where codes are no multiples; as the bits of float64, which .half() leaves alone

    def _fill(self, codes: Tensor, sign: int, grid: Grid, dtype: torch.dtype, activations: Activations) -> None:
        family = _FAMILIES.index(getattr(grid, "family", "paper"))
        self.register_buffer("codes", codes)
        self.register_buffer("grid", torch.tensor([grid.bits, grid.step, sign, family], device=codes.device))
        self.register_buffer("_zero", codes.new_zeros((), dtype=dtype), persistent=False)  # follows .to(dtype)
        self.activations = activations
        self._read_grid()

    def _share(self, twin: Packed) -> None:
        self._buffers.update(twin._buffers)
        self._non_persistent_buffers_set.update(twin._non_persistent_buffers_set)
        vars(self).update({name: value for name, value in vars(twin).items() if name not in vars(self)})

    def _read_grid(self) -> None:
        bits, self._step, sign, which = (int(number) for number in self.grid)
        family = levels_of(_FAMILIES[which], bits)
        grid = PowerOfTwoGrid(self._step + family.exponents[-1], bits, family=family)
        self._largest = largest_multiple(grid)
        self._linear = self._largest <= LARGEST
        self._wide = self._linear and sign < 0 and bool((self._natural() == 127).any())
        self._scale = math.ldexp(sign, self._step)
        levels = grid.multiples(torch.tensor(table_order(grid.codes))) * math.ldexp(1.0, self._step)
        table = None if self._linear else levels.view(torch.int64).to(self.grid.device)
        self.register_buffer("_levels", table, persistent=False)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if (grid := state_dict.get(f"{prefix}grid")) is not None and len(grid) == 3:  # written before there were levels
            state_dict[f"{prefix}grid"] = functional.pad(grid, (0, 1))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._read_grid()

    def _natural(self) -> Tensor:
        """The codes in the shape of the weight, however a layer keeps them."""
        return self._buffers["codes"]  # type: ignore[return-value]  # faster than the attribute

    def _decode(self) -> Tensor:
        """The weight in floating point, bit for bit what was packed; not kept."""
        codes, zero = self._natural(), cast("Tensor", self._buffers["_zero"])
        dtype, levels = zero.dtype, self._buffers["_levels"]
        if levels is not None:
            return levels.view(torch.float64).to(dtype)[codes.int()]
        if dtype.itemsize < 4 or (dtype is torch.float32 and self._step < -126):
            zero = zero.double()  # the step may be too small for the type, and the result not
        weight = torch.add(zero, codes, alpha=self._scale)  # in the type of zero; 0 times -1 would be -0.0
        if self._wide:
            torch.threshold_(weight, 126.5 * self._scale, 128 * self._scale)
        return weight if weight.dtype is dtype else weight.to(dtype)

    weight: Any = property(_decode)


class PackedLinear(Packed, nn.Linear):
    """A linear layer on codes.

    A large one in float mode keeps its codes as a table for PyTorch's quantized embedding bags, which compute weighted
    sums of rows of bytes: a row for each input, with the codes of up to 256 outputs plus the smallest that makes
    them unsigned, the scale, and what that addition comes to. So the weights stay bytes on their way to the registers.
    """

    _table: Tensor | None  # uint8 (blocks · in_features, outputs of a block + 8)
    _rows: Tensor  # int32, all rows of the table
    _starts: Tensor  # int32, the row where each sum begins
    _top: Tensor | None  # int32, the inputs of codes that stand for 128, output by output
    _top_starts: Tensor  # int32, the first of them of each output, and their number

    def _read_grid(self) -> None:
        super()._read_grid()
        self.register_buffer("_table", None, persistent=False)
        self.register_buffer("_top", None, persistent=False)
        codes, limit = self.codes, self.codes.numel() // SPARSE
        self._large = self._linear and codes.numel() >= SMALL and self.in_features <= LONGEST
        self._fast = self._large and (not self._wide or (_has_sparse() and int((codes == 127).sum()) <= limit))
        if not self._fast:
            return
        if self._wide:
            outputs, inputs = (codes == 127).nonzero(as_tuple=True)
            counts = outputs.bincount(minlength=self.out_features)
            self.register_buffer("_top", inputs.int(), persistent=False)
            self.register_buffer("_top_starts", functional.pad(counts.cumsum(0), (1, 0)).int(), persistent=False)
        exact = self._zero.dtype is torch.float32 and -126 <= self._step <= 119  # the scale, and 128 of it
        if self.activations == "float" and self.out_features >= NARROW and exact and _has_bags():
            self._tabulate()

    def _tabulate(self) -> None:
        """Replace the codes by the table."""
        n, k, device = self.out_features, self.in_features, self.codes.device
        blocks = -(-n // WIDTH)
        width = -(-n // blocks)
        offset = self._largest
        codes = functional.pad(self.codes.view(torch.uint8), (0, 0, 0, blocks * width - n)) + offset  # modulo 256
        tail = torch.tensor([self._scale, -offset * self._scale], device=device).view(torch.uint8)
        table = torch.cat([codes.view(blocks, width, k).transpose(1, 2), tail.expand(blocks, k, 8)], 2)
        sums = -(-k // SEGMENT)
        starts = torch.arange(sums, device=device) * k // sums + torch.arange(blocks, device=device)[:, None] * k
        self.register_buffer("_table", table.view(blocks * k, width + 8), persistent=False)
        self.register_buffer("_rows", torch.arange(blocks * k, dtype=torch.int32, device=device), persistent=False)
        self.register_buffer("_starts", starts.flatten().int(), persistent=False)
        del self.codes

    def _natural(self) -> Tensor:
        table = self._buffers.get("_table")
        if table is None:
            return super()._natural()
        codes = table[:, :-8].view(-1, self.in_features, table.shape[1] - 8).transpose(1, 2)
        return (codes.reshape(-1, self.in_features)[: self.out_features] - self._largest).view(torch.int8)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}codes"] = self._natural()

    def _load_from_state_dict(self, *args: Any) -> None:
        self.register_buffer("codes", self._natural())
        self._table = None
        super()._load_from_state_dict(*args)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Map (..., in_features) to (..., out_features)."""
        if not self._large or (self.activations == "float" and not self._multiplies_codes(input)):
            return functional.linear(input, self.weight, self.bias)
        rows = input.reshape(-1, self.in_features)
        product = self._multiply_int8(rows) if self.activations == "int8" else self._multiply(rows)
        if self.bias is not None:
            product += self.bias
        return product.reshape(*input.shape[:-1], self.out_features)

    def _multiplies_codes(self, x: Tensor) -> bool:
        """Whether the codes can be multiplied by as they are, which torch can neither compile nor differentiate."""
        if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype is not torch.float32:
            return False
        if self._zero.dtype is not x.dtype or x.numel() == 0 or torch.is_autocast_enabled("cpu"):
            return False
        ready = self._buffers["_table"] is not None if self.activations == "float" else self._fast and _has_fast_int8()
        return ready and not (torch.is_grad_enabled() and x.requires_grad)

    def _multiply(self, rows: Tensor) -> Tensor:
        """float32 products of ``rows``, float32 (m, in_features), with the weights."""
        m, k = rows.shape
        table = cast("Tensor", self._table)
        blocks = len(table) // k
        if m <= FEW_SUMS:
            bags = torch.ops.quantized.embedding_bag_byte_rowwise_offsets.default
            sums = [
                bags(table, self._rows, self._starts, False, 0, False, row.expand(blocks, k).reshape(-1))
                for row in rows.unbind()
            ]
            product = (sums[0] if m == 1 else torch.stack(sums)).view(m, blocks, -1, table.shape[1] - 8).sum(2)
            product = product.view(m, -1)
        else:  # block by block, which the cache holds
            decode = torch.ops.quantized.embedding_bag_byte_unpack.default
            product = torch.cat([rows @ decode(block) for block in table.view(blocks, k, -1)], 1)
        if product.shape[1] > self.out_features:
            product = product[:, : self.out_features]
        return self._add_top(product, rows, self._scale)

    def _multiply_int8(self, rows: Tensor) -> Tensor:
        """Products of ``rows`` (m, in_features), each rounded to multiples of max|x| / 127, with the weights."""
        scale = torch.linalg.vector_norm(rows, math.inf, 1, keepdim=True).div_(127)
        scale = scale.clamp_(min=torch.finfo(scale.dtype).tiny)
        scale = scale.masked_fill_(scale == math.inf, math.nan)
        rounded = (rows / scale).round_()
        if not self._multiplies_codes(rows):
            return functional.linear(rounded, self.weight).mul_(scale)
        parts = rounded.to(torch.int8).split(1 if len(rows) <= FEW_PRODUCTS else len(rows))
        codes = self.codes.t()
        product = torch.cat([torch._int_mm(part, codes) for part in parts]).to(rows.dtype)
        return self._add_top(product, rounded, 1).mul_(scale.mul_(self._scale))

    def _add_top(self, product: Tensor, rows: Tensor, step: float) -> Tensor:
        """Add once more, worth ``step``, what is to be multiplied by 128 and was by 127."""
        if (top := self._top) is None:
            return product
        size = (self.out_features, self.in_features)
        worth = rows.new_full((len(top),), step)
        missing = torch.sparse_csr_tensor(self._top_starts, top, worth, size, check_invariants=False)
        return product.add_((missing @ rows.t()).t())


@functools.cache
def _has_bags() -> bool:
    """Whether the quantized embedding bags are compiled for this processor, and not merely present."""
    return "fbgemm" in torch.backends.quantized.supported_engines


@functools.cache
def _has_sparse() -> bool:
    """Whether torch can multiply by sparse matrices here; it says once, unheard here, that they are in beta."""
    if not torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.eye(1).to_sparse_csr()
    return True


@functools.cache
def _has_fast_int8() -> bool:
    supported = getattr(torch.cpu, "_is_vnni_supported", None)  # private, as _int_mm is: torch may drop either
    return hasattr(torch, "_int_mm") and supported is not None and bool(supported()) and torch._C._has_mkldnn


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
