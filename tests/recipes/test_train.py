from __future__ import annotations

import csv
import dataclasses
import json
import logging
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig
from processes import Program, run_program, write_script
from pytorch_lightning import Trainer
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from inq_lightning import PRESETS, inspect_file, read_packed
from inq_lightning.cli.export import main as export
from inq_lightning.grid import from_spec
from inq_lightning.recipes.models import LeNet5, SmallCNN
from inq_lightning.recipes.plan import main as plan
from inq_lightning.recipes.start import plan_epochs
from inq_lightning.recipes.train import main
from inq_lightning.report.run import Report

SHORT = (
    "pretrain.max_epochs=1",
    "inq.schedule.epochs_per_phase=1",
    "trainer.accelerator=cpu",
    "trainer.limit_train_batches=3",
    "trainer.enable_progress_bar=false",
)
TINY = (*SHORT, "inq.schedule.portions=[0.5,1.0]", "callbacks=none", "logger=none")
LONG = (  # long enough to be interrupted
    "pretrain.max_epochs=1",
    "inq.schedule.portions=[0.5,1.0]",
    "inq.schedule.epochs_per_phase=6",
    "trainer.accelerator=cpu",
    "trainer.enable_progress_bar=false",
    "logger=none",
)
LONG_PRETRAINING = (
    "pretrain.max_epochs=6",
    "inq.schedule.portions=[1.0]",
    "inq.schedule.epochs_per_phase=1",
    "trainer.accelerator=cpu",
    "trainer.enable_progress_bar=false",
    "logger=csv",
)

MY_MODULE = """
import torch
from pytorch_lightning import LightningModule
from torch import nn


class MyModule(LightningModule):
    def __init__(self, hidden):
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, hidden[0]), nn.ReLU(), nn.Linear(hidden[0], 10))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.body(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        self.log("test/acc", (self.body(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)
"""


@pytest.fixture(scope="module", autouse=True)
def process_wide_settings_stay() -> Iterator[None]:
    """Puts back what the application rightly sets for the whole of its process."""
    logger = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    level, path = logger.level, list(sys.path)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
            patch.setenv(name, "0")
        yield
    logger.setLevel(level)
    sys.path[:] = path


def configure(*overrides: str) -> DictConfig:
    with initialize_config_module("inq_lightning.conf", version_base="1.3"):
        return compose("train", overrides=list(overrides))


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    """The application in this process; its report."""
    folder.mkdir(parents=True, exist_ok=True)
    main(configure(f"output_dir={folder}", *overrides))
    return read_report(folder)


