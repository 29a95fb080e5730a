"""What every grid promises to those who ask it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inq_lightning.grid import Grid, PowerOfTwoGrid, from_spec
from inq_lightning.grid.levels import Levels

PAPER = st.builds(
    PowerOfTwoGrid,
    st.one_of(st.none(), st.integers(-60, 60)),
    st.integers(2, 8),
    st.sampled_from(["nearest", "truncate"]),
)
OTHERS = st.builds(
    PowerOfTwoGrid,
    st.integers(-60, 60),
    st.integers(2, 7),
    st.just("nearest"),
    st.sampled_from(["full", "dense", Levels(False, (0, 1)), Levels(True, (0,)), Levels(False, (0, 200))]),
)
GRIDS = PAPER | OTHERS


@given(grid=GRIDS)
def test_a_grid_comes_back_from_its_spec_through_json(grid: Grid) -> None:
    assert from_spec(json.loads(json.dumps(grid.spec()))) == grid


@given(grid=GRIDS)
def test_levels_are_whole_multiples_of_the_step_and_codes_lead_there_and_back(grid: Grid) -> None:
    codes = torch.tensor(grid.codes, dtype=torch.int8)
    multiples = grid.multiples(codes)
    assert torch.equal(multiples, multiples.round())
    assert torch.equal(torch.ldexp(multiples, torch.tensor(grid.step)), grid.decode(codes, torch.float64))
    assert torch.equal(grid.levels, grid.decode(codes, torch.float64))
    assert grid.levels.tolist() == sorted(set(grid.levels.tolist()))
    assert torch.equal(grid.encode(grid.levels), codes)


@given(grid=GRIDS)
def test_the_storage_type_holds_every_level_as_zero_or_a_normal_number(grid: Grid) -> None:
    stored = grid.levels.to(grid.storage_dtype)
    assert torch.equal(stored.double(), grid.levels)
    assert bool(((stored == 0) | (stored.abs() >= torch.finfo(stored.dtype).smallest_normal)).all())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, "the kind of a grid must be one of power_of_two, got None"),
        ({"kind": ["power_of_two"]}, "got \\['power_of_two'\\]"),
        ({"kind": "apot", "bits": 4}, "got 'apot'"),
        ({"kind": "power_of_two", "bits": 4}, "describes no grid: .*n1"),
        ({"kind": "power_of_two", "bits": 4, "n1": 0, "levels": 3}, "describes no grid: .*levels"),
        ({"kind": "power_of_two", "bits": 9, "n1": 0}, "bits must be an integer from 2 to 8, got 9"),
        ({"kind": "power_of_two", "bits": True, "n1": 0}, "bits must be"),
        ({"kind": "power_of_two", "bits": 4, "n1": 0.5}, "n1 must be a whole number or None, got 0.5"),
        ({"kind": "power_of_two", "bits": 4, "n1": 0, "underflow": "up"}, "underflow must be one of nearest, truncate"),
    ],
)
def test_a_spec_of_no_grid_is_refused(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_spec(spec)
