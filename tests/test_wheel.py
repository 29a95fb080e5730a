from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytest.importorskip("build")
pytest.importorskip("hatchling")


def execute(cwd: Path, *command: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Wheels of the checkout: built from it, and from the source distribution built from it."""
    folder = tmp_path_factory.mktemp("wheels")
    source = folder / "source"
    shutil.copytree(ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(".*", "outputs", "multirun"))
    built = {}
    for name, options in (("checkout", ["--wheel"]), ("sdist", [])):
        out = folder / name
        execute(folder, "-m", "build", *options, "--no-isolation", "--outdir", str(out), str(source))
        (built[name],) = out.glob("*.whl")
    return built


@pytest.mark.parametrize("origin", ["checkout", "sdist"])
def test_the_wheel_holds_the_package_its_configs_and_its_type_marker(wheels: dict[str, Path], origin: str) -> None:
    with zipfile.ZipFile(wheels[origin]) as archive:
        names = archive.namelist()
    expected = {
        path.relative_to(ROOT).as_posix()
        for package in ("inq_lightning", "hydra_plugins")
        for pattern in ("*.py", "*.yaml", "py.typed")
        for path in (ROOT / package).rglob(pattern)
    }
    assert {"inq_lightning/conf/train.yaml", "inq_lightning/py.typed"} <= expected
    assert "hydra_plugins/inq_lightning/conf/callbacks/inq.yaml" in expected
    assert sorted(name for name in names if ".dist-info/" not in name) == sorted(expected)


def test_the_wheel_installs_the_console_scripts(wheels: dict[str, Path]) -> None:
    with zipfile.ZipFile(wheels["checkout"]) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        scripts = configparser.ConfigParser()
        scripts.read_string(archive.read(name).decode())
    names = ("train", "plan", "export", "inspect")
    assert dict(scripts["console_scripts"]) == {f"inq-{name}": f"inq_lightning.cli.{name}:main" for name in names}


def test_the_installed_application_finds_its_configs(wheels: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("pip")
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    execute(tmp_path, *pip, str(wheels["sdist"]))
    find = "from importlib.util import find_spec; print(find_spec('inq_lightning').origin)"
    where = execute(elsewhere, "-c", find, PYTHONPATH=str(target))
    assert Path(where.strip()).is_relative_to(target)
    command = ["-m", "inq_lightning.cli.train", "--cfg", "job", "inq/schedule=2bit", "inq.bits=2"]
    config = execute(elsewhere, *command, PYTHONPATH=str(target))
    assert "preset: 2bit" in config
    assert "_target_: inq_lightning.classifier.Classifier" in config
