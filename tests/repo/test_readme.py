from __future__ import annotations

import ast
import re
import shlex
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from processes import run_program
from support import ROOT, TESTS, TinyModule

from inq_lightning.core.schedule import PRESETS
from inq_lightning.recipes.config import INQConfig, ScheduleConfig, register_training

register_training()

README = (ROOT / "README.md").read_text()
PAGES = [path for path in sorted((ROOT / "docs").rglob("*.md")) if path.name != "tutorial.md"]  # a notebook by itself
DOCUMENTS = [path for path in [ROOT / "README.md", *PAGES] if "```" in path.read_text()]


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", document.read_text(), re.DOTALL)


PYTHON = [pytest.param(d, id=str(d.relative_to(ROOT))) for d in DOCUMENTS if blocks(d, "python")]
CONSOLE = [
    pytest.param(line, id=f"{d.relative_to(ROOT)}-{i}")
    for d in DOCUMENTS
    for i, line in enumerate(x for b in blocks(d, "console") for x in b.splitlines() if x.startswith("inq-train "))
]


@pytest.mark.parametrize("document", PYTHON)
def test_the_python_snippets_of_every_document_run_in_their_order(
    document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    snippets = blocks(document, "python")
    if any("from transformers" in code for code in snippets):
        pytest.importorskip("transformers", reason="needs the extra huggingface")
    names = {"__name__": "snippet", "model": TinyModule(), "data": None, "checkpoint": tmp_path / "last.ckpt"}
    if any("checkpoint" in code for code in snippets):
        from support import trainer

        from inq_lightning import INQCallback

        run = trainer(INQCallback(), max_epochs=16)
        run.fit(TinyModule())
        run.save_checkpoint(names["checkpoint"], weights_only=False)
    for i, code in enumerate(snippets):
        exec(compile(code, f"{document.name}, snippet {i}", "exec"), names)


@pytest.mark.parametrize("line", CONSOLE)
def test_every_command_of_the_documents_composes(line: str) -> None:
    arguments = shlex.split(line.split(" | ")[0], comments=True)[1:]
    arguments = ["output=json" if argument == "--json" else argument for argument in arguments]
    if "-m" in arguments:  # the first of the values that a sweep goes through
        arguments = [a if "[" in a else a.split(",")[0] for a in arguments if a != "-m"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("train", arguments)
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key == "inq.bits":
            assert str(config.inq.bits) == value


TOOLS = [
    pytest.param(line, id=f"{d.relative_to(ROOT)}-{i}")
    for d in DOCUMENTS
    for i, line in enumerate(x for b in blocks(d, "bash") for x in b.splitlines() if re.match("inq-(?!train)", x))
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the documents speak of: of a short run of inq-train, with its configuration."""
    folder = tmp_path_factory.mktemp("trained")
    short = ["pretrain.max_epochs=1", "inq.schedule.portions=[1.0]", "inq.schedule.epochs_per_phase=1", "logger=none"]
    run_program("inq-train", *short, f"hydra.run.dir={folder}", cwd=folder)
    shutil.copy(folder / "quantize" / "last.ckpt", folder / "quantized.ckpt")
    shutil.copy(folder / "pretrain" / "last.ckpt", folder / "trained.ckpt")
    run_program("inq-export", "quantized.ckpt", "net.safetensors", cwd=folder)
    return folder


@pytest.mark.parametrize("line", TOOLS)
def test_every_other_command_of_the_documents_runs(line: str, trained: Path) -> None:
    program, *arguments = shlex.split(line, comments=True)
    if "onnx" in arguments:
        pytest.importorskip("onnx")
    run_program(program, *arguments, cwd=trained)


def test_the_readme_lists_every_option_with_its_default() -> None:
    for option in fields(INQConfig):
        if option.name.startswith("_") or option.name == "schedule":
            continue
        row = re.search(rf"^\| `{option.name}` \| (.*?) \|", README, re.MULTILINE)
        assert row, option.name
        if isinstance(option.default, (bool, int, str)):
            assert row[1] == f"`{str(option.default).lower()}`"
    for option in fields(ScheduleConfig):
        assert option.name in ("_target_", "bits") or re.search(rf"`(inq\.schedule\.)?{option.name}`", README)
    for preset in PRESETS:
        assert f"`{preset}`" in README


OUTSIDE = [*ROOT.glob("*.md"), *(ROOT / "examples").rglob("*.md")]  # of the site, whose links its strict build checks


@pytest.mark.parametrize("document", OUTSIDE, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file(document: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text())
    missing = [target for target in targets if not (document.parent / target).exists()]
    assert not missing


def test_the_readme_promises_two_commands_that_the_makefile_has() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test"):
        assert f"\nmake {target} " in README
        assert f"\n{target}:" in makefile
    assert "make test" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("trainer.py", "100% of the weights are powers of two or zero"),
        ("plain_pytorch.py", "100.0% quantized"),
        ("fabric.py", "100.0% quantized"),
        ("huggingface.py", "100.0% of 14 matrices quantized"),
        ("hydra_app/app.py", "bits 4, quantized 100%"),
    ],
)
def test_the_examples_run(script: str, expected: str, tmp_path: Path) -> None:
    if script == "huggingface.py":
        pytest.importorskip("transformers", reason="needs the extra huggingface")
    overrides = {"hydra_app/app.py": ["inq.bits=4", "inq/schedule=alexnet", "inq.schedule.epochs_per_phase=1"]}
    printed = run_program(ROOT / "examples" / script, *overrides.get(script, []), cwd=tmp_path)
    assert expected in printed
    if accuracies := re.search(r"^accuracy (0\.\d+) before, (0\.\d+) after", printed, re.MULTILINE):
        assert float(accuracies[2]) > float(accuracies[1]) - 0.01


def test_the_first_table_is_the_same_everywhere_and_has_the_figures_of_the_measurements() -> None:
    pages = [(ROOT / name).read_text() for name in ("README.md", "docs/index.md", "docs/decide.md")]
    (table,) = {re.search(r"\| bits \| file.*?\n\n", page, re.DOTALL)[0] for page in pages}  # type: ignore[index]
    accuracy, sizes = ((ROOT / "docs" / name).read_text() for name in ("results.md", "benchmarks.md"))
    for bits in (5, 4, 3, 2):
        row = re.search(rf"^\| {bits} \| ([\d.]+) MB \| ([\d.]+)% \((.*?)\)", table, re.MULTILINE)
        assert row
        assert re.search(rf"^\| ResNet-18 \| {bits} \| 46\.81 \| [\d.]+ \| {row[1]} \|", sizes, re.MULTILINE)
        assert re.search(rf"^\| `{bits}bit` .*\| {row[2]} ± [\d.]+ \| {re.escape(row[3])} \|", accuracy, re.MULTILINE)


def test_there_is_one_piece_of_advice_on_the_learning_rate() -> None:
    advice = "a tenth of the highest learning rate of the original training"
    for page in ("README.md", "docs/how-to/learning-rate.md", "docs/how-to/schedule.md"):
        assert advice in " ".join((ROOT / page).read_text().split()), page


def test_every_line_of_the_compatibility_table_names_a_test() -> None:
    lines = [line for line in (ROOT / "docs" / "compatibility.md").read_text().splitlines() if line.startswith("| ")]
    rows = [line for line in lines if not line.startswith("| feature |")]
    assert len(rows) > 40
    for row in rows:
        assert re.search(r"`test_\w+` \|$", row), row


def test_every_test_that_a_page_names_is_there() -> None:
    modules = [ast.parse(path.read_text()) for path in TESTS.rglob("test_*.py")]
    tests = {node.name for module in modules for node in module.body if isinstance(node, ast.FunctionDef)}
    named = {path.name: set(re.findall(r"`(test_\w+)`", path.read_text())) for path in PAGES}
    assert sum(map(len, named.values())) > 40
    assert {page: missing for page, names in named.items() if (missing := names - tests)} == {}
