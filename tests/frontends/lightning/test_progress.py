from __future__ import annotations

import io
import json
import os
import pty
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from processes import Program, write_script
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from support import SCHEDULE, TinyModule, trainer

from inq_lightning import INQCallback, Schedule
from inq_lightning.frontends.lightning.progress import INQProgressBar
from inq_lightning.recipes.command import choose_output


class Lines(Callback):
    """Notes the quantization's line after every batch: text, batches done, of how many."""

    def __init__(self, bar: INQProgressBar) -> None:
        self.bar = bar
        self.seen: list[tuple[str, float, float]] = []

    def on_train_batch_end(self, t: Trainer, *args: Any) -> None:
        tasks = [task for task in self.bar.progress.tasks if task.description.startswith("INQ")]  # type: ignore[union-attr]
        self.seen += [(task.description, task.completed, task.total) for task in tasks]  # type: ignore[misc]


def run(callback: INQCallback | None, ckpt: Path | None = None, **options: Any) -> tuple[Lines, str]:
    """A run on a wide terminal that is a string; the lines, and everything that was shown."""
    screen = io.StringIO()
    bar = INQProgressBar(console_kwargs={"file": screen, "force_terminal": True, "width": 200})
    lines = Lines(bar)
    callbacks = [*([callback] if callback else []), bar, lines, *options.pop("callbacks", [])]
    trainer(*callbacks, **({"enable_progress_bar": True} | options)).fit(TinyModule(), ckpt_path=ckpt)
    return lines, screen.getvalue()


def test_the_line_shows_phase_portion_and_the_batches_until_all_is_quantized() -> None:
    lines, screen = run(INQCallback(schedule=SCHEDULE))
    assert [text for text, _, _ in lines.seen[::4]] == [
        "INQ phase 1/4: 50.0% → 100%",
        "INQ phase 2/4: 75.0% → 100%",
        "INQ phase 3/4: 87.5% → 100%",
        "INQ phase 4/4: 100.0%",
    ]
    assert [(done, total) for _, done, total in lines.seen] == [(min(i, 12), 12) for i in range(1, 17)]
    assert "INQ phase 4/4: 100.0%" in screen
    assert "Epoch 3/3" in screen
    assert "quantized_fraction" not in screen  # it has the line


def test_the_version_of_a_logger_is_not_shown(tmp_path: Path) -> None:
    _, screen = run(INQCallback(schedule=SCHEDULE), logger=CSVLogger(tmp_path, version="quantize"))
    assert "Epoch 3/3" in screen
    assert "v_num" not in screen


def test_a_schedule_in_steps_counts_the_batches_that_they_take() -> None:
    schedule = Schedule([0.5, 1.0], [0, 6], "step")
    lines, _ = run(INQCallback(schedule=schedule), accumulate_grad_batches=2)
    assert [(done, total) for _, done, total in lines.seen[1:13:2]] == [(i, 12) for i in (2, 4, 6, 8, 10, 12)]
    assert lines.seen[11][0] == "INQ phase 1/2: 50.0% → 100%"
    assert lines.seen[12][0] == "INQ phase 2/2: 100.0%"


def test_a_resumed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    last = ModelCheckpoint(tmp_path, "last", every_n_train_steps=6, enable_version_counter=False)
    with pytest.raises(RuntimeError, match="interrupted"):
        run(INQCallback(schedule=SCHEDULE), callbacks=[last, _Interruption()], enable_checkpointing=True)
    lines, _ = run(INQCallback(schedule=SCHEDULE), ckpt=tmp_path / "last.ckpt")
    assert lines.seen[0] == ("INQ phase 2/4: 75.0% → 100%", 7, 12)
    assert lines.seen[-1] == ("INQ phase 4/4: 100.0%", 12, 12)


class _Interruption(Callback):
    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == 7:
            raise RuntimeError("interrupted")


def test_one_phase_is_complete_at_once() -> None:
    lines, _ = run(INQCallback(schedule={0: 1.0}), max_epochs=1)
    assert lines.seen[-1] == ("INQ phase 1/1: 100.0%", 1, 1)


