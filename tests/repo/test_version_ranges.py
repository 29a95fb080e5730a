"""The package in clean environments at both ends of the declared ranges; each has its own torch of several 100 MB."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, TESTS

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

# What the core promises; that of test_packages.py runs in the unified package as well.
CORE_TESTS = (
    "frontends/lightning/test_callback.py",
    "frontends/lightning/test_packages.py",
    "core/test_schedule.py",
    "recipes/test_config.py",
)
EXPORT_TESTS = (
    "formats/test_packed.py",
    "formats/test_codec.py",
    "formats/test_accelerator.py",
    "formats/test_onnx.py",
    "formats/test_version1.py",
    "runtime/test_torchao.py",
)
HELPERS = ("conftest.py", "support.py", "oracle.py", "accelerators.py")
TOOLS = ("pytest", "hypothesis", "jsonargparse[signatures]")  # of the tests; their versions are not what is tested


def declared(extra: str | None = None) -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project["optional-dependencies"][extra] if extra else project["dependencies"]


def versions(end: str) -> list[str]:
    """What to install; torch is the one of constraints.txt at both ends, since not every index has its older builds."""
    (torch,) = re.findall(r"^torch==\S+", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    others = [r for r in declared() if not r.startswith("torch>")]
    (lightning,) = (r.replace("pytorch-", "") for r in others if r.startswith("pytorch-lightning"))
    if end == "lowest":
        return [torch, *map(lowest, [*others, lightning])]
    return [torch, *others, lightning]


def lowest(requirement: str) -> str:
    """The requirement of the lowest version; what comes after a semicolon is a condition."""
    return requirement.replace(">=", "==", 1)


def test_the_lowest_versions_are_those_declared() -> None:
    lowest, newest = versions("lowest"), versions("newest")
    for requirement in declared():
        name, _, version = requirement.partition(">=")
        assert version, f"{requirement} declares no lowest version"
        if name != "torch":
            assert f"{name}=={version}" in lowest
            assert requirement in newest


def run(*command: str | Path, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def environment(end: str, folder: Path, *requirements: str) -> Path:
    """Where the programs of a new environment are that has what is required, and the tests' tools."""
    run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    programs = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
    run(programs / "python", "-m", "pip", "install", "--quiet", *requirements, *TOOLS, cwd=folder)
    installed = json.loads(run(programs / "python", "-m", "pip", "list", "--format", "json", cwd=folder))
    print(end, {p["name"]: p["version"] for p in installed})
    return programs


def copies(names: tuple[str, ...], folder: Path) -> list[str]:
    """Copies of tests, so that they import what is installed."""
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.copytree(ROOT / "examples", folder / "examples")
    for name in names + HELPERS:
        (folder / "tests" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(TESTS / name, folder / "tests" / name)
    return [f"tests/{name}" for name in names]


@pytest.mark.slow
@pytest.mark.parametrize("end", ["lowest", "newest"])
def test_the_core_and_the_application_work_at_both_ends_of_the_declared_ranges(end: str, tmp_path: Path) -> None:
    programs = environment(end, tmp_path, f"{ROOT}[train]", *versions(end))
    print(run(programs / "python", "-m", "pytest", *copies(CORE_TESTS, tmp_path), cwd=tmp_path))

    short = ["pretrain.max_epochs=1", "inq.schedule.portions=[0.5,1.0]", "inq.schedule.epochs_per_phase=1"]
    run(programs / "inq-train", *short, "inq.bits=4", f"hydra.run.dir={tmp_path / 'run'}", cwd=tmp_path)
    assert json.loads((tmp_path / "run" / "report.json").read_text())["quantized_fraction"] == 1
    shutil.rmtree(tmp_path / "venv")


@pytest.mark.slow
@pytest.mark.parametrize("end", ["lowest", "newest"])
def test_all_formats_are_exported_at_both_ends_of_the_declared_ranges(end: str, tmp_path: Path) -> None:
    export = [lowest(r) if end == "lowest" else r for r in declared("export")]
    programs = environment(end, tmp_path, f"{ROOT}[train]", *versions(end), *export)
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks")
    print(run(programs / "python", "-m", "pytest", *copies(EXPORT_TESTS, tmp_path), cwd=tmp_path))
    shutil.rmtree(tmp_path / "venv")
