from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from processes import run_program
from support import ROOT

import inq_lightning

pytest.importorskip("build")
pytest.importorskip("hatchling")


def execute(cwd: Path, *command: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of the checkout: a wheel built from it, a source distribution, and a wheel built from that."""
    folder = tmp_path_factory.mktemp("wheels")
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "outputs", "multirun"))
    for name, options in (("checkout", ["--wheel"]), ("sdist", [])):
        execute(folder, "-m", "build", *options, "--no-isolation", "--outdir", str(folder / name), str(source))
    found = {"checkout": "checkout/*.whl", "sdist": "sdist/*.whl", "archive": "sdist/*.tar.gz"}
    return {name: next(folder.glob(pattern)) for name, pattern in found.items()}


def files(*suffixes: str) -> set[str]:
    """What of the package, its configs, and the plugin that Hydra looks for, has to be in every distribution."""
    folders = [ROOT / "inq_lightning", ROOT / "hydra_plugins", ROOT / "conf"]
    return {p.relative_to(ROOT).as_posix() for folder in folders for s in suffixes for p in folder.rglob(s)}


@pytest.mark.parametrize("origin", ["checkout", "sdist"])
def test_the_wheel_holds_the_package_its_configs_its_type_marker_and_the_hydra_plugin(
    built: dict[str, Path], origin: str
) -> None:
    with zipfile.ZipFile(built[origin]) as archive:
        names = archive.namelist()
    expected = {re.sub("^conf/", "inq_lightning/conf/", name) for name in files("*.py", "*.yaml", "py.typed")}
    expected |= files("integer/firmware/*")  # the kernels that export_c copies
    assert {
        "inq_lightning/integer/firmware/inq_kernels.h",
        "inq_lightning/conf/train.yaml",
        "inq_lightning/py.typed",
        "hydra_plugins/inq_lightning/__init__.py",
        "hydra_plugins/inq_lightning/conf/callbacks/inq.yaml",
    } <= expected
    assert "hydra_plugins/__init__.py" not in expected  # other packages share the folder
    assert sorted(name for name in names if ".dist-info/" not in name) == sorted(expected)


def test_the_source_distribution_holds_the_same_and_what_belongs_to_a_release(built: dict[str, Path]) -> None:
    with tarfile.open(built["archive"]) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers()}
    assert files("*.py", "*.yaml", "py.typed") <= names
    assert {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "LICENSE", "pyproject.toml"} <= names


def test_one_version_everywhere(built: dict[str, Path]) -> None:
    version = inq_lightning.__version__
    assert all(path.name.startswith(f"inq_lightning-{version}") for path in built.values())
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version} " in (ROOT / "CHANGELOG.md").read_text()


def test_the_wheel_installs_the_console_scripts(built: dict[str, Path]) -> None:
    with zipfile.ZipFile(built["checkout"]) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        scripts = configparser.ConfigParser()
        scripts.read_string(archive.read(name).decode())
    assert dict(scripts["console_scripts"]) == {
        **{f"inq-{name}": f"inq_lightning.recipes.apps:{name}" for name in ("train", "plan", "quantize")},
        **{f"inq-{name}": f"inq_lightning.cli.{name}:main" for name in ("export", "inspect")},
    }


COMPOSE = """
import sys
sys.path.insert(0, {installed!r})
from hydra import compose, initialize_config_dir, initialize_config_module
with initialize_config_dir({configs!r}, version_base="1.3"):
    print(compose("train", ["callbacks=[default,inq]", "inq.bits=4", "inq/schedule=2bit"]).callbacks.inq)
import inq_lightning.recipes.config
inq_lightning.recipes.config.register_training()
with initialize_config_module("inq_lightning.conf", version_base="1.3"):
    print(compose("train", ["inq/schedule=2bit", "inq.bits=2"]))
print(inq_lightning.__file__, sys.modules["hydra_plugins.inq_lightning"].__file__)
"""


def test_what_is_installed_finds_its_configs_outside_the_source_tree(built: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("pip")
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    execute(tmp_path, *pip, str(built["sdist"]))
    shutil.copytree(ROOT / "examples" / "template_app" / "configs", elsewhere / "configs")
    code = COMPOSE.format(installed=str(target), configs=str(elsewhere / "configs"))
    callback, application, places = run_program("-c", code, cwd=elsewhere).splitlines()
    assert all(Path(place).is_relative_to(target) for place in places.split())
    assert "'bits': 4" in callback
    assert "'preset': '2bit'" in callback
    assert "'_target_': 'inq_lightning.recipes.classifier.Classifier'" in application
    assert "'preset': '2bit'" in application


def test_an_editable_install_finds_the_configs_where_the_checkout_has_them(
    built: dict[str, Path], tmp_path: Path
) -> None:
    source = built["checkout"].parents[1] / "source"
    execute(source, "-c", f"from hatchling.build import build_editable; build_editable({str(tmp_path)!r})")
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as archive:
        (path,) = (name for name in archive.namelist() if ".dist-info/" not in name)
        assert path.endswith(".pth")
        added = archive.read(path).decode().strip()
    code = COMPOSE.format(installed=added, configs=str(ROOT / "examples" / "template_app" / "configs"))
    callback, application, places = run_program("-c", code, cwd=tmp_path).splitlines()
    assert all(Path(place).is_relative_to(source) for place in places.split())
    assert "'preset': '2bit'" in callback
    assert "'preset': '2bit'" in application
