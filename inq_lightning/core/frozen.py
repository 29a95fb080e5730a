"""One parameter on its way to the grid: which of its weights are frozen, and at which values.

Works in any training loop: call :meth:`FrozenWeight.freeze` at each phase, :meth:`FrozenWeight.mask_gradient` after
each backward pass and :meth:`FrozenWeight.restore` after each optimizer step.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from inq_lightning.core import sharding
from inq_lightning.core.partition import Partition, scores, select
from inq_lightning.grid import (
    Exponent,
    PowerOfTwoGrid,
    Underflow,
    check_bits,
    check_exponent,
    check_floating,
    check_underflow,
    exponent_range,
)

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 18  # elements whose temporaries stay in a core's cache


class Rounding(NamedTuple):
    """What rounding a group of weights did: the sums of squares of the weights and of the changes."""

    signal: float
    noise: float


class FrozenWeight:
    """The grid of one parameter and its frozen weights.

    The parameter itself stays what it was: same name, same type, no hook, no buffer in its module. Two bytes a weight
    are kept beside it.

    Attributes:
        name: The parameter's name, for messages and for the random order.
        parameter: The parameter, plain or sharded (``DTensor``).
        bits: Code length of one weight, 2 to 8.
        underflow: See :class:`~inq_lightning.grid.PowerOfTwoGrid`.
        exponent: How the grid is fitted, see :meth:`~inq_lightning.grid.PowerOfTwoGrid.from_weights`.
        grid: The grid, fixed when the first weights freeze; None before.
        frozen: How many weights are frozen, over all shards.

    Raises:
        ValueError: ``bits``, ``underflow`` or ``exponent`` is none of the allowed values.
        TypeError: The parameter is not of a floating type.
    """

    def __init__(
        self,
        name: str,
        parameter: Tensor,
        bits: int = 5,
        underflow: Underflow = "nearest",
        exponent: Exponent = "max",
    ) -> None:
        check_bits(bits)
        check_underflow(underflow)
        check_exponent(exponent)
        check_floating(parameter)
        self.name = name
        self.parameter = parameter
        self.bits = bits
        self.underflow: Underflow = underflow
        self.exponent: Exponent = exponent
        self.grid: PowerOfTwoGrid | None = None
        self.frozen = 0
        self._kept = 0  # zeros of a pruned network, which portions do not count
        # Frozen weights' values; +0.0 marks a free weight, so a weight frozen at zero is kept as -0.0.
        # Powers of two are exact in bfloat16.
        self._set_values(torch.zeros_like(sharding.local(parameter), dtype=torch.bfloat16))

    @property
    def numel(self) -> int:
        """How many weights there are, over all shards."""
        return self.parameter.numel()

    @property
    def mask(self) -> Tensor:
        """bool, True where frozen; the local piece of a sharded parameter."""
        return _bits(self._values) != 0

    def keep_zeros(self, pruning_mask: Tensor | None = None) -> None:
        """Freeze at zero what is exactly zero now, and let portions count only the other weights.

        For a sharded parameter it is a collective call.

        Args:
            pruning_mask: Tensor of the parameter's shape, 0 where :mod:`torch.nn.utils.prune` has pruned.
        """
        weight = sharding.local(self.parameter)
        if pruning_mask is not None:
            weight.mul_(sharding.local_part(pruning_mask, self.parameter))
        new = (weight == 0).logical_and_(_bits(self._values) == 0)
        self._values[new] = -0.0
        kept = int(sharding.sum_over_shards(new.count_nonzero(), self.parameter))
        self._kept += kept
        self.frozen += kept

    def check(self) -> None:
        """Refuse weights that no grid can take; for a sharded parameter it is a collective call.

        Raises:
            ValueError: They contain nan or inf, or their dtype cannot hold the grid; the message names the parameter.
        """
        self._fit(sharding.local(self.parameter))

    def freeze(self, portion: float, partition: Partition = "magnitude", seed: int = 0) -> Rounding:
        """Round and freeze weights until round(portion · numel) are frozen; those frozen before count and stay.

        Zeros that :meth:`keep_zeros` has frozen do not count on either side.

        The first call that meets a weight other than zero fixes the grid. For a sharded parameter it is a collective
        call.

        Args:
            portion: Share of the weights to be frozen, 0 to 1.
            partition: Which weights come first, see :func:`inq_lightning.core.partition.scores`.
            seed: Seed of the random partition.

        Returns:
            What the rounding did to the newly frozen weights, over all shards.

        Raises:
            ValueError: The weights contain nan or inf, their dtype cannot hold the grid exactly, or ``portion`` is no
                share; the message names the parameter, and nothing has changed.
        """
        if not 0 <= portion <= 1:
            raise ValueError(f"{self.name}: the portion to freeze must lie between 0 and 1, got {portion}")
        weight = sharding.local(self.parameter)
        grid = self._fit(weight)
        count = frozen_count(portion, self.numel, self._kept) - self.frozen
        if count <= 0:
            return Rounding(0.0, 0.0)
        order = scores(self.parameter, partition, self.name, seed)
        chosen = select(order, _bits(self._values) == 0, count, like=self.parameter)
        if self.grid is not grid:
            self.grid = grid
            self._set_values(self._values.to(_storage_dtype(grid)))
        signal = noise = 0.0
        for w, new, (value, bits) in zip(_split(weight), _split(chosen), self._chunks, strict=True):
            before = w * new
            after = grid.round(before)  # 0, hence "free", for all the others
            signal += float(torch.linalg.vector_norm(before, dtype=torch.float64)) ** 2
            noise += float(torch.linalg.vector_norm(before - after, dtype=torch.float64)) ** 2
            sign = new.logical_and(after == 0).to(bits.dtype).bitwise_left_shift_(8 * value.element_size() - 1)
            bits.bitwise_or_(_bits(after.to(value.dtype))).bitwise_or_(sign)
        self.frozen += count
        self.restore()
        sums = torch.tensor([signal, noise], dtype=torch.float64, device=weight.device)
        return Rounding(*sharding.sum_over_shards(sums, self.parameter).tolist())

    def mask_gradient(self) -> None:
        """Zero the gradient of the frozen weights, whatever it holds, inf and nan included."""
        grad = self.parameter.grad
        if grad is None or grad.is_sparse or not self.frozen:
            return  # a sparse gradient has no entry for most weights; restore() takes care of the others
        grad = sharding.local(grad)
        if self.frozen == self.numel:
            grad.zero_()
            return
        if grad.device.type != "cpu":
            grad.masked_fill_(self.mask, 0.0)
            return
        # A shift by the bits of the value clears what is frozen in one vectorized pass, several times faster than a
        # masked fill: a free weight's bits are 0, which shifts nothing; those of a normal number are negative or exceed
        # the width of any word, for which PyTorch defines the result 0.
        for g, (_, bits) in zip(_split(_bits(grad)), self._chunks, strict=True):
            g.bitwise_left_shift_(bits)

    def restore(self) -> None:
        """Put the frozen weights back to their values, bit for bit, wherever an optimizer has moved them."""
        weight = sharding.local(self.parameter)
        if not self.frozen:
            return
        if weight.device.type != "cpu":
            weight.copy_(torch.where(self.mask, self._values.to(weight.dtype), weight))
            weight.add_(0.0)
            return
        if self.frozen == self.numel:
            weight.copy_(self._values).add_(0.0)  # -0.0 becomes +0.0
            return
        widened = weight.element_size() > self._values.element_size()
        exact = torch.empty(0)
        for w, (value, bits) in zip(_split(weight), self._chunks, strict=True):
            if exact.shape != w.shape:
                exact = torch.empty_like(w)
            exact.copy_(value)
            _bits(w).bitwise_left_shift_(_bits(exact) if widened else bits)  # as in mask_gradient
            w.add_(exact)  # free: x + 0.0; frozen: 0.0 + value, where -0.0 becomes +0.0

    def drifted(self) -> int:
        """How many frozen weights of the local piece differ from the values they were frozen at."""
        weight = sharding.local(self.parameter)
        values = self._values.to(weight.device)  # Lightning moves a trained module back to the CPU
        return int((weight != values).logical_and_(_bits(values) != 0).sum())

    def state_dict(self) -> dict[str, Any]:
        """Everything that the weights themselves do not tell, in plain numbers and one uint8 tensor.

        For a sharded parameter it is a collective call, and every process gets the whole mask.
        """
        mask = sharding.full(self.mask, self.parameter)
        return {
            "shape": list(self.parameter.shape),
            "bits": self.bits,
            "underflow": self.underflow,
            "n1": None if self.grid is None else self.grid.n1,
            "frozen": self.frozen,
            "kept": self._kept,
            "mask": pack_mask(mask).cpu(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state; the parameter must already hold the weights that were saved with it.

        Raises:
            ValueError: The state belongs to another kind of parameter, or the frozen weights are not on its grid.
        """
        own = {"shape": list(self.parameter.shape), "bits": self.bits, "underflow": self.underflow}
        for key, value in own.items():
            if state[key] != value:
                raise ValueError(f"{self.name}: {key} is {value} here but {state[key]} in the saved state")
        whole = unpack_mask(state["mask"], self.parameter.shape)
        if int(whole.count_nonzero()) != state["frozen"]:
            raise ValueError(
                f"{self.name}: the saved mask has {int(whole.count_nonzero())} weights, not {state['frozen']}"
            )
        mask = sharding.local_part(whole, self.parameter)
        weight = sharding.local(self.parameter)
        grid = PowerOfTwoGrid(state["n1"], self.bits, self.underflow) if state["frozen"] else None
        values = torch.zeros_like(weight, dtype=torch.bfloat16 if grid is None else _storage_dtype(grid))
        if grid is not None:
            frozen = weight[mask]
            moved = (grid.quantize(frozen.nan_to_num()) != frozen).count_nonzero()
            off = int(sharding.sum_over_shards(moved, self.parameter))
            if off:
                raise ValueError(
                    f"{self.name}: {off} weights that the saved state calls frozen are not on its grid; "
                    "the state and the weights do not belong together"
                )
            frozen = frozen.to(values.dtype)
            values[mask] = torch.where(frozen == 0, -0.0, frozen)
        self.grid, self.frozen, self._kept = grid, int(state["frozen"]), int(state["kept"])
        self._set_values(values)

    def _set_values(self, values: Tensor) -> None:
        self._values = values
        self._chunks = [(chunk, _bits(chunk)) for chunk in _split(values)]  # views, cut once and used at every step

    def _fit(self, weight: Tensor) -> PowerOfTwoGrid:
        """The grid in force, or the one that the weights ask for; refuses nan and inf in every process alike."""
        largest = weight.abs().max().double() if weight.numel() else weight.new_zeros((), dtype=torch.float64)
        largest = sharding.max_over_shards(largest.nan_to_num(nan=torch.inf, posinf=torch.inf), self.parameter)
        if self.grid is not None and self.grid.n1 is not None and torch.isfinite(largest):
            return self.grid  # whatever the weights have become since: they saturate
        try:
            grid = PowerOfTwoGrid.from_max(float(largest), weight.dtype, self.bits, self.underflow)
        except ValueError as error:
            diverged = "; otherwise go back to a checkpoint from before it diverged, and lower the learning rate"
            raise ValueError(f"{self.name}: {error}{'' if torch.isfinite(largest) else diverged}") from error
        if self.exponent == "max":
            return grid
        grids = grid.lower(weight.dtype)
        errors = torch.tensor([g.squared_error(weight) for g in grids], dtype=torch.float64, device=weight.device)
        return grids[int(sharding.sum_over_shards(errors, self.parameter).argmin())]


