"""Grids of other powers of two than the paper's, against exact fractions."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import fractions, power

from inq_lightning.grid import PowerOfTwoGrid
from inq_lightning.grid.levels import Levels, levels_of, name_of

LEVELS = st.builds(
    lambda zero, steps: Levels(zero, (0, *(sum(steps[: i + 1]) for i in range(len(steps))))),
    st.booleans(),
    st.lists(st.integers(1, 5), max_size=7),
)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def magnitudes(grid: PowerOfTwoGrid, levels: Levels) -> list[Fraction]:
    assert grid.n1 is not None
    return [power(grid.n1 - levels.exponents[-1] + k) for k in levels.exponents]


def nearest(w: Fraction, positive: list[Fraction], zero: bool) -> Fraction:
    """The nearest level; a tie goes to the one further from zero, zero itself to the positive side."""
    candidates = [*positive, *([Fraction(0)] if zero else [])]
    size = max(candidates, key=lambda level: (-abs(abs(w) - level), level))
    return -size if w < 0 else size


@settings(max_examples=300, deadline=None)
@given(levels=LEVELS, dtype=st.sampled_from(DTYPES), data=st.data())
def test_every_weight_goes_to_the_nearest_level_exactly(
    levels: Levels, dtype: torch.dtype, data: st.DataObject
) -> None:
    top = data.draw(st.integers(-20 + levels.exponents[-1], 14) if levels.exponents[-1] < 30 else st.just(14))
    span = levels.exponents[-1]
    if dtype is torch.float16 and top - span < -23:
        dtype = torch.float32
    grid = PowerOfTwoGrid(top, max(levels.bits, 2), family=levels)
    positive = magnitudes(grid, levels)
    ties = [(a + b) / 2 for a, b in zip([Fraction(0), *positive], positive, strict=False)]
    special = torch.tensor([float(x) for x in [*positive, *ties, Fraction(0)]], dtype=torch.float64)
    plain = data.draw(st.lists(st.floats(-(2.0**15), 2.0**15, width=16), max_size=20))
    w = torch.cat([special, -special, special * (1 + 2**-9), torch.tensor(plain, dtype=torch.float64)]).to(dtype)
    w = w[w.isfinite()]
    rounded = grid.quantize(w)
    assert rounded.dtype == dtype
    assert fractions(rounded) == [nearest(x, positive, levels.zero) for x in fractions(w)]
    assert not (torch.signbit(rounded) & (rounded == 0)).any()

    codes = grid.encode(w)
    assert set(codes.tolist()) <= set(grid.codes)
    assert torch.equal(grid.decode(codes, dtype), rounded)
    assert grid.levels.tolist() == sorted(
        [-float(p) for p in positive] + [float(p) for p in positive] + [0.0] * levels.zero
    )


def test_names_stand_for_levels_at_every_width() -> None:
    assert levels_of("paper", 5) == Levels(True, tuple(range(8)))
    assert levels_of("full", 4) == Levels(True, tuple(range(7)))
    assert levels_of("dense", 2) == Levels(False, (0, 2))
    assert levels_of("dense", 3) == Levels(False, (0, 2, 3, 4))
    for bits in range(2, 8):
        for name in ("paper", "full", "dense"):
            levels = levels_of(name, bits)
            assert levels.bits <= bits
            assert levels_of(name_of(levels, bits), bits) == levels
        assert 2 * len(levels_of("dense", bits).exponents) == 1 << bits
        assert 2 * len(levels_of("full", bits).exponents) + 1 == (1 << bits) - 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"zero": True, "exponents": ()}, "increase from 0"),
        ({"zero": True, "exponents": (1, 2)}, "increase from 0"),
        ({"zero": True, "exponents": (0, 2, 2)}, "increase from 0"),
        ({"zero": True, "exponents": (0, 0.5)}, "whole numbers"),
        ({"zero": 1, "exponents": (0,)}, "zero True or False"),
        ({"zero": False, "exponents": (0, 255)}, "at most 254"),
    ],
)
def test_levels_that_are_none_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Levels(**arguments)


def test_a_grid_refuses_levels_that_its_codes_cannot_tell_apart_and_zeros_without_a_zero() -> None:
    with pytest.raises(ValueError, match=r"takes 3 bits, more than the 2"):
        PowerOfTwoGrid(0, 2, family=Levels(True, (0, 1)))
    with pytest.raises(ValueError, match=r"dense.*128 magnitudes at 8 bits"):
        PowerOfTwoGrid(0, 8, family="dense")
    with pytest.raises(ValueError, match="must be one of paper, full, dense"):
        PowerOfTwoGrid(0, 4, family="denser")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"a tensor of zeros needs a zero"):
        PowerOfTwoGrid.from_weights(torch.zeros(4), 2, family="dense")
    with pytest.raises(ValueError, match=r"underflow='truncate' needs a zero"):
        PowerOfTwoGrid(0, 2, "truncate", "dense")
    with pytest.raises(ValueError, match="it has no zero"):
        PowerOfTwoGrid(0, 2, family="dense").decode(torch.tensor([1, 0]))


def test_dense_levels_waste_least_of_a_gaussian() -> None:
    w = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))
    errors = {
        (name, bits): PowerOfTwoGrid.from_weights(w, bits, exponent="mse", family=name).squared_error(w) / w.numel()
        for name in ("paper", "full", "dense")
        for bits in (2, 3, 4)
    }
    for bits in (2, 3):
        assert errors["dense", bits] < errors["full", bits] <= errors["paper", bits]
    assert errors["full", 4] < errors["paper", 4]
