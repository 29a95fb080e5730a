from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as unified
import pytest
import pytorch_lightning as separate
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging
from processes import run_program
from pytorch_lightning.cli import LightningCLI
from support import ROOT, SCHEDULE, TinyModule, Witness, assert_quantized, loader, same_bits, weights
from torch import Tensor, nn

from inq_lightning import INQCallback, Levels, Schedule

EXAMPLE = ROOT / "examples" / "lightning_cli"
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Unified(unified.LightningModule):
    """A module of the unified package; its validation loss gets worse in every epoch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 14), nn.ReLU(), nn.Linear(14, 4))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", float(self.current_epoch))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)

    def train_dataloader(self) -> Any:
        return loader(32)

    val_dataloader = train_dataloader


def trainer(*callbacks: Any, **options: Any) -> unified.Trainer:
    return unified.Trainer(callbacks=list(callbacks), **(QUIET | {"max_epochs": 4} | options))


# ---- the unified package ---------------------------------------------------------------------------------------------


def test_a_trainer_of_the_unified_package_quantizes_logs_and_resumes(tmp_path: Path) -> None:
    whole, callback = Unified(), INQCallback(schedule=SCHEDULE)
    witness = Witness(callback)
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    run = trainer(callback, witness, saver, enable_checkpointing=True)
    run.fit(whole)
    assert witness.checks > 16
    assert_quantized(whole, callback)  # type: ignore[arg-type]
    assert run.callback_metrics["inq/quantized_fraction"] == 1.0
    assert run.callback_metrics["loss"] > 0
    for step in (2, 8, 14):
        resumed, again = Unified(), INQCallback(schedule=SCHEDULE)
        trainer(again).fit(resumed, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert_quantized(resumed, again)  # type: ignore[arg-type]
        if step % 4 == 0:  # the loader of this test begins anew in mid-epoch
            for name, tensor in whole.state_dict().items():
                assert torch.equal(tensor, resumed.state_dict()[name])


def test_both_packages_train_to_the_same_weights(tmp_path: Path) -> None:
    class Separate(separate.LightningModule):
        training_step, validation_step = Unified.training_step, Unified.validation_step
        configure_optimizers, train_dataloader = Unified.configure_optimizers, Unified.train_dataloader
        val_dataloader = train_dataloader

        def __init__(self) -> None:
            super().__init__()
            self.net = Unified().net

    ours, theirs = Separate(), Unified()
    one, other = INQCallback(schedule=SCHEDULE), INQCallback(schedule=SCHEDULE)
    first = separate.Trainer(callbacks=[one], max_epochs=4, **QUIET)
    first.fit(ours)
    trainer(other).fit(theirs)
    for name, w in weights(ours, one).items():
        assert same_bits(w, weights(theirs, other)[name])  # type: ignore[arg-type]


def test_guards_know_the_callbacks_of_the_unified_package(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="StochasticWeightAveraging begins at epoch 1"):
        trainer(INQCallback(schedule=SCHEDULE), StochasticWeightAveraging(0.01, swa_epoch_start=2)).fit(Unified())
    with pytest.raises(ValueError, match="EMAWeightAveraging saves and returns averaged weights"):
        trainer(INQCallback(schedule=SCHEDULE), unified.callbacks.EMAWeightAveraging()).fit(Unified())
    best = ModelCheckpoint(tmp_path, monitor="val_loss")
    callback, module = INQCallback(schedule=SCHEDULE), Unified()
    run = trainer(EarlyStopping("val_loss", patience=1), callback, best, max_epochs=9, enable_checkpointing=True)
    run.fit(module)
    assert_quantized(module, callback)  # type: ignore[arg-type]
    assert run.current_epoch < 9
    assert torch.load(best.best_model_path, weights_only=True)["inq"]["fully_quantized"] is True


def test_lbfgs_and_short_runs_are_refused_in_the_unified_package_too() -> None:
    class Wrong(Unified):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(ValueError, match="LBFGS"):
        trainer(INQCallback(schedule=SCHEDULE)).fit(Wrong())
    with pytest.raises(ValueError, match="runs only 3 epochs"):
        trainer(INQCallback(schedule=SCHEDULE), max_epochs=3).fit(Unified())


SCRIPT = """
import sys
import lightning.pytorch as pl
from lightning.pytorch.cli import LightningCLI
sys.path.insert(0, sys.argv.pop(1))
from inq_lightning import INQCallback
import pytorch_lightning
assert isinstance(INQCallback(), pl.Callback) and isinstance(INQCallback(), pytorch_lightning.Callback)
from test_packages import QUIET, Unified
cli = LightningCLI(Unified, run=False, save_config_callback=None, trainer_defaults={**QUIET, "max_epochs": 4})
cli.trainer.fit(cli.model)
inq = next(c for c in cli.trainer.callbacks if isinstance(c, INQCallback))
print("bits", inq.options.bits, "portions", inq.options.phases.portions, "quantized", inq.quantized_fraction)
single = INQCallback(schedule={0: 1.0})
pl.Trainer(callbacks=single, max_epochs=1, **QUIET).fit(Unified())
print("single", single.quantized_fraction)
"""


def test_the_command_line_of_the_unified_package_takes_the_callback(tmp_path: Path) -> None:
    options = ["--trainer.callbacks+=inq_lightning.INQCallback", "--trainer.callbacks.bits=4"]
    options.append("--trainer.callbacks.schedule=alexnet")
    printed = run_program("-c", SCRIPT, Path(__file__).parent, *options, cwd=tmp_path)
    assert "bits 4 portions (0.3, 0.6, 0.8, 1.0) quantized 1.0" in printed
    assert "single 1.0" in printed


# ---- LightningCLI ----------------------------------------------------------------------------------------------------


def cli(*arguments: str) -> INQCallback:
    """The callback that a LightningCLI makes of its command line."""
    defaults = {**QUIET, "max_epochs": 4}
    made = LightningCLI(TinyModule, run=False, save_config_callback=None, trainer_defaults=defaults, args=arguments)
    return next(callback for callback in made.trainer.callbacks if isinstance(callback, INQCallback))


ADD = "--trainer.callbacks+=inq_lightning.INQCallback"
TWO = Schedule([0.5, 1.0], [0, 1])


@pytest.mark.parametrize(
    ("option", "attribute", "value"),
    [
        ("bits=4", "bits", 4),
        ("schedule=alexnet", "phases", Schedule.from_preset("alexnet")),
        ('schedule={"0": 0.5, "1": 1.0}', "phases", TWO),
        ('schedule={"portions": [0.5, 1.0], "starts": [0, 1]}', "phases", TWO),
        ('schedule={"portions": [0.5, 1.0]}', "phases", Schedule([0.5, 1.0])),
        (
            'schedule={"class_path": "inq_lightning.Schedule", "init_args": {"portions": [1.0], "starts": [3],'
            ' "unit": "step"}}',
            "phases",
            Schedule([1.0], [3], "step"),
        ),
        ('layer_bits={"net.0": 8, "net.3": 3}', "layer_bits", {"net.0": 8, "net.3": 3}),
        ("levels=dense", "levels", "dense"),
        ('levels={"zero": false, "exponents": [0, 2]}', "levels", Levels(zero=False, exponents=(0, 2))),
        (
            'layer_levels={"net.0": "full", "net.3": {"zero": true, "exponents": [0, 3]}}',
            "layer_levels",
            {"net.0": "full", "net.3": Levels(zero=True, exponents=(0, 3))},
        ),
        ("partition=random", "partition", "random"),
        ("underflow=truncate", "underflow", "truncate"),
        ("keep_zeros=true", "keep_zeros", True),
        ('include=["net.*"]', "include", ["net.*"]),
        ('exclude=["net.3"]', "exclude", ["net.3"]),
        ("restart_lr=false", "restart_lr", False),
        ("seed=5", "seed", 5),
    ],
)
def test_every_kind_of_option_can_be_given_on_the_command_line(option: str, attribute: str, value: Any) -> None:
    assert getattr(cli(ADD, f"--trainer.callbacks.{option}").options, attribute) == value


YAML = """
trainer:
  max_epochs: 4
  callbacks:
    - class_path: pytorch_lightning.callbacks.TQDMProgressBar
    - class_path: inq_lightning.INQCallback
      init_args:
        bits: 3
        layer_bits: {net.0: 8}
        schedule: SCHEDULE
