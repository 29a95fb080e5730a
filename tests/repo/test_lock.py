"""requirements-dev.txt: one version, with its hashes, of everything that the project is made with, but torch."""

from __future__ import annotations

import re
import sys

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

PIN = re.compile(r"^(\S+==[^\\\n]+) \\\n(?:    --hash=sha256:\w{64} \\\n)*    --hash=sha256:\w{64}$", re.MULTILINE)


def project() -> dict[str, list[str]]:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {"": table["dependencies"], **table["optional-dependencies"]}


def needed(extra: str, python: str) -> dict[str, Requirement]:
    """What an extra asks for, those that it consists of included."""
    found = {}
    for requirement in map(Requirement, project()[extra]):
        if requirement.name == "inq-lightning":
            for other in requirement.extras:
                found |= needed(other, python)
        elif requirement.marker is None or requirement.marker.evaluate({"python_version": python}):
            found[canonicalize_name(requirement.name)] = requirement
    return found


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13", "3.14"])
def test_everything_that_the_project_asks_for_is_pinned_within_its_range(python: str) -> None:
    at = {"python_version": python, "python_full_version": f"{python}.9"}
    pins = [Requirement(pin) for pin in PIN.findall((ROOT / "requirements-dev.txt").read_text())]
    pins = [pin for pin in pins if pin.marker is None or pin.marker.evaluate(at)]
    versions = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    assert len(versions) == len(pins) > 100
    for name, requirement in (needed("", python) | needed("dev", python)).items():
        if name != "torch":
            assert requirement.specifier.contains(versions[name]), f"{requirement}, but {versions[name]}: make lock"


def test_every_pin_has_hashes_and_what_comes_with_torch_has_no_pin() -> None:
    """A hash would fit one build of torch, and packages for GPUs are of no use beside one for CPUs."""
    lines = re.findall(r"^[\w.-]+==", (ROOT / "requirements-dev.txt").read_text(), re.MULTILINE)
    assert len(lines) == len(PIN.findall((ROOT / "requirements-dev.txt").read_text()))
    assert not [line for line in lines if re.match(r"torch==|triton|cuda|nvidia", line)]
    assert re.findall(r"^[^#\n].*", (ROOT / "constraints.txt").read_text(), re.MULTILINE) == ["torch==2.13.0"]
