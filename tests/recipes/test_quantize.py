"""`inq-quantize`: a trained network in; artifact and report out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig
from rich.console import Console
from support import same_bits

from inq_lightning import inspect_file, load_integer, load_packed
from inq_lightning.recipes import quantize
from inq_lightning.recipes.classifier import Classifier
from inq_lightning.recipes.data import DigitsDataModule
from inq_lightning.recipes.models import SmallCNN
from inq_lightning.recipes.stages import build_trainer


def configure(folder: Path, *overrides: str) -> DictConfig:
    with initialize_config_module("inq_lightning.conf", version_base="1.3"):
        return compose("quantize", [f"output_dir={folder}/out", "output=json", "trainer.accelerator=cpu", *overrides])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that reads digits, trained for two epochs."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    module = Classifier(SmallCNN(), 10, lr=0.1, lr_epochs=2)
    trainer = build_trainer(configure(folder), [])
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, DigitsDataModule())
    torch.save(module.state_dict(), folder / "net.pt")
    return folder / "net.pt"


def run(*overrides: str, folder: Path, capsys: Any = None) -> dict[str, Any]:
    quantize.run(configure(folder, *overrides), Console(stderr=True))
    report: dict[str, Any] = json.loads((folder / "out" / "report.json").read_text())
    return report


def test_a_trained_network_becomes_an_artifact_of_its_levels(trained: Path, tmp_path: Path) -> None:
    report = run(f"ckpt={trained}", "inq.bits=3", "images=256", folder=tmp_path)
    assert report["bits"] == [3]
    assert report["quantized_fraction"] == 1
    assert report["levels_used"] == report["levels_allowed"] == 8
    assert report["coverage"]["left_out"] == []
    assert report["after"]["test/acc"] > report["before"]["test/acc"] - 0.05
    artifact = tmp_path / "out" / "quantized.safetensors"
    assert inspect_file(artifact).fully_quantized
    module = load_packed(artifact, Classifier(SmallCNN(), 10))
    first = torch.load(trained)["net.features.0.weight"]
    weight = module.net.features[0].weight
    assert weight.detach().abs().unique().numel() == 4
    assert not same_bits(weight.detach(), first)


def test_rounded_activations_end_in_whole_numbers_in_one_command(trained: Path, tmp_path: Path) -> None:
    report = run(f"ckpt={trained}", "inq.bits=4", "inq.activation_bits=8", "images=256", folder=tmp_path)
    whole = report["integer"]
    assert abs(whole["metrics"]["test/acc"] - report["after"]["test/acc"]) < 0.02
    assert 0 < whole["shifts"] < whole["additions"] < 1.1 * whole["multiplications"]
    assert whole["accumulator_bits"] <= 32
    assert whole["bytes"] < report["bytes_before"] / 4
    artifact = tmp_path / "out" / "quantized.safetensors"
    found = inspect_file(artifact)
    assert [(one.name, one.before, one.bits, one.signed) for one in found.activations] == [
        ("net.features.0", True, 8, True),
        ("net.features.10", False, 8, False),
        ("net.features.2", False, 8, False),
        ("net.features.6", False, 8, False),
    ]
    assert found.integer is not None
    assert found.integer["multiplications"] == whole["multiplications"]
    network, data = load_integer(artifact), DigitsDataModule()
    data.setup("test")
    right = sum(int((network.run(x).argmax(1) == y).sum()) for x, y in data.test_dataloader())
    assert right / 450 == pytest.approx(whole["metrics"]["test/acc"], abs=1e-6)


def test_patterns_and_levels_reach_the_layers(trained: Path, tmp_path: Path) -> None:
    report = run(
        f"ckpt={trained}",
        "inq.bits=3",
        "images=64",
        "inq.levels=paper",
        "inq.exclude=[net.features.0]",
        folder=tmp_path,
    )
    assert report["levels_allowed"] == 5
    assert [one["name"] for one in report["coverage"]["left_out"]] == ["net.features.0.weight"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "needs ckpt=PATH"),
        (["ckpt={}", "images=0"], "images must be at least 1"),
        (["ckpt={}", "inq.keep_zeros=true", "inq.seed=1"], r"inq\.keep_zeros, inq\.seed would do nothing"),
        (["ckpt={}", "model=resnet20"], "does not fit the configured model"),
        (["ckpt={}", "inq.exclude=[nothing]"], "exclude pattern 'nothing'"),
    ],
)
def test_what_cannot_be_done_is_refused(overrides: list[str], message: str, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run(*(text.format(trained) for text in overrides), folder=tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_as_many_images_as_asked_for_are_taken() -> None:
    batches = quantize.first_images(DigitsDataModule(batch_size=64), 150)
    assert [len(batch) for batch in batches] == [64, 64, 22]