"""


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("resnet50", Schedule.from_preset("resnet50")),
        ("{0: 0.5, 1: 1.0}", TWO),
        ("{portions: [0.5, 1], starts: [0, 1]}", TWO),
        ("{class_path: inq_lightning.Schedule, init_args: {portions: [0.5, 1.0], starts: [0, 1]}}", TWO),
        ("null", Schedule.from_preset("3bit")),
    ],
)
def test_a_yaml_file_configures_the_callback(schedule: str, expected: Schedule, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(YAML.replace("SCHEDULE", schedule))
    options = cli("--config", str(file), "--trainer.enable_progress_bar=true").options
    assert (options.bits, options.layer_bits, options.phases) == (3, {"net.0": 8}, expected)


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        ({"bits": 4.0}, ["bits", "Expected a <class 'int'>. Got value: 4.0"]),
        ({"bitz": 4}, ["'bitz' is not accepted"]),
        ({"bits": 9}, ["bits must be an integer from 2 to 8, got 9"]),
        ({"schedule": "alexnot"}, ["unknown schedule 'alexnot'", "did you mean alexnet"]),
        ({"schedule": {"0": 0.5, "1": 0.9}}, ["last portion must be 1.0"]),
        ({"schedule": {"portions": 0.5}}, ["schedule", "portions"]),
        ({"partition": "largest"}, ["partition", "largest", "magnitude"]),
        ({"layer_bits": {"net.0": "eight"}}, ["layer_bits", "eight"]),
        ({"exclude": "net.3"}, ["exclude", "net.3"]),
    ],
)
def test_wrong_values_are_refused_by_name(
    options: dict[str, Any], messages: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"trainer": {"callbacks": [{"class_path": "inq_lightning.INQCallback", "init_args": options}]}}
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(config))
    with pytest.raises((SystemExit, ValueError)) as raised:
        cli("--config", str(file))
    said = f"{raised.value}{capsys.readouterr().err}"
    assert all(message in said.partition("usage:")[0] + said.rpartition("error:")[2] for message in messages), said


def run_example(folder: Path, *options: str) -> float:
    """What the example says of its accuracy."""
    printed = run_program(EXAMPLE / "main.py", "fit", "--trainer.accelerator=cpu", *options, cwd=folder)
    assert ("bits 4, quantized 100%" in printed) == ("train.yaml" not in "".join(options))
    return float(printed.rpartition("\naccuracy ")[2])


def test_the_example_goes_on_from_a_trained_network_and_keeps_its_accuracy(tmp_path: Path) -> None:
    before = run_example(tmp_path, "--config", str(EXAMPLE / "train.yaml"), "--trainer.logger=false")
    after = run_example(
        tmp_path, "--config", str(EXAMPLE / "config.yaml"), "--trainer.callbacks.bits=4", "--trainer.logger=false"
    )
    assert after > before - 0.01


@pytest.mark.slow
def test_the_configuration_that_the_command_line_saves_runs_again(tmp_path: Path) -> None:
    short = ["--trainer.max_epochs=1", "--trainer.logger=false"]
    run_example(tmp_path, "--config", str(EXAMPLE / "train.yaml"), *short)
    run_example(tmp_path, "--config", str(EXAMPLE / "config.yaml"), "--trainer.callbacks.bits=4")
    (saved,) = tmp_path.rglob("version_*/config.yaml")
    run_example(tmp_path, "--config", str(saved), "--trainer.logger=false")
