"""What an integer network is made of: each operation in whole numbers, which defines it, and the same in floats.

A value is int32, or whole numbers in a floating type, of shape (batch, channels, height, width) or (batch, features).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from inq_lightning.integer.scaling import Scaling

Pair: TypeAlias = tuple[int, int]

EXACT = {torch.float32: 1 << 24, torch.float64: 1 << 53}  # below which whole numbers are exact


class Counts(NamedTuple):
    """Operations for one input.

    Attributes:
        multiplications: Those of the network in floats that are gone.
        additions: Additions and subtractions of whole numbers.
        shifts: Shifts of whole numbers.
    """

    multiplications: int = 0
    additions: int = 0
    shifts: int = 0


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One operation.

    Attributes:
        name: The layer that it was.
        sources: Places of the values that it takes: 0 is the network's input, k the result of the k-th operation.
        shape: Shape of its result, without the batch.
        exponent: A result of q stands for q · 2^exponent.
        low: Least result that it can have.
        high: Largest result.
        peak: The largest magnitude on the way to a result.
    """

    name: str
    sources: tuple[int, ...]
    shape: tuple[int, ...]
    exponent: int
    low: int
    high: int
    peak: int

    def run(self, *values: Tensor) -> Tensor:
        """The definition: int32 in, int32 out."""
        raise NotImplementedError

    def floats(self, *values: Tensor) -> Tensor:
        """The same with whole numbers of a floating type, equal wherever that type holds ``peak`` exactly."""
        raise NotImplementedError

    @property
    def summed(self) -> int:
        """The largest magnitude that :meth:`floats` computes in the type of its arguments."""
        return self.peak

    def counts(self) -> Counts:
        """What it takes for one input."""
        return Counts()

    @property
    def elements(self) -> int:
        """How many numbers its result has."""
        return int(torch.Size(self.shape).numel())


@dataclass(frozen=True, kw_only=True)
class Scaled(Operation):
    """An operation whose sums are scaled.

    Attributes:
        scaling: From a sum to the result.
        sums: The largest magnitude of a sum.
    """

    scaling: Scaling
    sums: int

    @property
    @override
    def summed(self) -> int:
        return self.sums

    def accumulate(self, *values: Tensor) -> Tensor:
        """The sums: int32."""
        raise NotImplementedError

    def accumulate_floats(self, *values: Tensor) -> Tensor:
        """The sums: whole numbers of a floating type."""
        raise NotImplementedError

    @override
    def run(self, *values: Tensor) -> Tensor:
        return self.scaling.run(self.accumulate(*values))

    @override
    def floats(self, *values: Tensor) -> Tensor:
        sums, scaling = self.accumulate_floats(*values), self.scaling
        if self.peak >= EXACT[sums.dtype]:
            sums = sums.double()
        shape = (1, -1) + (1,) * (sums.dim() - 2)
        factors, bias = (t.to(sums).view(shape) for t in (scaling.factors, scaling.bias))
        steps = torch.exp2(-scaling.rights.double()).to(sums).view(shape)
        result = ((sums * factors + bias) * steps).round().clamp(scaling.low, scaling.high)
        return result.to(values[0].dtype) if max(-self.low, self.high) < EXACT[values[0].dtype] else result

    @override
    def counts(self) -> Counts:
        scaling, each = self.scaling, self.elements // max(self.shape[0], 1)
        channels = self.shape[0] // len(scaling.bias)  # that share one scaling
        terms = int(scaling.signs.count_nonzero()) * each * channels
        biases = int(scaling.bias.count_nonzero()) * each * channels
        shifts = int((scaling.lefts > 0).count_nonzero() + (scaling.rights > 0).count_nonzero()) * each * channels
        scaled = int((scaling.factors != 1).count_nonzero()) * each * channels
        return Counts(scaled, max(terms - self.elements, 0) + biases, shifts)