def test_without_an_inqcallback_it_is_lightnings_bar() -> None:
    lines, screen = run(None, max_epochs=1)
    assert lines.seen == []
    assert "Epoch 0/0" in screen
    assert "INQ" not in screen


def test_a_bar_that_stays_and_one_that_is_off_work() -> None:
    for options in ({"leave": True}, {"refresh_rate": 0}):
        bar = INQProgressBar(console_kwargs={"file": io.StringIO()}, **options)
        callback = INQCallback(schedule=SCHEDULE)
        trainer(callback, bar, enable_progress_bar=True).fit(TinyModule())
        assert callback.quantized_fraction == 1.0


def test_the_weights_are_the_same_with_and_without() -> None:
    weights = []
    for bars in ([], [INQProgressBar(console_kwargs={"file": io.StringIO()})]):
        module = TinyModule()
        trainer(INQCallback(schedule=SCHEDULE), *bars, enable_progress_bar=bool(bars)).fit(module)
        weights.append(module.net[0].weight.detach())
    assert torch.equal(*weights)


# ---- inq-train -------------------------------------------------------------------------------------------------------

COMMAND = (
    "inq-train",
    *("pretrain.max_epochs=1", "inq.schedule.epochs_per_phase=1", "inq.schedule.portions=[0.5,1.0]"),
    *("trainer.accelerator=cpu", "trainer.limit_train_batches=3", "logger=none", "hydra.run.dir=run"),
)


def strict(line: str) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    fields: dict[str, Any] = json.loads(line, parse_constant=refuse)
    return fields


def test_away_from_a_terminal_standard_output_is_lines_of_json(tmp_path: Path) -> None:
    result = Program(*COMMAND, cwd=tmp_path).finish()
    assert result.returncode == 0, result.stderr
    *epochs, last = [strict(line) for line in result.stdout.splitlines()]
    assert [(e["event"], e["stage"], e["epoch"], e["phase"], e["quantized_fraction"]) for e in epochs] == [
        ("epoch", "pretrain", 0, 0, 0.0),
        ("epoch", "quantize", 0, 1, 0.5),
        ("epoch", "quantize", 1, 2, 1.0),
    ]
    assert all(e["metrics"].keys() >= {"train/loss", "val/loss", "val/acc"} for e in epochs)
    assert last.pop("event") == "report"
    assert Path(last.pop("folder")) == tmp_path / "run"
    assert last == strict((tmp_path / "run" / "report.json").read_text())
    assert "quantized fraction" in result.stderr
    assert "Epoch" not in result.stderr  # no progress bar


def test_on_a_terminal_it_shows_progress_and_a_table(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    environment = os.environ | {"COLUMNS": "160", "TERM": "xterm"}
    command = [write_script(COMMAND[0], tmp_path), *COMMAND[1:]]
    with subprocess.Popen(
        command, cwd=tmp_path, stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    ) as process:
        os.close(theirs)
        screen = b""
        while chunk := _read(ours):
            screen += chunk
    os.close(ours)
    assert process.returncode == 0, screen.decode()
    for text in (
        "INQ phase 1/2: 50.0% → 100%",
        "INQ phase 2/2: 100.0%",
        "Incremental Network Quantization",
        "quantized",
        "Stage 1: training at full precision, 1 epoch\r",
        "Stage 2: quantizing to 5 bits, 2 epochs in 2 phases\r",
        "Stage 3: testing the quantized network\r",
        "  inq-inspect run/quantized.ckpt\r",
        "  inq-export run/quantized.ckpt network.onnx\r",
    ):
        assert text in screen.decode()
    for text in ('"event"', "deprecated", "GPU available", "v_num"):
        assert text not in screen.decode()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # how Linux says that nobody has the other side open
        return b""


def test_an_unknown_output_is_refused() -> None:
    with pytest.raises(ValueError, match="output must be one of auto, rich, json, got 'xml'"):
        choose_output(OmegaConf.create({"output": "xml"}))
