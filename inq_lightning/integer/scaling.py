"""From a sum to the next activation: factors of a few powers of two, a bias, a shift that rounds, a clamp."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_MOST = (1 << 31) - 1  # what an accumulator holds
_LEFT = 30  # the largest left shift
# The largest right shift. float32 then rounds as whole numbers do, as ONNX Runtime has it: a result of 8 bits that is
# not half-way between two codes is at least 2^-16 from there, twice what float32 loses. More would be of little use.
_RIGHT = 16


@dataclass(frozen=True)
class Scaling:
    """What becomes of an accumulator, channel by channel, in whole numbers alone.

    ((sum over terms of sign · (accumulator << left)) + bias) >> right, rounded half to even, clamped.

    Attributes:
        signs: -1, 0 or 1; int32 of shape (terms, channels); one channel stands for all.
        lefts: Shifts of the terms, 0 to 30; likewise.
        bias: int32 of shape (channels,).
        rights: The shift that rounds, 0 to 16; int32 of shape (channels,).
        low: Least result.
        high: Largest result.
    """

    signs: Tensor
    lefts: Tensor
    bias: Tensor
    rights: Tensor
    low: int = -_MOST - 1
    high: int = _MOST

    @property
    def terms(self) -> int:
        """Powers of two a factor has at most."""
        return len(self.signs)

    @property
    def factors(self) -> Tensor:
        """Whole numbers that accumulators are multiplied with, one a channel: int64 of shape (channels,)."""
        return (self.signs.long() << self.lefts.long()).sum(0)

    def run(self, accumulator: Tensor) -> Tensor:
        """Maps int32 of shape (batch, channels, ...) to int32 of the same shape."""
        shape = (1, -1) + (1,) * (accumulator.dim() - 2)
        total = self.bias.view(shape).expand_as(accumulator)
        for sign, left in zip(self.signs, self.lefts, strict=True):
            term = accumulator << left.view(shape)
            total = torch.where(
                sign.view(shape) < 0, total - term, torch.where(sign.view(shape) > 0, total + term, total)
            )
        return shift_right(total, self.rights.view(shape)).clamp(self.low, self.high)

    def peak(self, accumulators: Tensor) -> int:
        """The largest magnitude on the way, where accumulators are at most of these magnitudes (channels,)."""
        steps = (self.signs.abs().long() << self.lefts.long()).sum(0)
        half = torch.where(self.rights > 0, 1 << (self.rights.long() - 1).clamp(min=0), 0)
        return int((accumulators.long() * steps + self.bias.long().abs() + half).max())


def shift_right(values: Tensor, shift: Tensor) -> Tensor:
    """int32 values divided by 2^shift, rounded half to even; ``shift`` is broadcast."""
    half = torch.where(shift > 0, (1 << (shift - 1).clamp(min=0)) - 1, 0)
    odd = torch.where(shift > 0, (values >> shift) & 1, 0)
    return (values + half + odd) >> shift


def powers_of_two(factor: float, terms: int) -> list[tuple[int, int]]:
    """A number as a sum of signed powers of two, the nearest to what is left each: (sign, exponent), falling."""
    found: list[tuple[int, int]] = []
    while factor and len(found) < terms:
        mantissa, exponent = math.frexp(abs(factor))
        exponent -= mantissa < 0.75
        sign = 1 if factor > 0 else -1
        found.append((sign, exponent))
        factor -= sign * 2.0**exponent
    return found


def fit_scaling(
    name: str,
    factors: Tensor,
    before: Tensor,
    after: Tensor,
    peaks: Tensor,
    exponent: int,
    to: int | None,
    terms: int,
    low: int | None = None,
    high: int | None = None,
    in_sums: bool = False,
) -> tuple[Scaling, int]:
    """Scaling that comes nearest to factor · (accumulator + before) + after, in steps of 2^to.

    The bias is worked out with the factor as it has become, so that a channel's mean stays.

    Args:
        name: The layer, for messages.
        factors: float64 of shape (channels,).
        before: Likewise, in real units.
        after: Likewise.
        peaks: The largest magnitudes of the accumulators, int64 of shape (channels,).
        exponent: That of an accumulator's step.
        to: That of the result's step; None for the smallest one that all channels have, without rounding.
        terms: Powers of two a factor has at most.
        low: Least result; None for all of 32 bits.
        high: Largest result; likewise.
        in_sums: Whether the bias is a whole number of the accumulator's steps, as int8 kernels have it.

    Returns:
        The scaling, and the exponent of the result's step.

    Raises:
        ValueError: A channel needs more than 32 bits.
    """
    sums = [powers_of_two(factor, terms) for factor in factors.tolist()]
    if to is None:
        to = exponent + min((k for found in sums for _, k in found), default=0)
    channels = [
        _channel(name, found, inside, outside, peak, exponent, to, in_sums)
        for found, inside, outside, peak in zip(sums, before.tolist(), after.tolist(), peaks.tolist(), strict=True)
    ]
    most = max(1, *(len(lefts) for lefts, _, _ in channels))
    signs, shifts = (torch.zeros(most, len(channels), dtype=torch.int32) for _ in range(2))
    for c, (lefts, _, _) in enumerate(channels):
        for j, (sign, left) in enumerate(lefts):
            signs[j, c], shifts[j, c] = sign, left
    bias = torch.tensor([bias for _, bias, _ in channels], dtype=torch.int32)
    rights = torch.tensor([right for _, _, right in channels], dtype=torch.int32)
    limits = {} if low is None or high is None else {"low": low, "high": high}
    return Scaling(signs, shifts, bias, rights, **limits), to


def _channel(
    name: str,
    found: list[tuple[int, int]],
    before: float,
    after: float,
    peak: int,
    exponent: int,
    to: int,
    in_sums: bool,
) -> tuple[list[tuple[int, int]], int, int]:
    """Terms as (sign, left shift), bias and right shift of one channel: as many terms as fit into 32 bits."""
    found = [(sign, k) for sign, k in found if k >= to - exponent - _RIGHT]
    while True:
        base = min([to - exponent, *(k for _, k in found)])
        lefts, right = [(sign, k - base) for sign, k in found], to - exponent - base
        offset = after + sum(sign * 2.0**k for sign, k in found) * before
        factor = sum(sign << left for sign, left in lefts) if in_sums else 1
        unit = abs(factor) or 1
        bias = unit * round(math.ldexp(offset, -(exponent + base)) / unit)  # half to even
        most = sum(peak << left for _, left in lefts) + abs(bias) + ((1 << right) >> 1)
        if most <= _MOST and all(left <= _LEFT for _, left in lefts):
            return lefts, bias, right
        if right == 0:
            raise ValueError(
                f"{name}: its accumulator would need {most.bit_length() + 1} bits, 32 are there; give it fewer bits of "
                "weights or activations"
            )
        found = found[:-1]
