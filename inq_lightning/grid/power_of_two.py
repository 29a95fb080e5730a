"""The grid of one tensor: which values its weights may take, and how a weight is rounded to them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from inq_lightning._common import one_of
from inq_lightning.grid.base import FLOATS, WHOLE, Reduction
from inq_lightning.grid.levels import Levels, LevelsLike, levels_of, name_of

Underflow = Literal["nearest", "truncate"]
Exponent = Literal["auto", "max", "mse"]

MIN_BITS, MAX_BITS = 2, 8
# Up to here least error pays: by the largest weight 2 and 3 bits fail, and 4 have a third more error, docs/results.md.
_FEW_BITS = 4


def check_bits(bits: int) -> None:
    """Refuse a bit width that no grid has.

    Raises:
        ValueError: ``bits`` is not an integer from 2 to 8.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"bits must be an integer from {MIN_BITS} to {MAX_BITS}, got {bits!r}")


def fit_rule(exponent: Exponent, bits: int) -> Literal["max", "mse"]:
    """The rule that fits a grid of so many bits: ``"auto"`` is ``"mse"`` up to 4 bits and ``"max"`` from 5 on."""
    if exponent == "auto":
        return "mse" if bits <= _FEW_BITS else "max"
    return exponent


@dataclass(frozen=True)
class PowerOfTwoGrid:
    """Powers of two, their negatives and zero: the values of one tensor (Zhou et al., ICLR 2017, section 2.1).

    By default they are 0 and ±2^k for n2 ≤ k ≤ n1.

    Attributes:
        n1: Exponent of the largest level; None for a tensor of zeros, whose only level is 0.
        bits: Code length of one weight, 2 to 8.
        underflow: What becomes of weights below the smallest level: ``"nearest"`` rounds at half of it (equation 4),
            ``"truncate"`` sends all of them to zero (the paper's text).
        family: Which powers of two there are, and whether there is a zero; see
            :func:`~inq_lightning.grid.levels.levels_of`.

    Raises:
        ValueError: An attribute is none of the allowed values; zeros, or ``underflow="truncate"``, without a zero.
    """

    n1: int | None
    bits: int = 5
    underflow: Underflow = "nearest"
    family: LevelsLike = "paper"
    _family: Levels = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.n1 is not None and type(self.n1) is not int:
            raise ValueError(f"n1 must be a whole number or None, got {self.n1!r}")
        check_bits(self.bits)
        one_of("underflow", self.underflow, Underflow)
        family = levels_of(self.family, self.bits)
        object.__setattr__(self, "family", name_of(family, self.bits))
        object.__setattr__(self, "_family", family)
        if not family.zero and (self.n1 is None or self.underflow == "truncate"):
            what = "a tensor of zeros" if self.n1 is None else "underflow='truncate'"
            raise ValueError(f"{what} needs a zero, which levels={self.family!r} lacks; use levels='full'")

    @classmethod
    def from_weights(
        cls,
        w: Tensor,
        bits: int = 5,
        underflow: Underflow = "nearest",
        exponent: Exponent = "max",
        family: LevelsLike = "paper",
        reduce: Reduction = WHOLE,
    ) -> PowerOfTwoGrid:
        """Fit the grid to the weights.

        Args:
            w: Weights of any shape, floating point; of a sharded tensor, the local piece.
            bits: Code length of one weight.
            underflow: See the class.
            exponent: How n1 is chosen. ``"max"``: by the largest weight, n1 = floor(log2(4·max|w| / 3)) (equation 2),
                computed exactly. ``"mse"``: that one or a lower one, whichever rounds the weights with the least
                squared error; the few weights beyond it saturate. ``"auto"``: see :func:`fit_rule`.
            family: See the class.
            reduce: How what is found in the local piece becomes what holds for all shards.

        Raises:
            ValueError: ``w`` is not finite, its dtype cannot hold the grid exactly, or ``exponent`` is unknown; the
                same in every process that holds a shard.
        """
        one_of("exponent", exponent, Exponent)
        check_floating(w)
        grid = cls.from_max(largest_magnitude(w, reduce), w.dtype, bits, underflow, family)
        if fit_rule(exponent, bits) == "max":
            return grid
        grids = grid.lower(w.dtype)
        errors = torch.stack([torch.linalg.vector_norm(w - g.round(w), dtype=torch.float64) for g in grids]).square_()
        return grids[int(reduce.sum(errors).argmin())]

    @classmethod
    def from_max(
        cls,
        s: float,
        dtype: torch.dtype,
        bits: int = 5,
        underflow: Underflow = "nearest",
        family: LevelsLike = "paper",
    ) -> PowerOfTwoGrid:
        """Fit the grid to the largest magnitude ``s`` of a tensor of type ``dtype``, as :meth:`from_weights` does.

        Raises:
            ValueError: ``s`` is not finite, or ``dtype`` cannot hold the grid exactly.
        """
        check_finite(s)
        if s == 0:
            return cls(None, bits, underflow, family)
        m, e = math.frexp(s)  # s = m·2^e with m in [0.5, 1), so 4s/3 is at least 2^e exactly when m ≥ 3/4
        grid = cls(e if m >= 0.75 else e - 1, bits, underflow, family)
        grid.check_dtype(dtype)
        return grid

    def lower(self, dtype: torch.dtype) -> list[PowerOfTwoGrid]:
        """This grid and the next ones with smaller n1, down to 2^-7 of it, as far as ``dtype`` holds them."""
        if self.n1 is None or self.n2 is None:
            return [self]
        room = max(self.n2 - exponent_range(dtype)[0], 0)
        return [replace(self, n1=self.n1 - k) for k in range(min(room, 7) + 1)]

    def squared_error(self, w: Tensor) -> float:
        """Sum of the squared changes that rounding makes to finite weights, in float64."""
        return float(torch.linalg.vector_norm(w - self.round(w), dtype=torch.float64)) ** 2

    @property
    def n2(self) -> int | None:
        """Exponent of the smallest non-zero level (the paper's: n1 + 1 - 2^(bits-2)); None where ``n1`` is."""
        return None if self.n1 is None else self.n1 - self._family.exponents[-1]

    @property
    def magnitudes(self) -> int:
        """How many non-zero magnitudes there are (the paper's: 2^(bits-2))."""
        return len(self._family.exponents)

    @property
    def has_zero(self) -> bool:
        """Whether 0 is a level."""
        return self._family.zero

    @property
    def codes(self) -> Sequence[int]:
        """All codes, ascending: 0 for zero, ±k for the k-th magnitude from below, with either sign."""
        largest = 0 if self.n1 is None else self.magnitudes
        return [code for code in range(-largest, largest + 1) if code or self.has_zero]

    @property
    def step(self) -> int:
        """Exponent of the unit, n2: every level is an integer times 2^n2; 0 for a grid of zeros."""
        return 0 if self.n2 is None else self.n2

    @property
    def storage_dtype(self) -> torch.dtype:
        """bfloat16, in which powers of two are exact, unless the grid leaves its normal numbers; then float64."""
        normal = self.n1 is None or self.n2 is None or (self.n2 >= -126 and self.n1 <= 127)
        return torch.bfloat16 if normal else torch.float64

    @property
    def levels(self) -> Tensor:
        """All values of the grid, ascending: float64, exact, 1-D; (0,) alone for a grid of zeros."""
        return self.decode(torch.tensor(self.codes), torch.float64)

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Refuse a dtype that cannot hold every level exactly.

        Raises:
            ValueError: A level lies outside the dtype's powers of two.
        """
        if self.n1 is None or self.n2 is None:
            return
        lowest, highest = exponent_range(dtype)
        if self.n2 < lowest or self.n1 > highest:
            raise ValueError(
                f"{dtype} cannot hold the {self.bits}-bit grid ±2^{self.n2} … ±2^{self.n1} exactly: its powers of two "
                f"go from 2^{lowest} to 2^{highest}; use fewer bits or keep the weights in a wider dtype"
            )

    def quantize(self, w: Tensor) -> Tensor:
        """Round every weight to its level (equation 4); same shape, dtype, device and memory format as ``w``.

        A weight goes to the nearest level, a tie to the larger one; beyond 2^n1 it saturates.

        Raises:
            ValueError: ``w`` contains nan or inf, or its dtype cannot hold the grid exactly.
        """
        check_floating(w)
        self.check_dtype(w.dtype)
        if not torch.isfinite(w).all():
            raise ValueError("the weights contain nan or inf, which have no place on a grid")
        return self.round(w.detach())

    def round(self, w: Tensor) -> Tensor:
        """:meth:`quantize` for weights that are known to be finite, in a dtype that is known to hold the grid."""
        if self.n1 is None or self.n2 is None:
            return torch.zeros_like(w)
        # Wide enough that all levels are normal numbers, whose bits the next step reads.
        magnitude = w.abs().to(torch.float64 if w.dtype is torch.float64 or self.n2 < -125 else torch.float32)
        if self._family.consecutive:
            level = _nearest_power(magnitude).clamp_(math.ldexp(1.0, self.n2), math.ldexp(1.0, self.n1))
        else:
            levels = self._magnitudes(magnitude)
            between = (levels[1:] + levels[:-1]) / 2
            level = levels[torch.bucketize(magnitude, between, right=True)]  # a tie goes up
        if not self.has_zero:
            return level.to(w.dtype).copysign_(w + 0.0)  # -0.0 + 0.0 is +0.0: zeros of either sign are rounded alike
        # Under the smallest level β = 2^n2 the lower neighbour is 0, not β/2: from β/2 upwards all goes to β.
        lowest = math.ldexp(1.0, self.n2 - 1 if self.underflow == "nearest" else self.n2)
        return level.mul_(magnitude >= lowest).to(w.dtype).copysign_(w).add_(0.0)

    def encode(self, w: Tensor) -> Tensor:
        """Round to the grid, as :meth:`quantize` does, and return :attr:`codes`.

        Args:
            w: Finite weights of any shape, floating point.

        Returns:
            int8 codes from -magnitudes to magnitudes, in the shape and memory format of ``w``.

        Raises:
            ValueError: ``w`` contains nan or inf, or its dtype cannot hold the grid exactly.
        """
        level = self.quantize(w).double()
        if self.n2 is None:
            return level.to(torch.int8)
        above = torch.frexp(level).exponent - 1 - self.n2  # level = ±1/2 · 2^exponent
        if not self._family.consecutive:
            above = torch.bucketize(above, torch.tensor(self._family.exponents, device=above.device))
        return (above + 1).mul_(level.sign().to(above.dtype)).to(torch.int8)

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the values that ``codes`` stand for.

        Args:
            codes: Integer codes of any shape, as :meth:`encode` returns them.
            dtype: Type of the result.

        Returns:
            Values on the grid, in the shape and memory format of ``codes``.

        Raises:
            ValueError: A code lies outside the grid, or ``dtype`` cannot hold the grid exactly.
        """
        self.check_dtype(dtype)
        lowest, highest = self.codes[0], self.codes[-1]
        if codes.numel() and (codes.max() > highest or codes.min() < lowest):
            raise ValueError(f"codes of this {self.bits}-bit grid go from {lowest} to {highest}")
        if not self.has_zero and not codes.all():
            raise ValueError(f"codes of this {self.bits}-bit grid are not 0: it has no zero")
        positive = torch.zeros(0) if self.n2 is None else self._magnitudes(torch.empty(0, dtype=torch.float64))
        return _by_code(codes, positive.to(dtype))

    def multiples(self, codes: Tensor) -> Tensor:
        """The integers that codes stand for in units of 2^step: 0, ±1, ±2, ±4 …; float64, which holds all exactly."""
        return _by_code(codes, torch.tensor([2.0**k for k in self._family.exponents], dtype=torch.float64))

    def spec(self) -> dict[str, Any]:
        """The grid as plain JSON values; :func:`~inq_lightning.grid.from_spec` makes it again.

        What is usual is left out: small files count it.
        """
        spec: dict[str, Any] = {"kind": "power_of_two", "n1": self.n1, "bits": self.bits}
        if self.underflow != "nearest":
            spec["underflow"] = self.underflow
        if self.family != "paper":
            spec["family"] = asdict(self.family) if isinstance(self.family, Levels) else self.family
        return spec

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> PowerOfTwoGrid:
        """The inverse of :meth:`spec`; TypeError or ValueError where it is none."""
        values = {name: value for name, value in spec.items() if name != "kind"}
        if isinstance(family := values.get("family"), Mapping):
            values["family"] = Levels(**family)
        return cls(**values)

    def _magnitudes(self, like: Tensor) -> Tensor:
        """The magnitudes, ascending, in the dtype and on the device of ``like``."""
        return like.new_tensor([math.ldexp(1.0, self.step + k) for k in self._family.exponents])


