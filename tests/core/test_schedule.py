from __future__ import annotations

import itertools
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inq_lightning.core.schedule import PRESETS, Schedule, default_preset

PAPER = {
    "alexnet": (0.3, 0.6, 0.8, 1.0),
    "vgg16": (0.5, 0.75, 0.875, 1.0),
    "googlenet": (0.2, 0.4, 0.6, 0.8, 1.0),
    "resnet18": (0.5, 0.75, 0.875, 1.0),
    "resnet50": (0.5, 0.75, 0.875, 1.0),
    "4bit": (0.3, 0.5, 0.8, 0.9, 0.95, 1.0),
    "3bit": (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0),
    "2bit": (0.2, 0.4, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.975, 1.0),
}


def test_the_presets_are_the_papers_tables() -> None:
    assert PRESETS == PAPER


@pytest.mark.parametrize("name", PAPER)
def test_a_preset_is_a_schedule_without_starts(name: str) -> None:
    schedule = Schedule.from_preset(name)
    assert (schedule.portions, schedule.starts, schedule.unit) == (PAPER[name], None, "epoch")


@pytest.mark.parametrize(
    ("bits", "name"),
    [(2, "2bit"), (3, "3bit"), (4, "4bit"), (5, "resnet18"), (6, "resnet18"), (7, "resnet18"), (8, "resnet18")],
)
def test_every_bit_width_has_a_default_preset(bits: int, name: str) -> None:
    assert default_preset(bits) == name


def test_an_unknown_preset_lists_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown schedule 'resnet81'") as error:
        Schedule.from_preset("resnet81")
    assert all(name in str(error.value) for name in PAPER)
    assert "did you mean resnet18" in str(error.value)
    with pytest.raises(ValueError, match="unknown schedule 'zzz'") as error:
        Schedule.from_preset("zzz")
    assert "did you mean" not in str(error.value)


