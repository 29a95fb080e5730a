from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import zlib
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient
from processes import run_program
from support import ROOT

import inq_lightning

DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; `strict` makes an error of every broken link, anchor and cross-reference."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_builds_strictly_and_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = [page.read_text() for page in site.rglob("*.html")]
    assert len(pages) > 15
    for page in pages:
        assert re.findall(r"<(?:script|img|iframe)[^>]* src=\"?(?:https?:)?//", page) == []
        assert re.findall(r"<link[^>]* rel=\"?(?:stylesheet|preconnect|preload)[^>]*//", page) == []


def test_no_docstring_of_the_reference_shows_its_markup(site: Path) -> None:
    for page in (site / "reference").rglob("*.html"):
        assert not re.search(r":(?:class|func|meth|attr|mod):", page.read_text()), page


def test_the_reference_has_every_public_name(site: Path) -> None:
    inventory = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    documented = {line.split()[0].rpartition(".")[2] for line in zlib.decompress(inventory).decode().splitlines()}
    assert set(inq_lightning.__all__) <= documented


def test_the_notebook_is_the_tutorial() -> None:
    notebook = nbformat.read(DOCS / "tutorial.ipynb", as_version=4)
    page = jupytext.read(DOCS / "tutorial.md")
    advice = "run: jupytext --to ipynb --set-kernel python3 docs/tutorial.md"
    assert [(c.cell_type, c.source) for c in notebook.cells] == [(c.cell_type, c.source) for c in page.cells], advice


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a reader of the tutorial works: this environment's commands on the path, the package importable."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "network", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_snippet_of_the_tutorial_runs(folder: Path) -> None:
    names: dict[str, object] = {}
    for cell in jupytext.read(DOCS / "tutorial.md").cells:
        if cell.cell_type == "code" and cell.source.startswith("%%bash"):
            code = cell.source.removeprefix("%%bash").strip()
            if "\n" in code:
                done = subprocess.run(["bash", "-e"], input=code, capture_output=True, text=True)
                assert done.returncode == 0, done.stderr
            else:
                run_program(*shlex.split(code), cwd=folder)
        elif cell.cell_type == "code":
            exec(compile(re.sub(r"max_epochs=\d+", "max_epochs=4", cell.source), "tutorial.md", "exec"), names)


def test_what_a_run_says_of_a_network_is_shown_as_it_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    page = (DOCS / "how-to" / "select.md").read_text()
    shown = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)```", page, re.DOTALL)
    assert shown
    exec(compile(shown[1], "select.md", "exec"), {"__name__": "snippet"})
    assert capsys.readouterr().out == shown[2]


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(folder: Path) -> None:
    notebook = nbformat.read(DOCS / "tutorial.ipynb", as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    accuracies = re.search(r"accuracy: (0\.\d{4}) before, (0\.\d{4}) after", printed)
    assert accuracies
    assert float(accuracies[2]) > float(accuracies[1]) - 0.01
    assert f"\n{accuracies[2]}\n" in printed  # what classify.py says, in a process of its own
    assert "quantized: 100%" in printed


@pytest.mark.slow
def test_the_figures_are_made_by_their_script(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "figures.py"), str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    made = {path.name for path in tmp_path.iterdir() if path.suffix in (".svg", ".gif")}
    page = (DOCS / "explanation.md").read_text() + (DOCS / "index.md").read_text()
    assert made == set(re.findall(r"images/([\w-]+\.(?:svg|gif))", page))
    assert (tmp_path / "onto-the-grid.gif").stat().st_size < 1_000_000
    rows = [line for line in done.stdout.splitlines() if " of " in line]
    assert len(rows) == 4
    for row in rows:
        assert row.endswith("| 0 |")  # with the values restored, none has moved
        assert row.split("|")[1] in page
