"""The command lines of `inq-train`, `inq-plan` and `inq-quantize`: help, and mistakes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig
from omegaconf.errors import MissingMandatoryValue
from processes import Program, run_program

import inq_lightning
from inq_lightning.recipes.apps import PLAN, QUANTIZE, TRAIN, App
from inq_lightning.recipes.config import register_training, run_name
from inq_lightning.recipes.keys import check_keys
from inq_lightning.recipes.mistakes import explain

register_training()

APPS = [pytest.param(app, id=app.name) for app in (TRAIN, PLAN, QUANTIZE)]


def configure(*overrides: str, name: str = "train") -> DictConfig:
    with initialize_config_module("inq_lightning.conf", version_base="1.3"):
        return compose(name, ["output_dir=.", *overrides])


def told(*overrides: str) -> str | None:
    """What the command says of an error while its configuration is made."""
    with pytest.raises(HydraException) as caught:
        configure(*overrides)
    return explain(caught.value)


# ---- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("app", APPS)
@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_come_without_torch_and_hydra(app: App, option: str, tmp_path: Path) -> None:
    code = (
        f"import sys; sys.argv[1:] = [{option!r}]\n"
        f"from inq_lightning.recipes.apps import {app.name.removeprefix('inq-')} as main\n"
        "main(); assert not {'torch', 'hydra'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = app.about.split()[0] if option == "--help" else f"{app.name} {inq_lightning.__version__}\n"
    assert done.stdout.startswith(expected)


@pytest.mark.parametrize("app", APPS)
def test_help_fits_the_terminal_and_its_overrides_and_example_compose(app: App) -> None:
    lines = app.help().splitlines()
    assert max(map(len, lines)) <= 80
    assert len(app.keys) == 5
    assert "  model: custom, lenet5, resnet20, resnet32, resnet44, resnet56, small_cnn," in lines  # not the base
    name = app.name.removeprefix("inq-")
    with initialize_config_module("inq_lightning.conf", version_base="1.3"):
        for line in (*app.keys, app.example.removeprefix(app.name)):
            compose(name, line.split())


def test_the_tab_key_offers_keys_and_options_but_no_internal_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for typed, offered in (
        ("inq.b", ["inq.bits="]),
        ("data=", [f"data={name}" for name in ("cifar10", "custom", "digits", "imagefolder", "mnist", "npz")]),
    ):
        monkeypatch.setenv("COMP_LINE", f"inq-train {typed}")
        assert run_program("inq-train", "-sc", "query=bash", cwd=tmp_path).split() == offered


# ---- unknown keys ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "near"),
    [
        ("bits=4", "inq.bits or inq.schedule.bits"),
        ("sede=3", "seed or data.seed"),
        ("inq.bist=3", "inq.bits"),
        ("trainer.max_epoch=3", "trainer.max_epochs"),
        ("model.net.dept=3", "model.net.depth"),
    ],
)
@pytest.mark.parametrize("add", ["", "+"])
def test_an_unknown_key_is_refused_with_near_names_wherever_it_stands(override: str, near: str, add: str) -> None:
    expected = f"there is no key {override.partition('=')[0]}; did you mean {near}"
    if add:
        with pytest.raises(ValueError, match=expected):
            check_keys(configure(f"+{override}", "model=resnet20"))
    else:
        assert expected in str(told(override, "model=resnet20"))


@pytest.mark.parametrize(
    ("override", "near"),
    [
        ("+callbacks.checkpoint.filenam=x", "callbacks.checkpoint.filename"),
        ("+logger.csv.versio=x", "logger.csv.version"),
        ("+inq.schedule.portion=[1.0]", "inq.schedule.portions"),
        ("+data.batchsize=3", "data.batch_size"),
    ],
)
def test_so_is_one_of_a_nested_object(override: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"did you mean {near}"):
        check_keys(configure(override, "logger=csv"))


@pytest.mark.parametrize(
    "override",
    ["+trainer.barebones=false", "+inq.layer_bits.a=8", "+pretrain.model.net.depth=3", "+logger.csv.prefix=a"],
)
def test_what_something_takes_can_be_added(override: str) -> None:
    check_keys(configure(override, "logger=csv"))


def test_modules_of_ones_own_take_what_their_constructors_take() -> None:
    own = ["model=custom", "model._target_=torch.nn.Linear", "data=custom", "data._target_=torch.nn.Conv1d"]
    check_keys(configure(*own, "+model.in_features=3", "+data.stride=2"))
    assert told(*own, "model.bias=false") == "there is no key model.bias yet; to add it, say +model.bias=VALUE"
    with pytest.raises(ValueError, match=r"there is no key data\.strid; did you mean data.stride"):
        check_keys(configure(*own, "+data.strid=2"))
    with pytest.raises(ValueError, match="model=custom needs the class"):
        check_keys(configure("model=custom"))


def test_the_same_goes_for_quantize() -> None:
    check_keys(configure("images=3", name="quantize"))
    with pytest.raises(ValueError, match="no key image; did you mean images"):
        check_keys(configure("+image=3", name="quantize"))


# ---- mistakes --------------------------------------------------------------------------------------------------------


def test_options_of_a_group_are_listed_without_internal_ones() -> None:
    assert told("data=nope") == (
        "data=nope: there is no such option; there are cifar10, custom, digits, imagefolder, mnist, npz"
    )


def test_what_hydra_refuses_is_told_in_short() -> None:
    assert told("inq.bits=five") == (
        "Error merging override inq.bits=five\nValue 'five' of type 'str' could not be converted to Integer"
    )
    assert "names take no quotes of their own" in str(told('inq.layer_bits={"a":3}'))


def test_what_is_wrong_with_a_value_is_told_with_its_place() -> None:
    with pytest.raises(HydraException) as caught:
        instantiate(configure("inq.bits=9").inq)
    assert explain(caught.value) == "inq: bits must be an integer from 2 to 8, got 9"
    with pytest.raises(MissingMandatoryValue) as missing:
        instantiate(configure("data=npz").data)
    assert explain(missing.value) == "data.path has no value; say data.path=VALUE"


def test_an_error_of_the_users_code_keeps_its_traceback() -> None:
    for kind in (ValueError, RuntimeError, TypeError):
        with pytest.raises(kind) as caught:
            raise kind("mine")
        assert explain(caught.value) is None


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("inq-train", ["+bits=4"], "there is no key bits; did you mean inq.bits"),
        ("inq-train", ["bits=4"], "there is no key bits; did you mean inq.bits"),
        ("inq-train", ["data=npz", "--json"], "data.path has no value"),
        ("inq-train", ["ckpt=none.ckpt"], "ckpt=none.ckpt: there is no such file"),
        ("inq-train", ["model=custom", "model._target_=nope.Net", "pretrain=plain"], "model: Error loading 'nope.Net'"),
        ("inq-plan", ["resume=true"], "inq-plan plans a run from its beginning"),
        ("inq-quantize", [], "inq-quantize needs ckpt=PATH"),
    ],
)
def test_a_mistake_ends_in_one_message(command: str, arguments: list[str], message: str, tmp_path: Path) -> None:
    done = Program(command, *arguments, cwd=tmp_path).finish()
    assert done.returncode == 2
    assert f"\n{command}: {message}" in f"\n{done.stderr}"
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_traceback_is_there_for_those_who_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    done = Program("inq-plan", "resume=true", cwd=tmp_path).finish()
    assert done.returncode == 1
    assert "Traceback" in done.stderr


# ---- data of one's own, sweeps ---------------------------------------------------------------------------------------


def test_data_of_ones_own_goes_in(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from inq_lightning.recipes.data import DigitsDataModule\n"
        "class Mine(DigitsDataModule):\n"
        "    def __init__(self, batch):\n"
        "        super().__init__(batch_size=batch)\n"
    )
    shape = ["model.num_classes=10", "model.net.num_classes=10", "model.net.in_channels=1", "model.net.image_size=8"]
    short = ["pretrain.max_epochs=1", "inq.schedule.portions=[1.0]", "inq.schedule.epochs_per_phase=1", "logger=none"]
    run_program(
        "inq-train",
        *("data=custom", "data._target_=mine.Mine", "+data.batch=128", "hydra.run.dir=run", *shape, *short),
        cwd=tmp_path,
    )
    assert (tmp_path / "run" / "quantized.safetensors").is_file()


def test_runs_of_a_sweep_are_called_by_what_is_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["inq-train", "-m", "inq.bits=2,3", "resume=false", "inq/schedule=4bit,alexnet"])
    assert run_name(3, ["inq.bits=3", "resume=False", "inq/schedule=alexnet"]) == "3_inq.bits-3_inq-schedule-alexnet"
    assert run_name(0, ["resume=False"]) == "0"
