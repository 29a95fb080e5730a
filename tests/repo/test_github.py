"""What runs on GitHub and before commits: it parses, and names only what there is."""

from __future__ import annotations

import re
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

GITHUB = ROOT / ".github"
WORKFLOW = yaml.safe_load((GITHUB / "workflows" / "ci.yml").read_text())
JOBS: dict[str, dict[str, Any]] = WORKFLOW["jobs"]
TARGETS = set(re.findall(r"^([\w-]+):(?! export)", (ROOT / "Makefile").read_text(), re.MULTILINE))
DEVELOPMENT = ("mkdocs", "jupytext", "pytest", "pip", "test")  # programs; `test` is the shell's


def commands(text: str) -> list[str]:
    return [re.split(r"\s+# ", line)[0].strip() for line in text.splitlines() if line.strip()]


def check(command: str) -> None:
    """A command calls a target of the Makefile, a program or module of the set-up, and files that exist."""
    program, *arguments = shlex.split(command)
    if program == "make":
        assert set(arguments) <= TARGETS, command
        return
    name = Path(program).name
    if name == "python" and arguments[0] == "-m":
        assert find_spec(arguments[1]), command
    elif name != "python":
        assert name in DEVELOPMENT, command
    for argument in arguments:
        if re.search(r"^[\w/-]+\.(py|txt|md)$", argument):
            assert (ROOT / argument).is_file(), command


@pytest.mark.parametrize("job", JOBS)
def test_every_job_runs_what_there_is(job: str) -> None:
    assert set(JOBS[job].get("needs", [])) <= JOBS.keys()
    steps = JOBS[job]["steps"]
    assert all(("uses" in step) != ("run" in step) for step in steps)
    for step in steps:
        for command in commands(step.get("run", "")):
            check(command)


def test_the_tests_run_on_every_system_with_the_oldest_and_the_newest_python() -> None:
    matrix = JOBS["test"]["strategy"]["matrix"]
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    versions = [v.rpartition(" ")[2] for v in classifiers if re.search(r"Python :: 3\.\d+$", v)]
    assert {versions[0], versions[-1]} <= set(matrix["python"]) <= set(versions)
    assert set(matrix["os"]) == {"ubuntu", "macos", "windows"}


def test_windows_installs_what_make_does() -> None:
    (windows,) = (s["run"] for s in JOBS["test"]["steps"] if s.get("if") == "runner.os == 'Windows'")
    recipe = re.findall(r"\$\(BIN\)/pip (install .*)", (ROOT / "Makefile").read_text())
    assert re.findall(r"pip (install .*)", windows) == [line.replace(" --quiet", "") for line in recipe]


def test_the_forms_ask_for_what_helps() -> None:
    forms = {path.stem: yaml.safe_load(path.read_text()) for path in (GITHUB / "ISSUE_TEMPLATE").iterdir()}
    assert forms.keys() == {"bug", "feature"}
    for form in forms.values():
        assert form.keys() >= {"name", "description", "body"}
        assert len({field["id"] for field in form["body"]}) == len(form["body"])
    assert "`inq-inspect --json FILE`" in str(forms["bug"])


def test_the_pull_requests_form_names_commands_that_contributors_read_of() -> None:
    form, guide = (GITHUB / "pull_request_template.md").read_text(), (ROOT / "CONTRIBUTING.md").read_text()
    (block,) = re.findall(r"```console\n(.*?)```", form, re.DOTALL)
    for command in commands(block):
        check(command)
        assert command in guide


def test_commits_are_checked_with_the_pinned_ruff() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    revisions = {repo["repo"].rpartition("/")[2]: repo["rev"] for repo in config["repos"]}
    (pinned,) = re.findall(r"^ruff==(\S+)", (ROOT / "requirements-dev.txt").read_text(), re.MULTILINE)
    assert revisions["ruff-pre-commit"] == f"v{pinned}"
    hooks = {hook["id"] for repo in config["repos"] for hook in repo["hooks"]}
    assert {"ruff-check", "ruff-format", "check-yaml", "check-toml", "codespell", "nbstripout"} <= hooks
