"""One parameter on its way to the grid: which of its weights are frozen, and at which values.

Works in any training loop: call :meth:`FrozenWeight.freeze` at each phase, :meth:`FrozenWeight.mask_gradient` after
each backward pass and :meth:`FrozenWeight.restore` after each optimizer step.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from inq_lightning._common import one_of
from inq_lightning.core import sharding
from inq_lightning.core.layer import Layer
from inq_lightning.core.partition import Partition, scores, select
from inq_lightning.grid import Exponent, Grid, LevelsOption, PowerOfTwoGrid, Underflow, from_spec
from inq_lightning.grid.base import WHOLE, Reduction
from inq_lightning.grid.levels import LevelsLike, check_levels, choose_levels, zero_of
from inq_lightning.grid.power_of_two import check_bits, check_finite, check_floating, largest_magnitude
from inq_lightning.kernels import bits_of, kernel_for, split

MANY_ZEROS = 0.01  # a layer with a larger share of exact zeros than this gets levels with a zero, by "auto"


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
        levels: Which powers of two there are, see :class:`~inq_lightning.Options`.
        grid: The grid, fixed when the first weights freeze; None before.
        frozen: How many weights are frozen, over all shards.

    Raises:
        ValueError: ``bits``, ``underflow``, ``exponent`` or ``levels`` is none of the allowed values.
        TypeError: The parameter is not of a floating type.
    """

    def __init__(
        self,
        name: str,
        parameter: Tensor,
        bits: int = 5,
        underflow: Underflow = "nearest",
        exponent: Exponent = "auto",
        levels: LevelsOption = "auto",
    ) -> None:
        check_bits(bits)
        one_of("underflow", underflow, Underflow)
        one_of("exponent", exponent, Exponent)
        check_floating(parameter)
        self.name = name
        self.parameter = parameter
        self.bits = bits
        self.underflow: Underflow = underflow
        self.exponent: Exponent = exponent
        self.levels = check_levels("levels", levels, bits)
        self.grid: Grid | None = None
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
        return bits_of(self._values) != 0

    @property
    def values(self) -> Tensor:
        """What frozen weights are, in the shape of the local piece: +0.0 for a free one, -0.0 for one at zero."""
        return self._values

    @property
    def layer(self) -> Layer:
        """Where it stands, for the record."""
        return Layer(self.name, tuple(self.parameter.shape), self.bits, self.grid, self.frozen)

    def keep_zeros(self, pruning_mask: Tensor | None = None) -> None:
        """Freeze at zero what is exactly zero now, and let portions count only the other weights.

        For a sharded parameter it is a collective call.

        Args:
            pruning_mask: Tensor of the parameter's shape, 0 where :mod:`torch.nn.utils.prune` has pruned.

        Raises:
            ValueError: Its levels have no zero.
        """
        if self.levels != "auto" and not zero_of(self.levels):
            raise ValueError(f"{self.name}: levels={self.levels!r} have no zero to keep; write levels='full'")
        weight = sharding.local(self.parameter)
        if pruning_mask is not None:
            weight.mul_(sharding.local_part(pruning_mask, self.parameter))
        new = (weight == 0).logical_and_(bits_of(self._values) == 0)
        self._values[new] = -0.0
        self._set_values(self._values)
        kept = int(sharding.sum_over_shards(new.count_nonzero(), self.parameter))
        self._kept += kept
        self.frozen += kept

    def check(self) -> Grid:
        """Refuse weights that no grid can take; for a sharded parameter it is a collective call.

        Returns:
            The grid in force, or the one that the weights ask for now.

        Raises:
            ValueError: They contain nan or inf, or their dtype cannot hold the grid; the message names the parameter.
        """
        return self._fit(sharding.local(self.parameter))

    def lost(self, grid: Grid) -> float:
        """Share of the weights other than zero that ``grid`` rounds to zero, 0 to 1, over all shards; collective."""
        counts = torch.zeros(2, dtype=torch.int64, device=self.parameter.device)
        for w in split(sharding.local(self.parameter)):
            nonzero = w != 0
            counts += torch.stack([nonzero.logical_and(grid.round(w) == 0).count_nonzero(), nonzero.count_nonzero()])
        lost, some = map(int, sharding.sum_over_shards(counts, self.parameter))
        return lost / max(1, some)

    def zeros(self) -> float:
        """Share of the weights that are exactly zero, 0 to 1, over all shards; collective."""
        return zero_share(sharding.local(self.parameter), sharding.reduction(self.parameter))

    def freeze(
        self, portion: float, partition: Partition = "magnitude", seed: int = 0, grid: Grid | None = None
    ) -> Rounding:
        """Round and freeze weights until round(portion · numel) are frozen; those frozen before count and stay.

        Zeros that :meth:`keep_zeros` has frozen do not count on either side.

        The first call that meets a weight other than zero fixes the grid. For a sharded parameter it is a collective
        call.

        Args:
            portion: Share of the weights to be frozen, 0 to 1.
            partition: Which weights come first, see :func:`inq_lightning.core.partition.scores`.
            seed: Seed of the random partition.
            grid: What :meth:`check` has returned for the weights as they are, if it was called.

        Returns:
            What the rounding did to the newly frozen weights, over all shards.

        Raises:
            ValueError: The weights contain nan or inf, their dtype cannot hold the grid exactly, or ``portion`` is no
                share; the message names the parameter, and nothing has changed.
        """
        if not 0 <= portion <= 1:
            raise ValueError(f"{self.name}: the portion to freeze must lie between 0 and 1, got {portion}")
        weight = sharding.local(self.parameter)
        grid = grid or self._fit(weight)
        count = frozen_count(portion, self.numel, self._kept) - self.frozen
        if count <= 0:
            return Rounding(0.0, 0.0)
        order = scores(self.parameter, partition, self.name, seed)
        left = self.numel - self.frozen
        chosen = select(order, bits_of(self._values) == 0, count, like=self.parameter, candidates=left)
        self.grid = grid
        values = self._values.to(grid.storage_dtype)
        signal, noise = [], []
        holds_zero = 0 in grid.codes
        for w, new, value in zip(split(weight), split(chosen), split(values), strict=True):
            before = w * new
            after = grid.round(before)  # 0, hence "free", for all the others
            if not holds_zero:
                after.mul_(new).add_(0.0)  # -0.0 becomes +0.0
                before = before.double()  # the change of a weight near zero has more digits than its type
            signal.append(torch.linalg.vector_norm(before, dtype=torch.float64))
            noise.append(torch.linalg.vector_norm(before - after, dtype=torch.float64))
            bits = bits_of(value)
            sign = new.logical_and(after == 0).to(bits.dtype).bitwise_left_shift_(8 * value.element_size() - 1)
            bits.bitwise_or_(bits_of(after.to(value.dtype))).bitwise_or_(sign)
        self._set_values(values)
        self.frozen += count
        self.restore()
        sums = torch.stack([torch.stack(norms).square_().sum() for norms in (signal, noise)])
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
        self._kernel.mask_gradient(grad)

    def restore(self) -> None:
        """Put the frozen weights back to their values, bit for bit, wherever an optimizer has moved them."""
        weight = sharding.local(self.parameter)
        if not self.frozen:
            return
        if self.frozen == self.numel:
            weight.copy_(self._values).add_(0.0)  # -0.0 becomes +0.0
            return
        moved_away = self._values.device != weight.device  # Lightning moves a trained module back to the CPU
        (kernel_for(self._values.to(weight.device)) if moved_away else self._kernel).restore(weight)

    def drifted(self, copy: Tensor | None = None) -> int:
        """How many frozen weights of the local piece differ from the values they were frozen at.

        Args:
            copy: Look at this tensor of the parameter's shape instead, one that was saved for instance.
        """
        weight = sharding.local(self.parameter if copy is None else copy)
        counts = []
        for w, value in zip(split(weight), split(self._values.to(weight.device)), strict=True):
            off = w != value
            counts.append((off if self.frozen == self.numel else off.logical_and_(bits_of(value) != 0)).count_nonzero())
        return int(torch.stack(counts).sum())

    def state_dict(self) -> dict[str, Any]:
        """Everything that the weights themselves do not tell, in plain numbers and one uint8 tensor.

        For a sharded parameter it is a collective call, and every process gets the whole mask.
        """
        mask = sharding.full(self.mask, self.parameter)
        return {
            "shape": list(self.parameter.shape),
            "bits": self.bits,
            "underflow": self.underflow,
            "grid": None if self.grid is None else self.grid.spec(),
            "frozen": self.frozen,
            "kept": self._kept,
            "mask": pack_mask(mask),
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
        grid = None if state["grid"] is None else from_spec(state["grid"])
        frozen = weight[mask]
        expected = (grid or PowerOfTwoGrid(None, self.bits)).quantize(frozen.nan_to_num())  # without one: zeros kept
        off = int(sharding.sum_over_shards((expected != frozen).count_nonzero(), self.parameter))
        if off:
            raise ValueError(
                f"{self.name}: {off} weights that the saved state calls frozen are not on its grid; "
                "the state and the weights do not belong together"
            )
        values = torch.zeros_like(weight, dtype=torch.bfloat16 if grid is None else grid.storage_dtype)
        frozen = frozen.to(values.dtype)
        values[mask] = torch.where(frozen == 0, -0.0, frozen)
        self.grid, self.frozen, self._kept = grid, int(state["frozen"]), int(state["kept"])
        self._set_values(values)

    def _set_values(self, values: Tensor) -> None:
        self._values = values
        self._kernel = kernel_for(values)

    def _fit(self, weight: Tensor) -> Grid:
        """The grid in force, or the one that the weights ask for; refuses nan and inf in every process alike."""
        reduce = sharding.reduction(self.parameter)
        try:
            if self.grid is None or len(self.grid.codes) == 1:  # of zeros, which holds nothing else
                zero = self.underflow == "truncate" or bool(self._kept)
                family = fit_levels(weight, self.bits, self.levels, zero, reduce)
                return PowerOfTwoGrid.from_weights(weight, self.bits, self.underflow, self.exponent, family, reduce)
            check_finite(largest_magnitude(weight, reduce))
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error
        return self.grid  # whatever the weights have become since: they saturate


def fit_levels(
    weight: Tensor, bits: int, levels: LevelsOption, zero: bool = False, reduce: Reduction = WHOLE
) -> LevelsLike:
    """What ``"auto"`` stands for in one tensor; other levels stand for themselves.

    Args:
        weight: Its weights; of a sharded tensor, the local piece.
        bits: Code length of one weight.
        levels: The option.
        zero: Whether a weight must be able to be zero, whatever the weights are.
        reduce: How what is found in the local piece becomes what holds for all shards.
    """
    chosen = choose_levels(levels, bits, zero)
    if levels != "auto" or zero_of(chosen):
        return chosen
    return choose_levels(levels, bits, zero=zero_share(weight, reduce) > MANY_ZEROS)


def zero_share(weight: Tensor, reduce: Reduction = WHOLE) -> float:
    """Share of weights that are exactly zero, 0 to 1, over all shards; 0 where they have no memory yet."""
    if weight.is_meta:
        return 0.0
    counts = torch.stack([(weight == 0).count_nonzero(), torch.tensor(weight.numel(), device=weight.device)])
    zeros, all_weights = reduce.sum(counts).tolist()
    return float(zeros / max(1, all_weights))


def frozen_count(portion: float, numel: int, kept: int = 0) -> int:
    """How many of ``numel`` weights a portion freezes, with ``kept`` zeros that it does not count."""
    return kept + round(portion * (numel - kept))


def pack_mask(mask: Tensor) -> Tensor:
    """Eight elements of a bool tensor to a byte, the first in the lowest bit; uint8 of shape (ceil(numel / 8),)."""
    return torch.from_numpy(np.packbits(mask.reshape(-1).numpy(force=True), bitorder="little"))


def unpack_mask(packed: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of :func:`pack_mask`.

    Raises:
        ValueError: ``packed`` has not the length that ``shape`` asks for.
    """
    numel = shape.numel()
    if packed.dtype != torch.uint8 or packed.shape != ((numel + 7) // 8,):
        raise ValueError(f"a packed mask of shape {tuple(shape)} takes {(numel + 7) // 8} bytes, got {packed.numel()}")
    bits = np.unpackbits(packed.numpy(force=True), count=numel, bitorder="little")
    return torch.from_numpy(bits.view(np.bool_)).view(shape)