def read_report(folder: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    report: dict[str, Any] = json.loads((folder / "report.json").read_text(), parse_constant=refuse)
    return report


def load(path: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    return checkpoint


def scalars(folder: Path, tag: str) -> list[float]:
    return [event.value for event in EventAccumulator(str(folder)).Reload().Scalars(tag)]


def selected_sizes() -> dict[str, int]:
    """Numbers of weights of the default network's convolutions and its linear layer."""
    return {f"net.{name}": p.numel() for name, p in SmallCNN().named_parameters() if p.dim() > 1}


def assert_quantized(path: Path) -> None:
    """Every convolution's and linear layer's weights are on their grids."""
    checkpoint = load(path)
    state = checkpoint["callbacks"]["INQCallback"]["layers"]
    assert state.keys() == selected_sizes().keys()
    for name, layer in state.items():
        weight = checkpoint["state_dict"][name]
        levels = from_spec(layer["grid"]).levels
        assert layer["frozen"] == weight.numel()
        assert torch.isin(weight.double(), levels).all(), name


def assert_same_weights(path: Path, other: Path) -> None:
    ours, theirs = load(path)["state_dict"], load(other)["state_dict"]
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


# ---- one run, as users start it --------------------------------------------------------------------------------------


@dataclasses.dataclass
class Finished:
    cwd: Path
    folder: Path
    output: str
    code: int


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    cwd = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        done = Program("inq-train", *SHORT, "inq.schedule.portions=[0.25,0.5,1.0]", cwd=cwd).finish()
    folders = list(cwd.glob("outputs/*/*"))
    assert len(folders) == 1, done.stderr
    return Finished(cwd, folders[0], done.stdout + done.stderr, done.returncode)


@pytest.fixture(scope="module")
def pretrained(finished: Finished) -> Path:
    """Lightning checkpoint of the full-precision network."""
    return finished.folder / "pretrain" / "last.ckpt"


def test_the_console_script_runs_in_any_directory_and_leaves_everything_in_its_run_folder(finished: Finished) -> None:
    assert finished.code == 0, finished.output
    assert [path.name for path in finished.cwd.iterdir()] == ["outputs"]
    assert {path.name for path in finished.folder.iterdir()} == {
        ".hydra",
        "pretrain",
        "quantize",
        "quantized.ckpt",
        "quantized.safetensors",
        "report.json",
        "tensorboard",
        "train.log",
    }
    assert not list(finished.cwd.rglob("*.partial"))


def test_the_terminal_shows_the_report_and_where_the_files_are(finished: Finished) -> None:
    for text in ("full precision", "test/acc", "quantized fraction", "17 of 17", str(finished.folder)):
        assert text in finished.output


def test_the_report_is_strict_json_with_every_field(finished: Finished) -> None:
    report = read_report(finished.folder)
    assert report.keys() == {field.name for field in dataclasses.fields(Report)}
    assert report["quantized_fraction"] == 1.0
    assert report["bits"] == [5]
    assert report["levels_allowed"] == 17
    assert 2 <= report["levels_used"] <= 17
    assert report["before"].keys() == report["after"].keys() == {"test/loss", "test/acc"}
    assert 0 < report["seconds"] < 300


def test_the_sizes_are_those_of_the_network(finished: Finished) -> None:
    report = read_report(finished.folder)
    selected, weights = sum(selected_sizes().values()), sum(p.numel() for p in SmallCNN().parameters())
    bits = 5 * selected + 32 * (weights - selected)
    assert report["bytes_before"] == 4 * weights
    assert report["bytes_after"] == -(-bits // 8)
    assert report["bits_per_weight"] == pytest.approx(bits / weights)


def test_the_final_checkpoint_loads_safely_and_holds_only_weights_on_their_grids(finished: Finished) -> None:
    assert_quantized(finished.folder / "quantized.ckpt")


def test_the_final_checkpoint_scores_what_the_report_says(finished: Finished) -> None:
    assert direct_test(finished.folder / "quantized.ckpt") == read_report(finished.folder)["after"]


def test_tensorboard_shows_the_fraction_and_the_phase_of_every_epoch(finished: Finished) -> None:
    sizes = selected_sizes().values()
    expected = [sum(round(portion * size) for size in sizes) / sum(sizes) for portion in (0.25, 0.5, 1.0)]
    folder = finished.folder / "tensorboard" / "quantize"
    assert scalars(folder, "inq/quantized_fraction") == pytest.approx(expected, abs=1e-6)
    assert scalars(folder, "inq/phase") == [1.0, 2.0, 3.0]


def test_rounded_activations_are_trained_and_tested_as_whole_numbers(pretrained: Path, tmp_path: Path) -> None:
    options = ("inq.bits=4", "inq.activation_bits=4", "+inq.layer_activation_bits={net.f*.2: 6}")
    report = run(tmp_path / "run", f"ckpt={pretrained}", *options)
    assert abs(report["integer"]["metrics"]["test/acc"] - report["after"]["test/acc"]) < 0.03
    found = inspect_file(tmp_path / "run" / "quantized.safetensors")
    assert sorted(one.bits for one in found.activations) == [4, 4, 6, 8]
    # Of a network that has its activations already.
    again = run(tmp_path / "again", f"ckpt={tmp_path}/run/quantized.ckpt", *options)
    assert again["integer"] is not None


def test_a_preset_brings_its_portions_and_leaves_the_bits(pretrained: Path, tmp_path: Path) -> None:
    report = run(tmp_path, *SHORT, f"ckpt={pretrained}", "callbacks=none", "inq.bits=3", "inq/schedule=googlenet")
    fractions = scalars(tmp_path / "tensorboard" / "quantize", "inq/quantized_fraction")
    assert fractions == pytest.approx(PRESETS["googlenet"], abs=1e-3)
    assert report["bits"] == [3]
    assert report["levels_allowed"] == 8  # dense


def test_a_multirun_leaves_a_run_folder_for_each_job(pretrained: Path, tmp_path: Path) -> None:
    printed = run_program("inq-train", "-m", *TINY, f"ckpt={pretrained}", "inq.bits=2,3", "--json", cwd=tmp_path)
    assert [json.loads(line)["event"] for line in printed.splitlines()] == ["epoch", "epoch", "report"] * 2
    folders = sorted(path.parent for path in tmp_path.glob("multirun/*/*/*/report.json"))
    assert [folder.name for folder in folders] == ["0_inq.bits-2", "1_inq.bits-3"]
    assert [read_report(folder)["bits"] for folder in folders] == [[2], [3]]
    for folder in folders:
        assert_quantized(folder / "quantized.ckpt")


def test_the_same_seed_gives_the_same_network_and_another_seed_another(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(tmp_path / name, *TINY, f"seed={seed}")
    first, second, other = (tmp_path / name / "quantized.ckpt" for name in "abc")
    assert_same_weights(first, second)
    assert not torch.equal(load(first)["state_dict"]["net.linear.bias"], load(other)["state_dict"]["net.linear.bias"])


def test_default_callbacks_work_without_a_logger(tmp_path: Path) -> None:
    run(tmp_path, *TINY, "callbacks=default")
    assert (tmp_path / "quantize" / "last.ckpt").is_file()


def test_a_trial_run_need_not_reach_the_last_phase(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="training ended with 50.0%"):
        report = run(tmp_path, *TINY, "trainer.fast_dev_run=true")
    assert report["quantized_fraction"] == pytest.approx(0.5, abs=1e-3)


@pytest.mark.slow
def test_two_processes_write_one_report(tmp_path: Path) -> None:
    script = write_script("inq-train", tmp_path)  # which Lightning starts once more
    command = [script, *TINY, "trainer=ddp", "trainer.devices=2", f"hydra.run.dir={tmp_path}/run"]
    done = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("Incremental Network Quantization") == 1
    assert "Error" not in done.stdout
    assert read_report(tmp_path / "run")["quantized_fraction"] == 1.0
    assert_quantized(tmp_path / "run" / "quantized.ckpt")


# ---- ckpt and resume -------------------------------------------------------------------------------------------------


def direct_test(checkpoint: Path) -> dict[str, float]:
    """Test metrics of a Lightning checkpoint, without the application."""
    cfg = configure()
    module = instantiate(cfg.model)
    module.load_state_dict(load(checkpoint)["state_dict"])
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    (metrics,) = trainer.test(module, instantiate(cfg.data), verbose=False)
    return dict(metrics)


def test_a_lightning_checkpoint_takes_the_place_of_pretraining(pretrained: Path, tmp_path: Path) -> None:
    report = run(tmp_path, *TINY, "callbacks=default", f"ckpt={pretrained}")
    assert report["before"] == direct_test(pretrained)
    assert not (tmp_path / "pretrain").exists()
    assert_quantized(tmp_path / "quantized.ckpt")


def test_the_teacher_is_the_full_precision_network_which_has_none_itself(tmp_path: Path) -> None:
    run(tmp_path, *TINY, "callbacks=default", "model.distillation=0.5")
    before, after = load(tmp_path / "pretrain" / "last.ckpt"), load(tmp_path / "quantize" / "last.ckpt")
    assert "teacher" not in before
    weights = {name.removeprefix("net."): value for name, value in before["state_dict"].items()}
    torch.testing.assert_close(dict(after["teacher"]), weights, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "save"), [("weights.pt", torch.save), ("weights.safetensors", save_file)])
def test_a_plain_state_dict_takes_the_place_of_pretraining(
    pretrained: Path, tmp_path: Path, name: str, save: Callable[[dict[str, Tensor], Path], None]
) -> None:
    save(load(pretrained)["state_dict"], tmp_path / name)
    report = run(tmp_path, *TINY, f"ckpt={tmp_path / name}")
    assert report["before"] == direct_test(pretrained)
    assert report["quantized_fraction"] == 1.0


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"ckpt={tmp_path}/none\.ckpt: there is no such file"):
        run(tmp_path, *TINY, f"ckpt={tmp_path}/none.ckpt")


@pytest.mark.parametrize("name", ["half.ckpt", "half.safetensors"])
def test_a_truncated_checkpoint_is_named(pretrained: Path, tmp_path: Path, name: str) -> None:
    half = tmp_path / name
    half.write_bytes(pretrained.read_bytes()[: pretrained.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"ckpt={half} cannot be read as a checkpoint"):
        run(tmp_path, *TINY, f"ckpt={half}")


def test_a_file_that_holds_no_state_is_named(tmp_path: Path) -> None:
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    with pytest.raises(ValueError, match=rf"ckpt={tmp_path}/tensor\.pt holds a Tensor, not a checkpoint"):
        run(tmp_path, *TINY, f"ckpt={tmp_path}/tensor.pt")


def test_the_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    other = {f"net.{name}": tensor for name, tensor in LeNet5().state_dict().items()}
    torch.save({"state_dict": other}, tmp_path / "lenet5.ckpt")
    with pytest.raises(
        ValueError, match=rf"(?s)ckpt={tmp_path}/lenet5\.ckpt does not fit the configured model.*net\.linear"
    ):
        run(tmp_path, *TINY, f"ckpt={tmp_path}/lenet5.ckpt")


def test_resume_asks_for_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="resume=true needs ckpt=PATH"):
        run(tmp_path, *TINY, "resume=true")


def test_resume_refuses_mere_weights(pretrained: Path, tmp_path: Path) -> None:
    torch.save(load(pretrained)["state_dict"], tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weights\.pt holds weights only, nothing to resume"):
        run(tmp_path, *TINY, f"ckpt={tmp_path}/weights.pt", "resume=true")


# ---- Ctrl-C ----------------------------------------------------------------------------------------------------------


def interrupt(folder: Path, stage: str, *overrides: str) -> None:
    """Starts a run and presses Ctrl-C once it has saved the first epoch of a stage."""
    if os.name == "nt":
        pytest.skip("no Ctrl-C can be sent to one process")
    program = Program("inq-train", *overrides, f"hydra.run.dir={folder}", cwd=folder.parent)
    deadline = time.monotonic() + 120
    while not (folder / stage / "last.ckpt").exists() and program.process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    early = not program.process.is_alive()
    if not early:
        program.interrupt()
    done = program.finish()
    assert not early, f"ended before Ctrl-C: {done.stderr}"
    assert done.returncode == 1, done.stderr


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    run(folder, *LONG)
    return folder


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interrupted") / "run"
    interrupt(folder, "quantize", *LONG)
    return folder


def test_ctrl_c_leaves_checkpoints_of_a_run_under_way(interrupted: Path) -> None:
    assert not (interrupted / "quantized.ckpt").exists()
    assert not (interrupted / "report.json").exists()
    for name in ("interrupted.ckpt", "last.ckpt"):
        state = load(interrupted / "quantize" / name)["callbacks"]["INQCallback"]
        assert state["quantized_fraction"] == pytest.approx(0.5, abs=1e-3)


def test_an_interrupted_quantization_is_completed(interrupted: Path, tmp_path: Path) -> None:
    checkpoint = interrupted / "quantize" / "interrupted.ckpt"
    report = run(tmp_path, *LONG, f"ckpt={checkpoint}", "resume=true")
    assert report["quantized_fraction"] == 1.0
    assert_quantized(tmp_path / "quantized.ckpt")
    carried = load(checkpoint)["callbacks"]["FullPrecision"]
    assert report["before"] == carried["metrics"] == direct_test(interrupted / "pretrain" / "last.ckpt")
    assert report["seconds"] > carried["seconds"] > 0
    assert not (tmp_path / "pretrain").exists()


def test_resuming_after_whole_epochs_changes_no_bit(interrupted: Path, uninterrupted: Path, tmp_path: Path) -> None:
    report = run(tmp_path, *LONG, f"ckpt={interrupted}/quantize/last.ckpt", "resume=true")
    assert_same_weights(tmp_path / "quantized.ckpt", uninterrupted / "quantized.ckpt")
    expected = read_report(uninterrupted)
    assert {k: v for k, v in report.items() if k != "seconds"} == {k: v for k, v in expected.items() if k != "seconds"}


def test_resuming_with_other_settings_is_refused(interrupted: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"net\.linear\.weight: bits 5 in the checkpoint, 4 here"):
        run(tmp_path, *LONG, "inq.bits=4", f"ckpt={interrupted}/quantize/last.ckpt", "resume=true")


def test_a_run_interrupted_in_its_last_test_is_completed(uninterrupted: Path, tmp_path: Path) -> None:
    report = run(tmp_path, *LONG, f"ckpt={uninterrupted}/quantize/last.ckpt", "resume=true")
    expected = read_report(uninterrupted)
    assert report["quantized_fraction"] == 1.0
    assert report["bytes_after"] == expected["bytes_after"]
    assert report["after"] == expected["after"]


def test_an_interrupted_pretraining_goes_on_and_is_then_quantized(tmp_path: Path) -> None:
    folder, straight = tmp_path / "run", tmp_path / "straight"
    interrupt(folder, "pretrain", *LONG_PRETRAINING)
    assert not (folder / "quantize").exists()
    expected = run(straight, *LONG_PRETRAINING)
    for name in ("interrupted", "last"):
        resumed = tmp_path / name
        report = run(resumed, *LONG_PRETRAINING, f"ckpt={folder}/pretrain/{name}.ckpt", "resume=true")
        assert report["quantized_fraction"] == 1.0
        assert_quantized(resumed / "quantized.ckpt")
        with (resumed / "csv" / "pretrain" / "metrics.csv").open() as file:
            epochs = {int(row["epoch"]) for row in csv.DictReader(file) if row["val/acc"]}
        assert epochs == set(range(min(epochs), 6))
        assert min(epochs) > 0, "pre-training began anew"
    assert report["before"] == expected["before"]
    assert_same_weights(tmp_path / "last" / "quantized.ckpt", straight / "quantized.ckpt")


# ---- mistakes on the command line ------------------------------------------------------------------------------------


@pytest.mark.parametrize("override", ["inq.bist=3", "trainer.max_epoch=3", "inq.schedule.portion=[1.0]", "sede=3"])
def test_an_unknown_key_is_refused_by_name(override: str) -> None:
    with pytest.raises(HydraException, match=f"Could not override '{override.split('=')[0]}'"):
        configure(override)


@pytest.mark.parametrize(
    "override",
    [
        "inq.bits=five",
        "inq.schedule.portions=half",
        "inq.restart_lr=perhaps",
        "trainer.max_epochs=two",
        "pretrain.max_epochs=1.5",
        "model.lr=fast",
        "data.batch_size=big",
        "resume=maybe",
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_its_key(override: str) -> None:
    with pytest.raises(HydraException, match=f"Error merging override {override}"):
        configure(override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("inq.bits=9", "bits must be an integer from 2 to 8, got 9"),
        ("inq.partition=biggest", "partition must be one of magnitude, random, got 'biggest'"),
        ("inq.underflow=up", "underflow must be one of nearest, truncate, got 'up'"),
        ("inq.schedule.portions=[0.5,0.25,1.0]", r"larger than the one before, got \[0.5, 0.25, 1.0\]"),
        ("inq.schedule.portions=[0.5,0.75]", r"the last portion must be 1.0, .* got \[0.5, 0.75\]"),
        ("inq.schedule.epochs_per_phase=0", "a phase must last at least 1 epoch, got 0"),
        ("inq.schedule.unit=step", "epochs_per_phase excludes starts and unit=step"),
        ("trainer.max_epochs=1", "reaches portion 1.0 at epoch 1 .* runs only 1 epochs"),
        ("data.batch_size=0", "batch_size must be at least 1; got 0"),
        ("+pretrain.model.speed=3", "pretrain.model.speed is no key of the model's config"),
        ("model.lr_schedule=linear", "lr_schedule must be one of constant, cosine, onecycle, got 'linear'"),
    ],
)
def test_a_value_that_is_not_allowed_is_named(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, HydraException), match=message):
        run(tmp_path, *TINY, override)
    assert not (tmp_path / "report.json").exists()


@pytest.mark.parametrize("override", ["inq/schedule=nope", "model=nope", "data=nope", "trainer=nope"])
def test_an_unknown_option_of_a_group_is_refused_with_those_there_are(override: str) -> None:
    group = override.split("=")[0]
    with pytest.raises(HydraException, match=rf"Could not find '{group}/nope'\n\nAvailable options in '{group}':\n\t"):
        configure(override)


def test_a_mistake_ends_the_console_script_with_a_message(tmp_path: Path) -> None:
    done = Program("inq-train", *TINY, "trainer.max_epochs=1", cwd=tmp_path).finish()
    assert done.returncode == 2
    assert "\ninq-train: the schedule reaches portion 1.0 at epoch 1" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("override", ["inq.schedule.epochs_per_phase=4", "inq.schedule.starts=[0,3]"])
def test_too_short_a_run_is_refused_before_pretraining(override: str, tmp_path: Path) -> None:
    overrides = ["inq.schedule.epochs_per_phase=null", override, "callbacks=default", "trainer.max_epochs=3"]
    with pytest.raises(ValueError, match="training runs only 3 epochs"):
        run(tmp_path, *TINY, *overrides)
    assert not (tmp_path / "pretrain").exists()


# ---- how long a run is -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "max_epochs", "lr_epochs"),
    [
        ([], 16, 4),
        (["inq.bits=3"], 32, 4),
        (["inq.schedule.epochs_per_phase=2"], 8, 2),
        (["inq.schedule.portions=[0.5,1.0]", "inq.schedule.epochs_per_phase=3"], 6, 3),
        (["trainer.max_epochs=10"], 10, 2),
        (["trainer.max_epochs=10", "inq.schedule.epochs_per_phase=1"], 10, 1),
        (["trainer.max_steps=100"], None, None),
        (["inq.schedule.portions=[0.5,1.0]", "inq.schedule.starts=[0,5]", "trainer.max_epochs=8"], 8, 4),
        (["inq.schedule.unit=step", "trainer.max_steps=100"], None, None),
        (["model.lr_epochs=7"], 16, 7),
    ],
)
def test_what_is_left_open_follows_from_the_schedule(
    overrides: list[str], max_epochs: int | None, lr_epochs: int | None
) -> None:
    cfg = configure(*overrides)
    plan_epochs(cfg, instantiate(cfg.inq.schedule))
    assert cfg.trainer.max_epochs == max_epochs
    assert cfg.model.lr_epochs == lr_epochs


def test_a_module_without_lr_epochs_is_left_alone() -> None:
    cfg = configure("model=custom", "model._target_=torch.nn.Identity")
    plan_epochs(cfg, instantiate(cfg.inq.schedule))
    assert cfg.model == {"_target_": "torch.nn.Identity"}


@pytest.mark.parametrize("unit", ["epoch", "step"])
def test_starts_need_an_end(unit: str) -> None:
    cfg = configure("inq.schedule.portions=[0.5,1.0]", "inq.schedule.starts=[0,5]", f"inq.schedule.unit={unit}")
    with pytest.raises(ValueError, match=r"inq\.schedule\.starts .* set trainer\.max_epochs or trainer\.max_steps"):
        plan_epochs(cfg, instantiate(cfg.inq.schedule))


def test_steps_can_count_instead_of_epochs(pretrained: Path, tmp_path: Path) -> None:
    starts = ["inq.schedule.portions=[0.5,1.0]", "inq.schedule.starts=[0,4]", "inq.schedule.unit=step"]
    overrides = ["inq.schedule.epochs_per_phase=null", *starts, "trainer.max_steps=7", "trainer.limit_train_batches=4"]
    report = run(tmp_path, *TINY, f"ckpt={pretrained}", *overrides)
    assert report["quantized_fraction"] == 1.0
    assert load(tmp_path / "quantized.ckpt")["global_step"] == 7


# ---- modules of one's own --------------------------------------------------------------------------------------------


def test_a_module_of_ones_own_in_the_working_directory_works_end_to_end(tmp_path: Path) -> None:
    (tmp_path / "my_module.py").write_text(MY_MODULE)
    custom = ["model=custom", "model._target_=my_module.MyModule", "+model.hidden=[8]", "pretrain=plain"]
    run_program("inq-train", *TINY, *custom, "hydra.run.dir=run", cwd=tmp_path)
    report = read_report(tmp_path / "run")
    assert report["quantized_fraction"] == 1.0
    assert report["before"].keys() == report["after"].keys() == {"test/acc"}
    assert report["bytes_after"] == -(-(5 * (64 * 8 + 8 * 10) + 32 * 18) // 8)
    checkpoint = load(tmp_path / "run" / "quantized.ckpt")
    assert checkpoint["hyper_parameters"] == {"hidden": [8]}
    assert checkpoint["callbacks"]["INQCallback"]["layers"].keys() == {"body.1.weight", "body.3.weight"}


PARTIAL = """
from functools import partial
import torch
from pytorch_lightning import LightningModule
from torch import nn


class Keeps:
    pass


class Module(LightningModule):
    def __init__(self, optimizer, keeps=False):
        super().__init__()
        self.save_hyperparameters()
        self.keeps = keeps
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.body(batch[0]), batch[1])

    def forward(self, x):
        return self.body(x)

    def test_step(self, batch, batch_idx):
        self.log("test/acc", (self.body(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return self.hparams.optimizer(self.parameters())

    def on_save_checkpoint(self, checkpoint):
        if self.keeps:
            checkpoint["mine"] = [Keeps()]
"""


def test_a_module_with_a_partial_optimizer_among_its_hyperparameters_reads_back_what_it_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_partial.py").write_text(PARTIAL)
    monkeypatch.chdir(tmp_path)
    custom = [
        *SHORT,
        "inq.schedule.portions=[0.5,1.0]",
        "logger=none",
        "model=custom",
        "model._target_=my_partial.Module",
        "+model.optimizer={_target_: torch.optim.SGD, _partial_: true, lr: 0.1}",
        "pretrain=plain",
    ]
    first = run(tmp_path / "first", *custom)
    ckpt = tmp_path / "first" / "quantized.ckpt"
    with pytest.raises(pickle.UnpicklingError):
        load(ckpt)
    resumed = run(tmp_path / "resumed", *custom, f"ckpt={ckpt}", "resume=true")
    assert resumed["after"] == first["after"]
    run(tmp_path / "pretraining", *custom, f"ckpt={tmp_path}/first/pretrain/last.ckpt", "resume=true")
    initialized = run(tmp_path / "initialized", *custom, f"ckpt={tmp_path}/first/pretrain/last.ckpt")
    assert initialized["before"] == first["before"]
    assert inspect_file(ckpt).quantized_fraction == 1
    export([str(ckpt), str(tmp_path / "net.safetensors")])
    weight = torch.load(ckpt, weights_only=False)["state_dict"]["body.1.weight"]
    assert torch.equal(read_packed(tmp_path / "net.safetensors").state_dict["body.1.weight"], weight)
    kept = run(tmp_path / "kept", *custom, "+model.keeps=true", f"ckpt={ckpt}")
    assert kept["quantized_fraction"] == 1
    with pytest.raises(ValueError, match=r"holds in mine objects that only code could restore.*leave out resume=true"):
        run(tmp_path / "refused", *custom, f"ckpt={tmp_path}/kept/quantized.ckpt", "resume=true")


def command(function: Callable[[], None], *arguments: str) -> None:
    """A command as Hydra runs it, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["inq", *arguments])
        function()


def test_relative_paths_are_those_of_the_working_directory_in_whatever_folder_the_job_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    images, labels = torch.randint(0, 256, (64, 8, 8), dtype=torch.uint8), torch.arange(64) % 3
    parts = {f"{kind}_{part}": x.numpy() for part in ("train", "test") for kind, x in (("x", images), ("y", labels))}
    np.savez("images.npz", **parts)
    (tmp_path / "my_nets.py").write_text(MY_MODULE.replace("nn.Linear(hidden[0], 10)", "nn.Linear(hidden[0], 3)"))
    custom = ["model=custom", "model._target_=my_nets.MyModule", "+model.hidden=[8]", "pretrain=plain"]
    shared = [
        *TINY,
        *custom,
        "data=npz",
        "data.batch_size=8",
        "data.path=images.npz",
        "data.in_channels=1",
        "data.image_size=8",
        "hydra.job.chdir=true",
        "output=json",
    ]
    command(main, *shared, "hydra.run.dir=run", "trainer.enable_progress_bar=false")
    again = [*shared, "ckpt=run/quantized.ckpt"]
    capsys.readouterr()
    command(plan, *again, "hydra.run.dir=plan")
    assert '"selected": 536' in capsys.readouterr().out
    command(main, *again, "hydra.run.dir=again")
    assert read_report(tmp_path / "again")["before"] == read_report(tmp_path / "run")["after"]
    assert Path.cwd() == tmp_path


def test_a_module_without_a_learning_rate_is_told_of_plain_pretraining(tmp_path: Path) -> None:
    custom = ["model=custom", "model._target_=my_module.MyModule", "+model.hidden=[8]"]
    with pytest.raises(ValueError, match=r"pretrain\.model\.lr is no key .*_target_, hidden.*pretrain=plain"):
        run(tmp_path, *TINY, *custom)
