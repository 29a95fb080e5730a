from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ROOT

from benchmarks import sizes
from benchmarks.networks import NETWORKS
from inq_lightning import PowerOfTwoGrid
from inq_lightning.core.selection import select_parameters


@pytest.mark.parametrize("network", list(NETWORKS))
def test_the_networks_have_their_published_numbers_of_parameters(network: str) -> None:
    with torch.device("meta"):
        model = NETWORKS[network].make()
        outputs = model.eval()(torch.empty(2, *NETWORKS[network].input))
    assert outputs.shape == ((2, 16, 4096) if network == "LLM layer" else (2, 1000))
    assert sum(p.numel() for p in model.parameters()) == NETWORKS[network].parameters
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
    assert [network["network"] for network in results["networks"]] == list(NETWORKS)
    for network in results["networks"]:
        assert [row["bits"] for row in network["rows"]] == list(sizes.BITS)
        for row in network["rows"]:
            assert row["packed_bits_per_weight"] <= row["bits"] + 0.05
            assert row["entropy_coded_over_limit"] <= 1
            limit = {2: 0.08, 3: 0.14, 4: 0.14, 5: 0.27}[row["bits"]]
            assert row["size"]["onnx"] <= limit * network["onnx_float32"]


def test_rows_that_are_measured_again_replace_the_older_ones() -> None:
    results: dict[str, Any] = {"networks": []}
    for network, bits, size in (("VGG-16", 3, 1), ("ResNet-18", 5, 2), ("ResNet-18", 2, 3), ("ResNet-18", 5, 4)):
        sizes.merge(results, {"network": network, "rows": [{"bits": bits, "size": size}]})
    assert results["networks"] == [
        {"network": "ResNet-18", "rows": [{"bits": 2, "size": 3}, {"bits": 5, "size": 4}]},
        {"network": "VGG-16", "rows": [{"bits": 3, "size": 1}]},
    ]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="measures memory through /proc")
def test_the_benchmark_measures_a_network(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.sizes", "--json", tmp_path / "sizes.json"]
    command += ["--networks", "ResNet-18", "--bits", "4"]
    subprocess.run(command, cwd=ROOT, check=True)
    (network,) = json.loads((tmp_path / "sizes.json").read_text())["networks"]
    (row,) = network["rows"]
    assert row["size"]["packed"] < 0.14 * row["size"]["float32"]
    assert row["size"]["mxfp4"] < 0.15 * row["size"]["float32"]
    assert 1 < row["load_peak_memory"]["packed"] < 3  # the network itself is 1
