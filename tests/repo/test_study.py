"""The accuracy study's cells compose, and one of them runs on a few images."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir, initialize_config_module
from omegaconf import DictConfig
from processes import run_program
from safetensors.torch import save_file
from support import ROOT

from benchmarks.accuracy import norms, results, study
from inq_lightning.recipes.classifier import Classifier
from inq_lightning.recipes.models import ResNetCIFAR

CONF = ROOT / "benchmarks" / "accuracy" / "conf"
CELLS = sorted(path.stem for path in (CONF / "cell").glob("*.yaml"))


def configure(cell: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("study", overrides=[f"cell={cell}", "name=x", "folder=runs", "data.path=images.npz"])


@pytest.mark.parametrize("cell", CELLS)
def test_every_cell_composes_and_says_what_it_is(cell: str) -> None:
    cfg = configure(cell)
    assert cfg.method in study.METHODS
    if cell != "baseline":
        assert cfg.inq.bits == int(cell[0])
        assert (cfg.method == "fine_tune") == cell.endswith("_control")
        assert (cfg.method == "one_shot") == cell.endswith("_one_shot")
    assert results.description(cell).endswith(".")


@pytest.mark.parametrize("bits", [5, 4, 3, 2])
def test_the_cell_of_a_bit_width_is_what_inq_train_does_with_its_preset(bits: int) -> None:
    with initialize_config_module("inq_lightning.conf", version_base="1.3"):
        overrides = [f"experiment=cifar10_resnet20_{bits}bit", "data.path=images.npz", "output_dir=runs"]
        preset = compose("train", overrides=overrides)
    for seed in (0, 1):
        preset.seed = seed
        cell = configure(f"{bits}bit")
        cell.seed = seed
        assert cell.method == "inq"
        assert not cell.prune
        assert all(cell[key] == preset[key] for key in ("data", "model", "pretrain", "inq", "trainer", "seed"))


def test_every_cell_of_the_page_exists_and_controls_last_as_long_as_what_they_control() -> None:
    calls = re.findall(r"compare\((.*?)\)", results.TEMPLATE.read_text())
    assert {cell for call in calls for cell in re.findall(r'"(\w+)"', call)} == {*CELLS, *results.DROPPED} - {
        "baseline"
    }
    for bits, control in results.CONTROLS.items():
        assert configure(control).inq.schedule == configure(f"{bits}bit").inq.schedule


def test_the_page_is_what_its_results_say() -> None:
    kept = results.read(ROOT / "benchmarks" / "accuracy" / "results.json")
    assert (ROOT / "docs" / "results.md").read_text() == results.page(kept)


def test_later_results_take_the_place_of_earlier_ones_of_the_same_cell_and_seed(tmp_path: Path) -> None:
    def write(folder: str, seed: int, score: float) -> None:
        place = tmp_path / folder / "5bit" / str(seed) / "result.json"
        place.parent.mkdir(parents=True)
        place.write_text(json.dumps({"name": "5bit", "seed": seed, "metrics": {"test/acc": score}}))

    for folder, seed, score in (("first", 0, 0.1), ("first", 1, 0.2), ("second", 1, 0.3)):
        write(folder, seed, score)
    kept = tmp_path / "results.json"
    for folder in ("first", "second"):
        merged = results.add(results.read(kept), results.gather(tmp_path / folder))
        kept.write_text(json.dumps(merged))
    assert {seed: run["metrics"]["test/acc"] for seed, run in results.read(kept)["5bit"].items()} == {0: 0.1, 1: 0.3}


def test_a_difference_comes_with_the_standard_error_of_paired_images() -> None:
    def run(*mistakes: int) -> dict[str, Any]:
        return {"metrics": {"test/acc": 1 - len(mistakes) / 10_000}, "mistakes": list(mistakes)}

    found = {"a": {0: run(*range(300)), 1: run(1)}, "b": {0: run(*range(100, 300)), 1: run(1), 2: run()}}
    # -1 point with seed 0, 0 with seed 1; 100 of 20,000 pairs differ: variance 0.005 - 0.005²
    assert results.difference(found, "a", "b") == f"-0.50 ± {100 * (0.004975 / 20_000) ** 0.5:.2f}"
    assert results.difference({"a": {1: run(1)}, "b": {0: run()}}, "a", "b") == ""


def test_a_cell_runs_from_its_baseline_and_is_skipped_once_it_has_its_result(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    images = {f"x_{part}": generator.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8) for part in ("train", "test")}
    labels = {f"y_{part}": np.arange(40) % 10 for part in ("train", "test")}
    np.savez(tmp_path / "images.npz", **images, **labels)
    trained = tmp_path / "baseline" / "0" / "weights.safetensors"
    trained.parent.mkdir(parents=True)
    save_file(Classifier(ResNetCIFAR(8), 10).state_dict(), trained)
    command = [
        *("-m", "benchmarks.accuracy.study", "cell=5bit_pruned", f"folder={tmp_path}"),
        *(f"data.path={tmp_path}/images.npz", "data.image_size=8", "model.net.depth=8", "trainer.precision=32-true"),
        *("inq.schedule.epochs_per_phase=1", "trainer.enable_progress_bar=false"),
    ]
    run_program(*command, cwd=ROOT)
    path = tmp_path / "5bit_pruned" / "0" / "result.json"
    result = json.loads(path.read_text())
    fractions = [epoch["inq/quantized_fraction"] for epoch in result["epochs"]]
    assert fractions == pytest.approx([0.75, 0.875, 0.9375, 1], abs=1e-3)  # of half: 0.5, 0.75, 0.875, 1
    assert all(layer["frozen"] == layer["numel"] for layer in result["layers"])
    assert len(result["mistakes"]) == round(40 * (1 - result["metrics"]["test/acc"]))
    assert {*result["mistakes"]} <= {*range(40)}
    for layer in result["layers"]:
        counts = result["exponents"]["after"][layer["name"]]
        assert counts["None"] >= round(0.5 * layer["numel"])
    written = path.stat().st_mtime_ns
    run_program(*command, cwd=ROOT)
    assert path.stat().st_mtime_ns == written
    assert results.gather(tmp_path)["5bit_pruned"][0] == result
    again = norms.measure(path.parent, tmp_path / "images.npz")
    assert again["ended"] == pytest.approx(result["metrics"]["val/acc"])
    assert 0 <= again["re-estimated"] <= 1

    run_program(*command, "name=try-x", "model.lr=0.05", cwd=ROOT)
    trial = results.gather(tmp_path)["try-x"][0]
    assert "test/acc" in result["metrics"]
    assert "test/acc" not in trial["metrics"]
    assert trial["overrides"][-1] == "model.lr=0.05"
    assert not any("path" in text for text in trial["overrides"])
    result["metrics"]["val/acc"], trial["metrics"]["val/acc"] = 0.5, 0.625
    table = results.trials({"baseline": {0: result}, "try-x": {0: trial}})
    assert "`cell=5bit_pruned`" in table
    assert table.endswith("| 4 | 62.50 | +12.50 |")
