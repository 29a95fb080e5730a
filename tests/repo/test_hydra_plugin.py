from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig
from processes import run_program
from support import ROOT

from inq_lightning import PRESETS, PowerOfTwoGrid

APP = ROOT / "examples" / "template_app"


def run(*arguments: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning: \n'" not in done.stderr  # Hydra's, of two configs under one name
    return done.stdout


def template(*overrides: str, cwd: Path) -> str:
    return run_program(APP / "src" / "train.py", f"hydra.run.dir={cwd}", *overrides, cwd=cwd)


def weights(folder: Path) -> list[torch.Tensor]:
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"]
    return [tensor for name, tensor in state.items() if name.endswith("weight")]


def test_the_template_knows_nothing_of_inq() -> None:
    files = [p for p in APP.rglob("*") if p.suffix in (".py", ".yaml")]
    assert len(files) > 10
    assert not [p for p in files if "inq" in p.read_text().lower()]


@pytest.mark.slow
def test_a_template_trains_as_ever_without_the_callback(tmp_path: Path) -> None:
    template("trainer.max_epochs=1", cwd=tmp_path)
    assert all(len(w.unique()) > 100 for w in weights(tmp_path))


def test_two_overrides_quantize_what_a_template_trains(tmp_path: Path) -> None:
    template("callbacks=[default,inq]", "inq.bits=4", "trainer.max_epochs=6", cwd=tmp_path)
    for w in weights(tmp_path):
        levels = PowerOfTwoGrid(int(w.abs().max().log2()), 4, family="full").levels
        assert set(w.double().unique().tolist()) <= set(levels.tolist())


def test_a_template_goes_on_from_its_trained_network_and_keeps_its_accuracy(tmp_path: Path) -> None:
    readme = (APP / "README.md").read_text()
    trained, quantized = re.findall(r"^python src/train.py (.*run\.dir=(?:trained|quantized).*)$", readme, re.MULTILINE)
    accuracies = []
    for line in (trained, quantized):
        printed = run_program(APP / "src" / "train.py", *shlex.split(line, comments=True), cwd=tmp_path)
        accuracies += re.findall(r"test/acc\W+(0\.\d+)", printed)
    before, after = map(float, accuracies)
    assert before > 0.92
    assert after > before - 0.01
    assert all(len(w.abs().unique()) <= 8 for w in weights(tmp_path / "quantized"))


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(APP / "configs"), version_base="1.3"):
        return compose("train", ["callbacks=[default,inq]", *overrides])


def test_schedules_are_chosen_and_changed_in_a_template() -> None:
    assert composed("inq/schedule=resnet18").inq.schedule.preset == "resnet18"
    changed = composed("inq/schedule=resnet18", "inq.schedule.portions=[0.25,1.0]")
    assert changed.inq.schedule.portions == [0.25, 1.0]
    assert changed.callbacks.inq == changed.inq


def test_a_wrong_type_is_refused_by_its_key() -> None:
    with pytest.raises(ConfigCompositionException, match=r"inq\.bits"):
        composed("inq.bits=many")


BARE = """
import sys, hydra
from hydra import compose, initialize
from hydra.core.global_hydra import GlobalHydra
with initialize(config_path=None, version_base=None):
    loader = GlobalHydra.instance().config_loader()
    print({group: loader.get_group_options(group) for group in loader.list_groups("")})
    print(loader.get_group_options("inq/schedule"))
    compose(overrides=[])
    print("torch" in sys.modules, "inq_lightning.core" in sys.modules)
    print(compose(overrides=["+inq=default", "inq.bits=3"]).inq.bits)
    print(compose(overrides=["+callbacks=[inq]", "inq.bits=2"]).callbacks.inq.bits)
"""


def test_any_application_sees_our_groups_and_only_those_and_does_not_import_torch(tmp_path: Path) -> None:
    groups, schedules, imported, *bits = run("-c", BARE, cwd=tmp_path).splitlines()
    seen = eval(groups)
    assert seen["inq"] == ["default"]
    assert seen["callbacks"] == ["inq"]
    assert not seen.keys() & {"model", "data", "trainer", "logger", "pretrain", "experiment"}
    assert set(eval(schedules)) == {"default", *PRESETS}
    assert imported == "False False"
    assert bits == ["3", "2"]


@pytest.mark.parametrize("group", ["inq", "callbacks"])
def test_an_applications_own_files_go_before_ours(group: str, tmp_path: Path) -> None:
    (tmp_path / group).mkdir()
    name = {"inq": "default", "callbacks": "inq"}[group]
    (tmp_path / group / f"{name}.yaml").write_text("mine: 1\n")
    code = (
        "from hydra import compose, initialize_config_dir\n"
        f"with initialize_config_dir({str(tmp_path)!r}, version_base='1.3'):\n"
        f"    print(compose(overrides=['+{group}={name}']))"
    )
    assert f"{{'{group}': {{'mine': 1}}}}" in run("-c", code, cwd=tmp_path)


def test_the_package_registers_nothing_that_another_application_may_call_its_own() -> None:
    registered = (
        "from hydra.core.config_store import ConfigStore; import inq_lightning.recipes.config; "
        "store = ConfigStore.instance(); print(store.list(''), store.list('inq'), store.list('inq/schedule'))"
    )
    listed = run("-c", registered, cwd=ROOT)
    assert "'inq'" in listed
    assert "base.yaml" in listed
    assert not [name for name in ("model", "data", "trainer", "pretrain", "base_train") if name in listed]
