from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import sizes
from inq_lightning import PowerOfTwoGrid
from inq_lightning.selection import select_parameters


@pytest.mark.parametrize("network", list(sizes.NETWORKS))
def test_the_networks_have_their_published_numbers_of_parameters(network: str) -> None:
    with torch.device("meta"):
        model = sizes.NETWORKS[network][0]()
    assert sum(p.numel() for p in model.parameters()) == sizes.NETWORKS[network][1]
    # What the benchmark quantizes is what the callback selects.
    selected = {s.name for s in select_parameters(model)}
    assert {n for n, p in model.named_parameters() if p.dim() > 1} - selected <= {"class_token", "positions"}


def test_entropy_is_that_of_the_counts() -> None:
    codes = torch.tensor([0, 0, 0, 0, 1, 1, -1, 2], dtype=torch.int8)
    assert math.isclose(sizes.entropy(codes), 4 * 1 + 2 * 2 + 2 * 3)
    assert sizes.entropy(torch.zeros(7, dtype=torch.int8)) == 0


def test_a_trained_network_reports_what_lies_on_a_grid(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight = torch.randn(256, 256)
    state = {"fc.weight": PowerOfTwoGrid.from_weights(weight, 4).quantize(weight), "free": weight, "bias": weight[0]}
    torch.save({"state_dict": state}, tmp_path / "last.ckpt")
    row = sizes.measure_trained(tmp_path / "last.ckpt")
    assert (row["selected"], row["bits"], row["packed_bits_per_weight"]) == (256**2, [4], 4)
    assert 1 <= row["entropy_coded_over_entropy"] <= 1.03
    torch.save({"free": weight}, tmp_path / "free.ckpt")
    with pytest.raises(ValueError, match=r"free\.ckpt: no weight lies on a grid"):
        sizes.measure_trained(tmp_path / "free.ckpt")


def test_the_committed_results_are_within_the_limits_that_the_docs_state() -> None:
    results: dict[str, Any] = json.loads(sizes.RESULTS.read_text())
    assert {network["network"] for network in results["networks"]} >= {"ResNet-18"}
    for network in results["networks"]:
        assert [row["bits"] for row in network["rows"]] == list(sizes.BITS)
        for row in network["rows"]:
            assert row["packed_bits_per_weight"] <= row["bits"] + 0.05
            assert row["within_entropy_limit"]
    table = sizes.markdown(results)
    assert table.count("\n| ResNet-18 |") == 3 * len(sizes.BITS)


@pytest.mark.slow
def test_the_benchmark_measures_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "sizes.json"
    monkeypatch.setattr(sys, "argv", ["sizes", "--json", str(out), "--networks", "ResNet-18", "--bits", "4"])
    sizes.main()
    (network,) = json.loads(out.read_text())["networks"]
    (row,) = network["rows"]
    assert row["size"]["packed"] < 0.14 * row["size"]["float32"]
    assert row["size"]["mxfp4"] < 0.15 * row["size"]["float32"]
    assert 1 < row["load_peak_memory"]["packed"] < 4  # the network itself is 1
