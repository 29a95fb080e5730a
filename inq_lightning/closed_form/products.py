"""How PyTorch's functions multiply their inputs by a weight: each as a product of matrices, with groups in front.

A layout turns a weight into a matrix (groups, outputs, inputs), what goes in into rows (groups, rows, inputs), and what
comes out, without the bias, into rows (groups, rows, outputs) that are the product of the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

_ROWS = 1 << 24  # numbers in the rows that are made at a time


@dataclass(frozen=True)
class Linear:
    """``x @ weight.T``, or ``x @ weight`` where ``inner``, or one of several weights that are stacked in one tensor."""

    inner: bool = False
    stacked: int = 1

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as a matrix (groups, outputs, inputs)."""
        weight = weight.mT if self.inner else weight
        return weight.reshape(self.stacked, -1, weight.shape[1])

    def weight(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of :meth:`matrix`."""
        matrix = matrix.flatten(0, 1)
        return (matrix.mT if self.inner else matrix).reshape(shape)

    def rows(self, x: Tensor, *outputs: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The rows that go in, piece by piece, each with those of the outputs."""
        step = max(1, _ROWS // x.shape[-1])
        yield from zip(*(torch.split(t.reshape(1, -1, t.shape[-1]), step, 1) for t in (x, *outputs)), strict=True)


@dataclass(frozen=True)
class Convolution:
    """A convolution of one to three dimensions; a transposed one spreads its input out first.

    Attributes:
        kernel: Size of the kernel.
        padding: Zeros before and behind each dimension.
        stride: Step of the kernel.
        dilation: Distance of the kernel's points.
        groups: Number of groups.
        spread: Distance at which the input's points are put, for a transposed convolution; else None.
    """

    kernel: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    spread: tuple[int, ...] | None = None

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as a matrix (groups, outputs, inputs)."""
        weight = weight.reshape(self.groups, -1, *weight.shape[1:])
        if self.spread is None:
            return weight.flatten(2)
        return weight.flip(self._points).transpose(1, 2).flatten(2)

    def weight(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of :meth:`matrix`."""
        matrix = matrix.reshape(*matrix.shape[:2], -1, *self.kernel)
        if self.spread is not None:
            matrix = matrix.transpose(1, 2).flip(self._points)
        return matrix.reshape(shape)

    def rows(self, x: Tensor, *outputs: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The rows that go in, piece by piece, each with those of the outputs."""
        dims = len(self.kernel)
        if x.dim() == dims + 1:
            x, outputs = x[None], tuple(y[None] for y in outputs)
        per_image = math.prod(outputs[0].shape[2:]) * x.shape[1] * math.prod(self.kernel)
        step = max(1, _ROWS // per_image)
        for part, *results in zip(*(torch.split(t, step) for t in (x, *outputs)), strict=True):
            yield self._unfold(part), *(self._flat(y) for y in results)

    @property
    def _points(self) -> list[int]:
        return list(range(-len(self.kernel), 0))

    def _flat(self, y: Tensor) -> Tensor:
        return y.movedim(1, -1).reshape(-1, self.groups, y.shape[1] // self.groups).transpose(0, 1)

    def _unfold(self, x: Tensor) -> Tensor:
        """Each window as a row."""
        if self.spread is not None:
            sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], self.spread, strict=True)]
            wide = x.new_zeros(*x.shape[:2], *sizes)
            points: Any = (..., *(slice(None, None, s) for s in self.spread))
            wide[points] = x
            x = wide
        x = functional.pad(x, [n for pair in reversed(self.padding) for n in pair]).contiguous()
        reach = [d * (k - 1) for k, d in zip(self.kernel, self.dilation, strict=True)]
        sizes = [(n - r - 1) // s + 1 for n, r, s in zip(x.shape[2:], reach, self.stride, strict=True)]
        steps = x.stride()[2:]
        windows = x.as_strided(
            (len(x), *sizes, x.shape[1], *self.kernel),
            (
                x.stride(0),
                *(n * s for n, s in zip(steps, self.stride, strict=True)),
                x.stride(1),
                *(n * d for n, d in zip(steps, self.dilation, strict=True)),
            ),
        )
        return windows.reshape(len(x) * math.prod(sizes), self.groups, -1).transpose(0, 1)


Layout: TypeAlias = Linear | Convolution


@dataclass(frozen=True)
class Product:
    """One multiplication by a weight.

    Attributes:
        weight: The weight.
        bias: What is added to its outputs; None where nothing is.
        input: What it is multiplied with.
        layout: How.
        group: Which one of the groups, where a weight is several ones stacked; None for all.
    """

    weight: Tensor
    bias: Tensor | None
    input: Tensor
    layout: Layout
    group: int | None = None


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Product:  # noqa: A002
    return Product(weight, bias, input, Linear())


def _matmul(input: Tensor, other: Tensor) -> Product | None:  # noqa: A002
    return Product(other, None, input, Linear(inner=True)) if other.dim() == 2 else None


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Product | None:  # noqa: A002
    return Product(mat2, input, mat1, Linear(inner=True)) if beta == alpha == 1 else None


def _convolution(
    input: Tensor,  # noqa: A002
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Product:
    kernel = tuple(weight.shape[2:])
    dims = len(kernel)
    dilation = _each(dilation, dims)
    if padding == "same":
        reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        pads = tuple((r // 2, r - r // 2) for r in reach)
    else:
        pads = tuple((n, n) for n in _each(0 if isinstance(padding, str) else padding, dims))
    return Product(weight, bias, input, Convolution(kernel, pads, _each(stride, dims), dilation, groups))


def _transposed(
    input: Tensor,  # noqa: A002
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Product:
    kernel = tuple(weight.shape[2:])
    dims = len(kernel)
    dilation = _each(dilation, dims)
    pads = tuple(
        (d * (k - 1) - p, d * (k - 1) - p + o)
        for k, d, p, o in zip(kernel, dilation, _each(padding, dims), _each(output_padding, dims), strict=True)
    )
    layout = Convolution(kernel, pads, (1,) * dims, dilation, groups, spread=_each(stride, dims))
    return Product(weight, bias, input, layout)


def _each(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


#: What tells of a call of each function which product it is; None where it is another one.
PRODUCTS: Mapping[Callable[..., Any], Callable[..., Product | None]] = {
    functional.linear: _linear,
    torch.addmm: _addmm,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    Tensor.matmul: _matmul,
    Tensor.mm: _matmul,
    Tensor.__matmul__: _matmul,
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), _convolution),
    **dict.fromkeys((torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d), _transposed),
}
