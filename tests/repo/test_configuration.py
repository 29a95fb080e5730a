from __future__ import annotations

import dataclasses
import importlib.util
import sys
from types import ModuleType

import pytest
from omegaconf import OmegaConf
from support import ROOT

from inq_lightning.recipes import classifier, config, data

SCRIPT = ROOT / "tools" / "configuration.py"
PAGE = ROOT / "docs" / "reference" / "configuration.md"
CONFIGS = {
    config.TrainConfig: "",
    config.INQConfig: "inq.",
    config.ScheduleConfig: "inq.schedule.",
    classifier.ClassifierConfig: "model.",
    data.DigitsConfig: "data.",
    data.NpzConfig: "data.",
    data.TorchvisionConfig: "data.",
    config.TrainerConfig: "trainer.",
    config.PretrainConfig: "pretrain.",
}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("configuration", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["configuration"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows() -> dict[str, list[list[str]]]:
    """Cells of the committed page's rows, by key; a key of several data modules or networks has several."""
    found: dict[str, list[list[str]]] = {}
    for line in PAGE.read_text().splitlines():
        if line.startswith("| `"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            found.setdefault(cells[0].strip("` "), []).append(cells)
    return found


def test_the_page_is_what_the_script_writes(script: ModuleType) -> None:
    assert script.page() == PAGE.read_text(), "stale: run python tools/configuration.py"


@pytest.mark.parametrize("structured", CONFIGS, ids=lambda c: c.__name__)
def test_every_key_of_a_structured_config_is_on_the_page(structured: type, rows: dict[str, list[list[str]]]) -> None:
    groups = {"model", "data", "inq", "trainer", "pretrain", "logger", "callbacks", "inq.schedule", "model.net"}
    names = {CONFIGS[structured] + field.name for field in dataclasses.fields(structured) if field.name[0] != "_"}
    assert names - groups <= rows.keys()


def test_every_row_has_a_type_a_default_and_a_meaning(rows: dict[str, list[list[str]]]) -> None:
    for key, found in rows.items():
        for cells in found:
            assert len(cells) == 5, key
            assert all(cells[column] for column in (1, 2, 4)), key


def test_the_cells_are_those_of_config_and_docstring(rows: dict[str, list[list[str]]]) -> None:
    meaning = 'What becomes of weights below the smallest level: `"nearest"` or `"truncate"`, see `PowerOfTwoGrid`.'
    assert rows["inq.underflow"] == [["`inq.underflow`", "str", "`nearest`", "`nearest`, `truncate`", meaning]]
    assert rows["inq.bits"][0][1:4] == ["int", "`5`", "2 to 8"]
    assert rows["model.lr"][0][1:4] == ["float", "`0.01`; small_cnn: `0.05`", ""]
    assert rows["model.net.depth"][0][2] == "`20`; resnet32: `32`; resnet44: `44`; resnet56: `56`"
    assert len(rows["data.seed"]) == 3


def test_a_key_without_a_meaning_is_an_error(script: ModuleType) -> None:
    @dataclasses.dataclass
    class Half:
        """A config.

        Attributes:
            told: What it is.
        """

        told: int = 1
        untold: int = 2

    node = OmegaConf.structured(Half)
    with pytest.raises(ValueError, match=r"half\.untold has no meaning"):
        script.keys("half.", {"default": node}, set())
    (row,) = script.keys("half.", {"default": node}, {"untold"})
    assert row == ("half.told", "int", "`1`", "", "What it is.")
