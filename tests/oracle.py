"""Equations 1-4 of Zhou et al. (ICLR 2017), transcribed literally in exact arithmetic: slow, and meant to be."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from fractions import Fraction

import torch
from torch import Tensor


def power(k: int) -> Fraction:
    return Fraction(2) ** k


def largest_exponent(s: Fraction) -> int:
    """Equation 2: the n1 with 2^n1 <= 4s/3 < 2^(n1+1), for s > 0."""
    target = 4 * s / 3
    n1 = target.numerator.bit_length() - target.denominator.bit_length()  # a first guess, at most one off
    while power(n1) > target:
        n1 -= 1
    while power(n1 + 1) <= target:
        n1 += 1
    return n1


def smallest_exponent(n1: int, bits: int) -> int:
    """Equation 3 as the paper's text gives it: n2 = n1 + 1 - 2^(b-1)/2."""
    return n1 + 1 - 2 ** (bits - 1) // 2


def levels(n1: int, bits: int) -> list[Fraction]:
    """Equation 1: {±2^n1, ..., ±2^n2, 0}, ascending."""
    positive = [power(k) for k in range(smallest_exponent(n1, bits), n1 + 1)]
    return [*(-p for p in reversed(positive)), Fraction(0), *positive]


def round_weight(w: Fraction, n1: int, bits: int, underflow: str) -> Fraction:
    """Equation 4, with saturation above the largest level and the paper's other threshold for small weights."""
    size, sign = abs(w), 1 if w > 0 else -1
    if underflow == "truncate" and size < power(smallest_exponent(n1, bits)):
        return Fraction(0)
    if size >= 3 * power(n1) / 2:
        return sign * power(n1)
    for alpha, beta in itertools.pairwise(x for x in levels(n1, bits) if x >= 0):
        if (alpha + beta) / 2 <= size < 3 * beta / 2:
            return sign * beta
    return Fraction(0)


def fractions(w: Tensor) -> list[Fraction]:
    return [Fraction(x) for x in w.detach().double().flatten().tolist()]


def fit(weights: Iterable[Fraction]) -> int | None:
    s = max((abs(w) for w in weights), default=Fraction(0))
    return largest_exponent(s) if s else None


def round_all(weights: Iterable[Fraction], n1: int | None, bits: int, underflow: str) -> list[Fraction]:
    return [Fraction(0) if n1 is None else round_weight(w, n1, bits, underflow) for w in weights]


def raw(tensor: Tensor) -> Tensor:
    """The bits of a float tensor as integers: what "bit for bit" compares."""
    tensor = tensor.detach()
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def identical(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype and shape hold the same bits; unlike ``==``, -0.0 is not 0.0 and nan is nan."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(raw(a), raw(b))
