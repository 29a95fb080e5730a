from __future__ import annotations

import io
import json
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader

from inq_lightning import INQCallback, PowerOfTwoGrid
from inq_lightning.core.coverage import Coverage, LeftOut
from inq_lightning.core.layer import Layer
from inq_lightning.report.run import Report
from inq_lightning.report.tables import report_table

REPORT = Report(
    before={"test/loss": 0.5, "test/acc": 0.75},
    after={"test/loss": 0.25, "test/acc": 0.875},
    quantized_fraction=1.0,
    bits=[3, 5],
    levels_used=6,
    levels_allowed=17,
    bytes_before=2048,
    bytes_after=1024,
    bits_per_weight=16.0,
    seconds=2.5,
)


class Tiny(LightningModule):
    """Weights on their grids from the start, never moved by its learning rate of zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.second = nn.Linear(3, 2)
        self.scale = nn.Parameter(torch.ones(1, dtype=torch.float64), requires_grad=False)
        with torch.no_grad():
            self.first.weight.copy_(
                torch.tensor([[1.0, 1.0, 0.5, 0.5], [0.25, 0.125, -1.0, -1.0], [0.0, 0.0, 0.0, 0.0]])
            )
            self.second.weight.copy_(torch.tensor([[1.0, -1.0, 0.5], [-0.5, 0.0, 1.0]]))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.second(self.first(batch)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def quantized(tmp_path: Path) -> tuple[Tiny, list[Layer]]:
    module = Tiny()
    callback = INQCallback(schedule={0: 1.0}, layer_bits={"second": 3})
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, DataLoader(torch.ones(4, 4), batch_size=4))
    return module, callback.layers


def rows(report: Report) -> list[str]:
    """First cells of the printed table's rows."""
    console = Console(file=io.StringIO(), width=200)
    console.print(report_table(report))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return [line.split("│")[1].strip() for line in lines if line.startswith("│")]


def test_the_numbers_are_those_computed_by_hand(tmp_path: Path) -> None:
    module, layers = quantized(tmp_path)
    report = Report.of(module, layers, {"acc": 0.5}, {"acc": 0.25}, 3.0)
    # 12 weights at 5 bits and 6 at 3; biases 3 and 2 at 32 bits; one float64.
    bits = 12 * 5 + 6 * 3 + 5 * 32 + 64
    assert report == Report(
        before={"acc": 0.5},
        after={"acc": 0.25},
        quantized_fraction=1.0,
        bits=[3, 5],
        levels_used=6,  # 1, 0.5, 0.25, 0.125, -1, 0
        levels_allowed=17,
        bytes_before=23 * 4 + 8,
        bytes_after=38,  # 302 bits
        bits_per_weight=bits / 24,
        seconds=3.0,
    )


def test_as_many_levels_are_allowed_as_the_grid_has(tmp_path: Path) -> None:
    module, layers = quantized(tmp_path)
    dense = PowerOfTwoGrid(0, 3, family="dense")
    with torch.no_grad():
        module.first.weight.copy_(dense.levels.repeat(2)[:12].view(3, 4))
    layers[0] = replace(layers[0], grid=dense, bits=3)
    report = Report.of(module, layers, {}, {}, 3.0)
    assert (report.levels_used, report.levels_allowed) == (8, 8)


def test_the_metrics_are_copies(tmp_path: Path) -> None:
    before = {"acc": 0.5}
    report = Report.of(*quantized(tmp_path), before, before, 3.0)
    before["acc"] = 0.0
    assert report.before == report.after == {"acc": 0.5}


def test_the_file_holds_every_field(tmp_path: Path) -> None:
    REPORT.write(tmp_path / "report.json")
    assert Report(**json.loads((tmp_path / "report.json").read_text())) == REPORT
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_metrics_without_a_finite_value_are_null(tmp_path: Path) -> None:
    metrics = {"nan": float("nan"), "inf": float("inf"), "acc": 0.5}
    Report.of(*quantized(tmp_path), metrics, metrics, 3.0).write(tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["before"] == report["after"] == {"nan": None, "inf": None, "acc": 0.5}


def test_writing_replaces_an_older_report(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("old")
    REPORT.write(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["bits"] == [3, 5]


def test_a_folder_that_does_not_exist_is_an_error_and_stays_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        REPORT.write(tmp_path / "none" / "report.json")
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_halfway_leaves_the_older_report(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))  # as on a full disk: 16 bytes go, the rest does not
    try:
        with pytest.raises(OSError, match="too large"):
            REPORT.write(tmp_path / "report.json")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "report.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_the_table_shows_every_number() -> None:
    console = Console(file=io.StringIO(), width=200)
    console.print(report_table(REPORT))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for cell in ("0.5000", "0.2500", "0.7500", "0.8750", "3, 5", "6 of 17", "2.0 KiB", "1.0 KiB", "16.00", "2.5 s"):
        assert cell in text


def test_the_table_keeps_the_metrics_order() -> None:
    before = {f"test/{name}": 0.0 for name in ("loss", "acc", "zeta", "alpha", "top5", "f1", "auc", "mean")}
    report = Report(before, {"test/new": 1.0, **before}, 1.0, [5], 1, 17, 1, 1, 5.0, 1.0)
    assert rows(report) == [
        *before,
        "test/new",
        "quantized fraction",
        "bits of a quantized weight",
        "levels in use",
        "size of all parameters",
        "bits a parameter",
        "time",
    ]


def test_the_table_takes_metrics_names_as_they_are() -> None:
    report = Report({"acc[top5]": 0.5}, {"acc[top5]": 0.5}, 1.0, [5], 1, 17, 1, 1, 5.0, 1.0)
    assert rows(report)[0] == "acc[top5]"


def test_the_report_tells_how_much_of_the_network_is_quantized_and_what_is_not(tmp_path: Path) -> None:
    coverage = Coverage.of(18, [LeftOut("table.weight", (3, 2), "embedding", "Embedding")])
    report = Report.of(*quantized(tmp_path), {}, {}, 3.0, coverage)
    console = Console(file=io.StringIO(), width=200)
    console.print(report_table(report))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "18 of 24 (75.0%)" in shown
    assert "6 of embeddings: table.weight; embeddings=True" in shown
    assert report.as_dict()["coverage"]["left_out"][0]["reason"] == "embedding"
