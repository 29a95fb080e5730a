from __future__ import annotations

import re
from typing import Any

import pytest

from benchmarks import page


def test_the_page_is_what_its_command_writes_from_the_results() -> None:
    assert page.PAGE.read_text() == page.page(), "run: python -m benchmarks.page"


def test_the_page_has_a_row_for_every_network_and_every_promise() -> None:
    text = page.page()
    for network in page.read("sizes")["networks"]:
        assert len(re.findall(rf"^\| {re.escape(network['network'])} \|", text, re.MULTILINE)) == 3 * 4
    promises = text.split("## Promised and measured")[1].split("What cannot be a figure")[0]
    for promise in (
        "packed artifact",
        "entropy-coded artifact",
        "packing",
        "ONNX file at 2 bits",
        "loading mutated files",
    ):
        assert f"\n| {promise}" in promises


def rows(**changes: Any) -> list[page.Row]:
    row = {"batch": 1, "median": 2.5, "error": 1e-7, "memory": 0.25, "float32_ms": 1.0, "fastest": 2.0}
    return [
        row | {"network": network, "bits": bits, "activations": activations} | changes
        for network in ("Linear 4096×4096", "MLP 784-1024-1024-10", "ResNet-20, 32×32")
        for bits in (4, 5)
        for activations in ("float", "int8")
    ]


@pytest.mark.parametrize(
    ("latency", "verdicts"),
    [
        (rows(), ["yes", "**no**", "yes", "yes", "yes", "yes"]),  # 2.5 is not 3.5
        (rows(median=4.0, error=1e-3), ["**no**", "yes", "yes", "yes", "yes", "yes"]),  # float activations are off
        (rows(median=0.9, memory=0.31), ["**no**"] * 6),
        (rows(median_vs_onnxruntime=1.5, more="keys"), ["yes", "**no**", "yes", "yes", "yes", "yes"]),
        (rows(median_vs_default=0.9), ["yes", "**no**", "**no**", "**no**", "**no**", "**no**"]),
    ],
)
def test_latencies_are_judged_by_what_was_measured(latency: list[page.Row], verdicts: list[str]) -> None:
    assert [promise[-1] for promise in page.latency_promises(latency)] == verdicts
    assert ("1.50 ×" in page.packed_table(latency)) == ("more" in latency[0])


def test_numbers_are_aligned_to_the_right() -> None:
    assert page.table(("a", "b"), [("x", 1), ("2", "–")]) == "| a | b |\n| --- | ---: |\n| x | 1 |\n| 2 | – |"
    assert page.between([0.25, 0.251], ".2f") == "0.25"
    assert page.between([0.2, 0.3], ".1f") == "0.2 to 0.3"