def _nearest_power(magnitude: Tensor) -> Tensor:
    """The power of two nearest to each of some normal numbers, a tie going up; float32 or float64."""
    integer, fraction = (torch.int64, 52) if magnitude.dtype is torch.float64 else (torch.int32, 23)
    # The exponent bits, after adding half a unit to them, are those of the nearest power of two: 1.5·2^k is rounded up
    # to 2^(k+1), anything smaller down to 2^k.
    return magnitude.view(integer).add(1 << fraction - 1).bitwise_and_(-1 << fraction).view(magnitude.dtype)


def _by_code(codes: Tensor, positive: Tensor) -> Tensor:
    """What each code stands for, given what the positive ones do; in the memory format of ``codes``."""
    # Indexed by the code itself: a negative code counts from the end.
    table = torch.cat([positive.new_zeros(1), positive, -positive.flip(0)]).to(codes.device)
    return torch.empty_like(codes, dtype=table.dtype).copy_(table[codes.int()])


def largest_magnitude(w: Tensor, reduce: Reduction = WHOLE) -> float:
    """The largest |w| of all shards; inf where there is nan or inf."""
    largest = w.abs().max().double() if w.numel() else w.new_zeros((), dtype=torch.float64)
    return float(reduce.max(largest.nan_to_num(nan=torch.inf, posinf=torch.inf)))


def check_finite(s: float) -> None:
    """Refuse weights whose largest magnitude ``s`` is not finite.

    Raises:
        ValueError: It is nan or inf.
    """
    if not math.isfinite(s):
        raise ValueError(
            "the weights contain nan or inf; quantize a network whose training has not diverged, or go back to a "
            "checkpoint from before it did, and lower the learning rate"
        )


def check_floating(w: Tensor) -> None:
    """Refuse anything but float16, bfloat16, float32 and float64.

    Raises:
        TypeError: ``w`` has another dtype.
    """
    if w.dtype not in FLOATS:
        raise TypeError(f"weights must be float16, bfloat16, float32 or float64, got {w.dtype}")


def exponent_range(dtype: torch.dtype) -> tuple[int, int]:
    """Exponents of the smallest and the largest power of two that ``dtype`` holds exactly.

    Subnormal numbers count, except in float64, which has no wider type to keep them safe in.
    """
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * (1.0 if dtype is torch.float64 else info.eps)
    return math.frexp(smallest)[1] - 1, math.frexp(info.max)[1] - 1
