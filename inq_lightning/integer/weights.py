"""Weights of a product as tables: codes packed into words, or lists of the inputs that take each magnitude."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from inq_lightning.integer.operations import Product

_LANE = (1 << 15) - 1  # what 16 bits of a word hold, with a sign
_BIAS = 1 << 15  # added to each lane when it is taken out, so that no borrow reaches the next
_LIST = 255  # entries of one sign, at most, in a list


@dataclass(frozen=True)
class Table:
    """The weights of one product.

    Attributes:
        numbers: What the kernel reads, output after output.
        fields: Further fields of its descriptor, in order.
        gaps: Shifts to the left on the way from the largest magnitude down.
        excess: What the kernel's sums have too much, whatever the inputs.
    """

    numbers: list[int]
    fields: tuple[int, ...]
    gaps: list[int]
    excess: int


def rows_of(product: Product) -> Tensor:
    """Weights in the order in which the kernels take inputs: int64 of shape (outputs, inputs)."""
    weight = product.weight.long()
    if weight.dim() == 4:
        weight = weight.permute(0, 2, 3, 1)  # tap by tap, in each tap channel by channel
    return weight.flatten(1)


def magnitudes_of(rows: Tensor) -> list[int]:
    """Exponents of the magnitudes that occur, falling."""
    return sorted((m.bit_length() - 1 for m in set(rows.abs().flatten().tolist()) if m), reverse=True)


def code_bits(rows: Tensor) -> int:
    """The shortest code that tells the weights apart."""
    codes = 2 * len(magnitudes_of(rows)) + int((rows == 0).any())
    return max(1, (codes - 1).bit_length())


def pack(rows: Tensor, bits: int, largest: int | None) -> Table:
    """Codes of ``bits`` each in words of 32, each output beginning a word.

    Args:
        rows: Weights, see :func:`rows_of`.
        bits: Code length.
        largest: The largest byte of an input where four pixels share two words; None for a linear layer.
    """
    exponents, each = magnitudes_of(rows), 32 // bits
    codes = torch.full_like(rows, 2 * len(exponents))
    for k, exponent in enumerate(exponents):
        codes[rows == 1 << exponent] = 2 * k
        codes[rows == -(1 << exponent)] = 2 * k + 1
    inputs = rows.shape[1]
    words = -(-inputs // each)
    padded = torch.zeros(len(rows), words * each, dtype=torch.int64)
    padded[:, :inputs] = codes
    shifts = torch.arange(each) * bits
    numbers = (padded.reshape(-1, each) << shifts).sum(1).tolist()
    block, excess = words * each, 0
    if largest is not None:
        limit = _LANE // max(largest, 1)
        if _most(rows) > limit:
            block = limit // each * each
        excess = _BIAS * sum(1 << e for e in exponents) * -(-inputs // block)
    return Table(numbers, (inputs, block, len(exponents), bits, each), _gaps(exponents), excess)


def list_inputs(rows: Tensor, largest: int | None, size: int) -> Table:
    """Lists of the inputs that take each magnitude.

    Args:
        rows: Weights, see :func:`rows_of`.
        largest: See :func:`pack`.
        size: Bytes of one input, or of one column.
    """
    limit = _LIST if largest is None else min(_LIST, _LANE // max(largest, 1))
    split: list[int] = []  # exponents, each as often as the longest list needs it
    for exponent in magnitudes_of(rows):
        split += [exponent] * -(-_most(rows, exponent) // limit)
    numbers: list[int] = []
    for row in rows:
        for k, exponent in enumerate(split):
            start = (k - split.index(exponent)) * limit
            both = [(row == sign << exponent).nonzero()[:, 0][start : start + limit].tolist() for sign in (1, -1)]
            numbers.append(len(both[0]) | len(both[1]) << 8)
            numbers += [size * k for one in both for k in one]
    excess = 0 if largest is None else _BIAS * sum(1 << e for e in split)
    return Table(numbers, (rows.shape[1], len(split)), _gaps(split), excess)


def _most(rows: Tensor, *exponents: int) -> int:
    """How many weights of one output are equal, at most."""
    return max(
        (int((rows == sign << e).sum(1).max()) for e in exponents or magnitudes_of(rows) for sign in (1, -1)),
        default=0,
    )


def _gaps(exponents: Sequence[int]) -> list[int]:
    return [a - b for a, b in pairwise([*exponents, 0])]


def planes_of(low: int, high: int) -> tuple[int, int]:
    """Bytes that hold a value plus its zero, and that zero.

    Args:
        low: Least value.
        high: Largest value.
    """
    if low >= 0:
        return max(1, math.ceil(high.bit_length() / 8)), 0
    count = math.ceil((max(-low - 1, high).bit_length() + 1) / 8)
    return count, 1 << (8 * count - 1)
