"""What is said of the weights that are not quantized."""

from __future__ import annotations

import json
from dataclasses import asdict

from torch import nn

from inq_lightning import select_parameters
from inq_lightning.core.coverage import Coverage, LeftOut, group_names


def test_names_that_differ_in_numbers_alone_become_one() -> None:
    names = [f"h.{i}.{part}.weight" for i in range(12) for part in ("attn", "mlp")]
    assert group_names([*names, "head1.weight"]) == ["h.*.attn.weight (12)", "h.*.mlp.weight (12)", "head1.weight"]


def test_a_few_names_are_told_in_full() -> None:
    assert group_names(["0.weight", "4.weight", "7.weight"]) == ["0.weight", "4.weight", "7.weight"]


def test_a_long_list_ends_with_how_many_more_there_are() -> None:
    names = [f"part_{letter}.weight" for letter in "abcdefghij"]
    assert group_names(names) == [*names[:5], "and 5 more"]


def test_a_network_that_is_quantized_whole_is_told_in_a_line() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm([2, 3]), nn.MultiheadAttention(4, 2, add_bias_kv=True))
    coverage = select_parameters(net).coverage
    assert (coverage.share, coverage.overlooked) == (1.0, False)
    assert str(coverage) == "INQ quantizes all 76 matrix weights of the network."


def test_each_reason_is_a_line_with_names_and_what_to_write() -> None:
    own = [LeftOut(f"h.{i}.weight", (10, 10), "own layer type", "Conv") for i in range(12)]
    others = [
        LeftOut("embed.weight", (50, 4), "embedding", "Embedding"),
        LeftOut("back.weight", (5, 5), "frozen", "Linear"),
        LeftOut("ema.weight", (5, 5), "not optimized", "Linear"),
        LeftOut("head.weight", (5, 10), "excluded", "Linear"),
    ]
    first, *lines = str(Coverage.of(500, [*own, *others])).splitlines()
    assert first == "INQ quantizes 500 of the network's 2,000 matrix weights (25.0%). In floating point stay:"
    assert len(lines) == 5
    for line, words in zip(
        lines,
        [
            ("1,200 ", "(Conv)", "h.*.weight (12)", 'include=["*"]'),
            ("200 ", "embed.weight", "embeddings=True"),
            ("25 frozen", "back.weight", "trainable"),
            ("25 held by no optimizer", "ema.weight", "configure_optimizers"),
            ("50 left out by exclude", "head.weight"),
        ],
        strict=True,
    ):
        assert all(word in line for word in words), line


def test_what_was_asked_to_be_left_out_is_not_overlooked() -> None:
    asked = [LeftOut("a", (2, 2), "excluded", "Linear"), LeftOut("b", (2, 2), "not included", "Linear")]
    assert not Coverage.of(4, asked).overlooked
    assert Coverage.of(4, [*asked, LeftOut("c", (2, 2), "embedding", "Embedding")]).overlooked


def test_it_is_plain_json() -> None:
    coverage = Coverage.of(4, [LeftOut("a", (2, 3), "frozen", "Linear")])
    assert json.loads(json.dumps(asdict(coverage))) == {
        "selected": 4,
        "total": 10,
        "left_out": [{"name": "a", "shape": [2, 3], "reason": "frozen", "layer": "Linear"}],
    }
