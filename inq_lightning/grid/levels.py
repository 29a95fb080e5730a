"""Which powers of two a weight may take, up to a common factor: the choice that a bit width leaves open."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from inq_lightning._common import one_of

LevelsName = Literal["paper", "full", "dense"]

#: ``"dense"``: the exponents of 2^(bits-1) magnitudes, by the least error on trained weights; from 4 bits on they are
#: consecutive.
_DENSE = {2: (0, 2), 3: (0, 2, 3, 4)}
_MOST = 127  # magnitudes that int8 codes can tell apart


@dataclass(frozen=True)
class Levels:
    """The magnitudes of a grid as exponents of two, and whether zero is a level.

    Attributes:
        zero: Whether a weight may be zero.
        exponents: Exponents of the magnitudes above the smallest one, increasing from 0: ``(0, 2)`` is ±1 and ±4 times
            any power of two.

    Raises:
        ValueError: The exponents are none.
    """

    zero: bool
    exponents: tuple[int, ...]

    def __post_init__(self) -> None:
        exponents = tuple(self.exponents)
        object.__setattr__(self, "exponents", exponents)
        whole = all(type(k) is int for k in exponents)
        rising = whole and all(a < b for a, b in itertools.pairwise(exponents))
        if not isinstance(self.zero, bool) or not exponents or not rising or exponents[0] != 0 or exponents[-1] > 254:
            raise ValueError(
                "the exponents of levels must be whole numbers that increase from 0 to at most 254, such as (0, 2) for "
                f"±1 and ±4, and zero True or False; got {self!r}"
            )

    @property
    def bits(self) -> int:
        """The shortest code length that tells all levels apart, at least 2."""
        return max(2, (2 * len(self.exponents) + self.zero - 1).bit_length())

    @property
    def consecutive(self) -> bool:
        """Whether no exponent is skipped."""
        return self.exponents[-1] == len(self.exponents) - 1


LevelsLike: TypeAlias = Levels | LevelsName
LevelsOption: TypeAlias = LevelsLike | Literal["auto"]

# What "auto" stands for, by bits: what ended most accurate in docs/results.md. From 5 bits on the paper's levels are
# more than weights use.
_AUTO: dict[int, LevelsName] = {2: "dense", 3: "dense", 4: "full"}


def levels_of(levels: LevelsLike, bits: int) -> Levels:
    """The levels that a name stands for at a bit width.

    Args:
        levels: ``"paper"``: zero and 2^(bits-2) magnitudes (Zhou et al., ICLR 2017, equation 1), which leaves almost
            half of the codes unused. ``"full"``: zero and 2^(bits-1) - 1 magnitudes. ``"dense"``: 2^(bits-1)
            magnitudes and no zero. Or levels of one's own.
        bits: Code length of one weight.

    Raises:
        ValueError: There are no such levels, or they are too many for the bit width.
    """
    if isinstance(levels, Levels):
        if levels.bits > bits:
            raise ValueError(f"{levels} takes {levels.bits} bits, more than the {bits} of its codes")
        return levels
    one_of("levels", levels, LevelsName)
    count = {"paper": 1 << bits - 2, "full": (1 << bits - 1) - 1, "dense": 1 << bits - 1}[levels]
    if count > _MOST:
        raise ValueError(
            f"levels={levels!r} has {count} magnitudes at {bits} bits, more than codes tell apart, {_MOST}"
        )
    if levels == "dense":
        return Levels(False, _DENSE.get(bits, tuple(range(count))))
    return Levels(True, tuple(range(count)))


def choose_levels(levels: LevelsOption, bits: int, zero: bool = False) -> LevelsLike:
    """What ``"auto"`` stands for at a bit width; anything else stands for itself.

    Args:
        levels: The option.
        bits: Code length of one weight.
        zero: Whether a weight must be able to be zero.
    """
    if levels != "auto":
        return levels
    chosen = _AUTO.get(bits, "paper")
    return "full" if zero and chosen == "dense" else chosen


def zero_of(levels: LevelsLike) -> bool:
    """Whether 0 is one of the levels, at whatever bit width."""
    return levels.zero if isinstance(levels, Levels) else levels != "dense"


def check_levels(option: str, levels: object, bits: int | None = None) -> LevelsOption:
    """Levels as a user writes them: a name, a :class:`Levels`, or a mapping with its fields as in a YAML file.

    Raises:
        ValueError: They are none, or too many for ``bits``; the message names the option.
    """
    try:
        if isinstance(levels, Mapping) and set(levels) == {"zero", "exponents"}:
            levels = Levels(levels["zero"], tuple(levels["exponents"]))
        if not isinstance(levels, Levels) and levels not in ("auto", *get_args(LevelsName)):
            names = ", ".join(repr(name) for name in ("auto", *get_args(LevelsName)))
            raise ValueError(f"must be one of {names}, or Levels(zero=…, exponents=…), got {levels!r}")
        if bits is not None:
            levels_of(choose_levels(levels, bits), bits)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{option}: {error}") from error
    return levels  # type: ignore[return-value]


def plain(levels: LevelsOption) -> Any:
    """Levels as plain JSON values, which :func:`check_levels` takes."""
    return {"zero": levels.zero, "exponents": list(levels.exponents)} if isinstance(levels, Levels) else levels


def name_of(levels: Levels, bits: int) -> LevelsLike:
    """The name of levels at a bit width, where they have one."""
    for name in get_args(LevelsName):
        if (1 << bits - 1 <= _MOST or name != "dense") and levels_of(name, bits) == levels:
            return name  # type: ignore[no-any-return]
    return levels