@dataclass(frozen=True, kw_only=True)
class Product(Scaled):
    """A convolution or a linear layer.

    Attributes:
        weight: 0 or ± powers of two: int32 of shape (out, in / groups, height, width) or (out, in).
        unit: A weight of w stands for w · 2^unit.
        bits: Code length of one weight.
        stride: Of a convolution.
        padding: Zeros left, right, above and below.
        dilation: Of a convolution.
        groups: Of a convolution.
    """

    weight: Tensor
    unit: int
    bits: int
    stride: Pair = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    @override
    def accumulate(self, *values: Tensor) -> Tensor:
        (x,) = values
        if self.weight.dim() == 2:
            return x @ self.weight.T  # a shift and an addition for each weight: ± powers of two
        out, _, *kernel = self.weight.shape
        columns = windows(functional.pad(x, self.padding), (kernel[0], kernel[1]), self.stride, self.dilation)
        batch, _, height, width = columns.shape[:4]
        columns = columns.permute(0, 2, 3, 1, 4, 5).reshape(batch * height * width, self.groups, -1)
        weight = self.weight.reshape(self.groups, out // self.groups, -1)
        sums = torch.stack([columns[:, g] @ weight[g].T for g in range(self.groups)], 1)
        return sums.reshape(batch, height, width, out).permute(0, 3, 1, 2)

    @override
    def accumulate_floats(self, *values: Tensor) -> Tensor:
        (x,) = values
        weight = self.weight.to(x)
        if weight.dim() == 2:
            return functional.linear(x, weight)
        return functional.conv2d(
            functional.pad(x, self.padding), weight, None, self.stride, 0, self.dilation, self.groups
        )

    @override
    def counts(self) -> Counts:
        positions = self.elements // max(self.shape[0], 1)
        ones = int(self.weight.count_nonzero())
        products = Counts(
            self.weight.numel() * positions, ones * positions, int((self.weight.abs() > 1).count_nonzero()) * positions
        )
        return Counts(*(a + b for a, b in zip(products, super().counts(), strict=True)))


@dataclass(frozen=True, kw_only=True)
class Scale(Scaled):
    """A normalization, or an activation, on its own."""

    @override
    def accumulate(self, *values: Tensor) -> Tensor:
        return values[0]

    accumulate_floats = accumulate


@dataclass(frozen=True, kw_only=True)
class Sum(Scaled):
    """The sum of two values.

    Attributes:
        lefts: Shifts that bring both to one step.
    """

    lefts: Pair

    @override
    def accumulate(self, *values: Tensor) -> Tensor:
        return (values[0] << self.lefts[0]) + (values[1] << self.lefts[1])

    @override
    def accumulate_floats(self, *values: Tensor) -> Tensor:
        return values[0] * 2.0 ** self.lefts[0] + values[1] * 2.0 ** self.lefts[1]

    @override
    def counts(self) -> Counts:
        shifts = sum(left > 0 for left in self.lefts) * self.elements
        own = super().counts()
        return own._replace(additions=own.additions + self.elements, shifts=own.shifts + shifts)


@dataclass(frozen=True, kw_only=True)
class Average(Scaled):
    """The sum over a window; the scaling divides it.

    Attributes:
        kernel: Height and width of the window.
        stride: Of the window.
        padding: Rows and columns of zeros at each side, which count.
    """

    kernel: Pair
    stride: Pair
    padding: Pair = (0, 0)

    @override
    def accumulate(self, *values: Tensor) -> Tensor:
        (rows, columns), (x,) = self.padding, values
        return windows(functional.pad(x, (columns, columns, rows, rows)), self.kernel, self.stride).sum(
            (4, 5), dtype=x.dtype
        )

    @override
    def accumulate_floats(self, *values: Tensor) -> Tensor:
        return functional.avg_pool2d(values[0], self.kernel, self.stride, self.padding, divisor_override=1)

    @override
    def counts(self) -> Counts:
        own = super().counts()
        window = self.kernel[0] * self.kernel[1]
        return own._replace(additions=own.additions + (window - 1) * self.elements)


@dataclass(frozen=True, kw_only=True)
class Max(Operation):
    """The largest value of a window.

    Attributes:
        kernel: Height and width of the window.
        stride: Of the window.
        padding: Rows and columns at each side that do not count.
        dilation: Of the window.
    """

    kernel: Pair
    stride: Pair
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)

    @override
    def run(self, *values: Tensor) -> Tensor:
        rows, columns = self.padding
        padded = functional.pad(values[0], (columns, columns, rows, rows), value=self.low)
        return windows(padded, self.kernel, self.stride, self.dilation).amax((4, 5))

    @override
    def floats(self, *values: Tensor) -> Tensor:
        return functional.max_pool2d(values[0], self.kernel, self.stride, self.padding, self.dilation)


@dataclass(frozen=True, kw_only=True)
class Reshape(Operation):
    """The same values in another shape."""

    @override
    def run(self, *values: Tensor) -> Tensor:
        return values[0].reshape(-1, *self.shape)

    floats = run


@dataclass(frozen=True, kw_only=True)
class Pad(Operation):
    """Zeros around a value.

    Attributes:
        amounts: How many before and behind, from the last dimension on, as torch counts.
    """

    amounts: tuple[int, ...]

    @override
    def run(self, *values: Tensor) -> Tensor:
        return functional.pad(values[0], self.amounts)

    floats = run


@dataclass(frozen=True, kw_only=True)
class Slice(Operation):
    """A part of a value.

    Attributes:
        slices: Start, stop and step for each dimension but the batch.
    """

    slices: tuple[tuple[int, int, int], ...]

    @override
    def run(self, *values: Tensor) -> Tensor:
        index = (slice(None), *(slice(*one) for one in self.slices))
        return values[0][index]

    floats = run


@dataclass(frozen=True, kw_only=True)
class Concat(Operation):
    """Several values behind one another.

    Attributes:
        lefts: Shifts that bring all to one step.
        axis: Dimension, counted with the batch.
    """

    lefts: tuple[int, ...]
    axis: int

    @override
    def run(self, *values: Tensor) -> Tensor:
        return torch.cat([x << left for x, left in zip(values, self.lefts, strict=True)], self.axis)

    @override
    def floats(self, *values: Tensor) -> Tensor:
        return torch.cat([x * 2.0**left for x, left in zip(values, self.lefts, strict=True)], self.axis)

    @override
    def counts(self) -> Counts:
        return Counts(shifts=self.elements if any(self.lefts) else 0)


def windows(x: Tensor, kernel: Pair, stride: Pair, dilation: Pair = (1, 1)) -> Tensor:
    """Windows over (batch, channels, height, width): (batch, channels, rows, columns, height and width of a window)."""
    rows, columns = (
        torch.arange(0, size - step * (length - 1), pace)[:, None] + step * torch.arange(length)
        for size, length, pace, step in zip(x.shape[2:], kernel, stride, dilation, strict=True)
    )
    return x[:, :, rows[:, None, :, None], columns[None, :, None, :]]
