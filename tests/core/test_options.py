from __future__ import annotations

import inspect
import json

import pytest

from inq_lightning import INQCallback, Options, Schedule
from inq_lightning.core.schedule import PRESETS


def test_the_callback_takes_the_options_and_nothing_else() -> None:
    assert inspect.signature(INQCallback) == inspect.signature(INQCallback.__init__).replace(
        parameters=list(inspect.signature(INQCallback.__init__).parameters.values())[1:]
    )
    assert list(inspect.signature(INQCallback).parameters) == list(inspect.signature(Options).parameters)
    with pytest.raises(TypeError, match="bitz"):
        INQCallback(bitz=4)  # type: ignore[call-arg]


def test_options_are_plain_json_values() -> None:
    options = Options(bits=3, include=("net.*",), exclude=("net.0",), layer_bits={"net.1": 8})
    again = json.loads(json.dumps(options.as_dict()))
    assert options.differences(again) == []
    assert again["include"] == ["net.*"]
    assert again["layer_bits"] == {"net.1": 8}


def test_the_order_of_patterns_is_a_difference() -> None:
    options = Options(layer_bits={"*": 8, "net.1": 4})
    assert options.differences({"layer_bits": {"net.1": 4, "*": 8}}) != []
    assert options.differences({"layer_bits": {"*": 8, "net.1": 4}}) == []


def test_options_that_the_other_run_does_not_tell_are_no_difference() -> None:
    assert Options(partition="random").differences({}) == []


@pytest.mark.parametrize(
    ("schedule", "phases"),
    [
        (None, Schedule(PRESETS["3bit"])),
        ("vgg16", Schedule(PRESETS["vgg16"])),
        ({0: 0.5, 2: 1.0}, Schedule((0.5, 1.0), (0, 2))),
        (Schedule((1.0,), (3,), "step"), Schedule((1.0,), (3,), "step")),
    ],
)
def test_every_way_to_say_a_schedule_becomes_one(schedule: object, phases: Schedule) -> None:
    assert Options(bits=3, schedule=schedule).phases == phases  # type: ignore[arg-type]


def test_rules_that_come_to_the_same_at_the_bits_in_use_are_no_difference() -> None:
    assert Options(bits=5).differences({"exponent": "max"}) == []
    assert Options(bits=2).differences({"exponent": "mse"}) == []
    assert Options(bits=4, exponent="mse").differences({"exponent": "auto"}) == []
    assert Options(bits=2).differences({"exponent": "max"}) == ["exponent: 'max' in the checkpoint, 'auto' here"]
    assert Options(bits=5, layer_bits={"head": 3}).differences({"exponent": "max"}) != []