@pytest.mark.parametrize(
    ("portions", "message"),
    [
        ((), "at least one portion"),
        ((0.0, 1.0), "(0, 1], got 0.0"),
        ((-0.5, 1.0), "(0, 1], got -0.5"),
        ((0.5, 1.5), "(0, 1], got 1.5"),
        ((math.nan, 1.0), "(0, 1], got nan"),
        ((0.5, math.inf), "(0, 1], got inf"),
        ((0.5, 0.5, 1.0), "larger than the one before, got [0.5, 0.5, 1.0]"),
        ((0.5, 0.4, 1.0), "larger than the one before, got [0.5, 0.4, 1.0]"),
        ((1.0, 1.0), "larger than the one before, got [1.0, 1.0]"),
        ((0.5, 0.9), "must be 1.0, or some weights would never be quantized, got [0.5, 0.9]"),
        ((0.5, "1.0"), "a portion must be a number, got '1.0'"),
        ((0.5, True), "a portion must be a number, got True"),
        ((None,), "a portion must be a number, got None"),
        ("1.0", "a portion must be a number, got '1'"),
    ],
)
def test_impossible_portions_are_refused_by_value(portions: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Schedule(portions)


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        ((0,), "2 portions need as many starts, got 1: [0]"),
        ((0, 1, 2), "2 portions need as many starts, got 3: [0, 1, 2]"),
        ((), "2 portions need as many starts, got 0: []"),
        ((-1, 2), "increasing and not negative, got [-1, 2]"),
        ((3, 3), "increasing and not negative, got [3, 3]"),
        ((4, 3), "increasing and not negative, got [4, 3]"),
        ((0, 1.0), "a start must be a whole number, got 1.0"),
        ((0, "4"), "a start must be a whole number, got '4'"),
        ((False, 4), "a start must be a whole number, got False"),
    ],
)
def test_impossible_starts_are_refused_by_value(starts: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Schedule((0.5, 1.0), starts)


@pytest.mark.parametrize("unit", ["epochs", "batch", "", None])
def test_an_unknown_unit_is_refused_by_name(unit: object) -> None:
    with pytest.raises(ValueError, match=re.escape(f"unit must be one of epoch, step, got {unit!r}")):
        Schedule((1.0,), unit=unit)


def test_lists_are_accepted_and_cannot_be_changed_from_outside() -> None:
    portions, starts = [0.5, 1.0], [0, 4]
    schedule = Schedule(portions, starts)
    portions[0], starts[0] = 0.9, 3
    assert (schedule.portions, schedule.starts) == ((0.5, 1.0), (0, 4))
    assert schedule == Schedule((0.5, 1), (0, 4))


def test_a_mapping_may_come_in_any_order() -> None:
    expected = Schedule((0.5, 0.75, 0.875, 1.0), (0, 4, 8, 12))
    assert Schedule.from_mapping({0: 0.5, 4: 0.75, 8: 0.875, 12: 1.0}) == expected
    assert Schedule.from_mapping({12: 1.0, 4: 0.75, 0: 0.5, 8: 0.875}) == expected
    assert Schedule.from_mapping({100: 1.0, 0: 0.5}, "step") == Schedule((0.5, 1.0), (0, 100), "step")


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({}, "at least one portion"),
        ({0: 0.5, 4: 0.25}, "larger than the one before, got [0.5, 0.25]"),
        ({0: 0.5}, "the last portion must be 1.0"),
        ({"0": 1.0}, "a start must be a whole number, got '0'"),
        ({-2: 1.0}, "not negative, got [-2]"),
    ],
)
def test_impossible_mappings_are_refused_by_value(mapping: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Schedule.from_mapping(mapping)


def test_phases_of_equal_length_begin_at_its_multiples() -> None:
    assert Schedule.every(3, [0.5, 0.75, 1.0]) == Schedule((0.5, 0.75, 1.0), (0, 3, 6))
    assert Schedule.every(100, (0.2, 1.0), "step") == Schedule((0.2, 1.0), (0, 100), "step")


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (0, "at least 1 epoch, got 0"),
        (-2, "at least 1 epoch, got -2"),
        (1.5, "whole number, got 1.5"),
        (True, "whole number, got True"),
    ],
)
def test_impossible_phase_lengths_are_refused_by_value(length: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule.every(length, (1.0,))


@st.composite
def portions(draw: st.DrawFn) -> tuple[float, ...]:
    return (*sorted(draw(st.sets(st.floats(0.001, 0.999), max_size=12))), 1.0)


@settings(max_examples=200, deadline=None)
@given(portions=portions(), longer=st.integers(0, 5000), unit=st.sampled_from(["epoch", "step"]))
def test_spreading_gives_every_phase_its_share_of_the_run(portions: tuple[float, ...], longer: int, unit: str) -> None:
    total = len(portions) + longer
    schedule = Schedule(portions, unit=unit).spread(total)
    assert (schedule.portions, schedule.unit) == (portions, unit)
    assert schedule.starts[0] == 0
    assert schedule.starts[-1] < total
    lengths = [b - a for a, b in itertools.pairwise([*schedule.starts, total])]
    assert min(lengths) >= 1
    assert max(lengths) - min(lengths) <= 1
    assert schedule.portion_at(total - 1) == 1.0
    schedule.check_fits(total)


def test_a_run_shorter_than_the_phases_cannot_be_spread() -> None:
    schedule = Schedule.from_preset("4bit")
    assert schedule.spread(6).starts == (0, 1, 2, 3, 4, 5)
    with pytest.raises(ValueError, match="need at least 6 epochs, one for each, but training runs 5"):
        schedule.spread(5)
    with pytest.raises(ValueError, match="at least 2 steps"):
        Schedule((0.5, 1.0), unit="step").spread(1)


def test_spreading_leaves_given_starts_alone() -> None:
    schedule = Schedule((0.5, 1.0), (3, 7))
    assert schedule.spread(100) == schedule
    assert schedule.spread(1) == schedule


def test_the_portion_is_zero_before_the_first_start_and_rises_at_each_start() -> None:
    schedule = Schedule((0.5, 0.75, 1.0), (2, 5, 6))
    assert [schedule.portion_at(t) for t in range(-1, 9)] == [0, 0, 0, 0.5, 0.5, 0.5, 0.75, 1, 1, 1]
    assert [schedule.phase_at(t) for t in range(-1, 9)] == [0, 0, 0, 1, 1, 1, 2, 3, 3, 3]


@settings(max_examples=100, deadline=None)
@given(portions=portions(), data=st.data())
def test_portion_and_phase_count_the_starts_that_have_passed(portions: tuple[float, ...], data: st.DataObject) -> None:
    n = len(portions)
    starts = tuple(sorted(data.draw(st.sets(st.integers(0, 60), min_size=n, max_size=n))))
    schedule = Schedule.from_mapping(dict(zip(starts, portions, strict=True)))
    now = data.draw(st.integers(0, 70))
    phase = sum(s <= now for s in starts)
    assert schedule.phase_at(now) == phase
    assert schedule.portion_at(now) == ((0.0, *portions)[phase])


def test_an_open_schedule_has_no_portion_yet() -> None:
    schedule = Schedule((0.5, 1.0))
    for call in (schedule.portion_at, schedule.phase_at, schedule.check_fits):
        with pytest.raises(ValueError, match=r"call spread\(total\) first"):
            call(0)


def test_a_run_that_ends_before_the_last_portion_is_refused() -> None:
    schedule = Schedule((0.5, 0.75, 1.0), (0, 4, 8))
    schedule.check_fits(9)
    schedule.check_fits(math.inf)
    with pytest.raises(ValueError, match=r"portion 1\.0 at epoch 8") as error:
        schedule.check_fits(8)
    assert "runs only 8 epochs and would stop at portion 0.75" in str(error.value)
    assert "train at least 9" in str(error.value)
    with pytest.raises(ValueError, match="runs only 2 steps and would stop at portion 0"):
        Schedule((1.0,), (5,), "step").check_fits(2)
