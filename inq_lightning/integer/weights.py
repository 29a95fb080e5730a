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
_TAKE = 128  # with a magnitude's exponent: sums are taken out
_LIST = 255  # entries of one sign, at most, in a list


@dataclass(frozen=True)
class Table:
    """The weights of one product.

    Attributes:
        numbers: What the kernel reads, output after output.
        fields: Further fields of its descriptor, in order.
        shifts: Shifts to the left on the way from the largest magnitude down; see the kernels.
        excess: What the kernel's sums have too much, whatever the inputs.
        blocks: In how many parts the kernel adds up the inputs of one output.
    """

    numbers: list[int]
    fields: tuple[int, ...]
    shifts: list[int]
    excess: int
    blocks: int = 1


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
    numbers = (padded.reshape(-1, each) << torch.arange(each) * bits).sum(1).tolist()
    counts = torch.stack([_counts(rows, exponent) for exponent in exponents]) if exponents else rows.new_zeros(0, 2, 1)
    block = words * each
    if largest is not None and counts.numel() and int(counts.max()) > _limit(largest):
        block = _limit(largest) // each * each
        counts = torch.full_like(counts, _limit(largest))
    shifts, excess = _shifts(exponents, counts, largest)
    fields = (inputs, block, len(exponents), bits, each)
    blocks = -(-inputs // block)
    return Table(numbers, fields, shifts, excess * blocks, blocks)


def list_inputs(rows: Tensor, largest: int | None, size: int) -> Table:
    """Lists of the inputs that take each magnitude.

    Args:
        rows: Weights, see :func:`rows_of`.
        largest: See :func:`pack`.
        size: Bytes of one input, or of one column.
    """
    limit = min(_LIST, _limit(largest or 1))
    split: list[tuple[int, int]] = []  # exponent and number of a list; a magnitude has as many as one output needs
    for exponent in magnitudes_of(rows):
        split += [(exponent, part) for part in range(-(-int(_counts(rows, exponent).max()) // limit))]
    numbers: list[int] = []
    for row in rows:
        for exponent, part in split:
            both = [(row == sign << exponent).nonzero()[:, 0].tolist() for sign in (1, -1)]
            both = [places[part * limit : (part + 1) * limit] for places in both]
            numbers += [len(both[0]), len(both[1])]
            numbers += [size * place for places in both for place in places]
    exponents = [exponent for exponent, _ in split]
    counts = [(_counts(rows, exponent) - part * limit).clamp(0, limit) for exponent, part in split]
    shifts, excess = _shifts(exponents, torch.stack(counts) if counts else rows.new_zeros(0, 2, 1), largest)
    return Table(numbers, (rows.shape[1], len(split)), shifts, excess)


def _limit(largest: int) -> int:
    """How many inputs of one sign 16 bits hold."""
    return _LANE // max(largest, 1)


def _counts(rows: Tensor, exponent: int) -> Tensor:
    """How many weights of each output are this magnitude, and its negative: int64 of shape (2, outputs)."""
    return torch.stack([(rows == sign << exponent).sum(1) for sign in (1, -1)])


def _shifts(exponents: Sequence[int], counts: Tensor, largest: int | None) -> tuple[list[int], int]:
    """Shifts from each exponent to the next, or where sums are taken out, and the excess that this makes.

    Args:
        exponents: Falling.
        counts: How many inputs are added and subtracted: int64 of shape (exponents, 2, outputs).
        largest: See :func:`pack`.
    """
    gaps = [a - b for a, b in pairwise([*exponents, 0])]
    if largest is None:
        return gaps, 0
    excess, held = 0, counts.new_zeros(())
    for k, exponent in enumerate(exponents):
        held = held + counts[k]  # in units of this exponent
        after = (held << min(gaps[k], 16)) + counts[k + 1] if k + 1 < len(exponents) else None
        if after is None or int(after.max()) > _limit(largest):
            gaps[k] = _TAKE | exponent
            excess += _BIAS << exponent
            held = torch.zeros_like(held)
        else:
            held = held << gaps[k]
    return gaps, excess


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