def frozen_count(portion: float, numel: int, kept: int = 0) -> int:
    """How many of ``numel`` weights a portion freezes, with ``kept`` zeros that it does not count."""
    return kept + round(portion * (numel - kept))


def pack_mask(mask: Tensor) -> Tensor:
    """Eight elements of a bool tensor to a byte, the first in the lowest bit; uint8 of shape (ceil(numel / 8),)."""
    flat = mask.reshape(-1).to(torch.uint8)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of :func:`pack_mask`.

    Raises:
        ValueError: ``packed`` has not the length that ``shape`` asks for.
    """
    numel = shape.numel()
    if packed.dtype != torch.uint8 or packed.shape != ((numel + 7) // 8,):
        raise ValueError(f"a packed mask of shape {tuple(shape)} takes {(numel + 7) // 8} bytes, got {packed.numel()}")
    bits = packed.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (bits & 1).bool().view(-1)[:numel].view(shape)


def _storage_dtype(grid: PowerOfTwoGrid) -> torch.dtype:
    """bfloat16 unless the grid leaves its normal numbers, whose bits `mask_gradient` counts on."""
    lowest, highest = -126, exponent_range(torch.bfloat16)[1]
    if grid.n1 is None or grid.n2 is None or (lowest <= grid.n2 and grid.n1 <= highest):
        return torch.bfloat16
    return torch.float64


def _bits(tensor: Tensor) -> Tensor:
    """The same memory seen as integers."""
    return tensor.view(_INTEGERS[tensor.element_size()])


def _split(tensor: Tensor) -> tuple[Tensor, ...]:
    """Views of cache size, the same cuts for tensors of the same shape, whatever their memory formats."""
    if tensor.dim() == 0:
        return (tensor,)
    rows = max(1, _CHUNK * tensor.shape[0] // max(tensor.numel(), 1))
    return torch.split(tensor, rows)
