"""Processes killed at random moments of a training, and resumed from what they left on the disk."""

from __future__ import annotations

import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from pickle import UnpicklingError

import kill_worker
import pytest
import torch
from processes import process as new_process
from support import assert_quantized, same_bits, trainer
from torch import Tensor

SECONDS = 4.0  # a whole training takes about as long


@pytest.fixture(scope="module")
def whole() -> dict[str, Tensor]:
    """Weights of the run that nobody kills."""
    net, inq = kill_worker.module(), kill_worker.callback()
    trainer(inq, max_epochs=kill_worker.EPOCHS).fit(net)
    assert_quantized(net, inq)
    return net.state_dict()


class Runs:
    """Starts processes that go on where the last one was killed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.unreadable = 0

    def newest(self) -> Path | None:
        """The newest checkpoint that can be read: a process may have been killed while it wrote one."""
        for path in sorted(self.folder.glob("*.ckpt"), key=lambda p: p.stat().st_mtime_ns, reverse=True):
            try:
                torch.load(path)
            except (EOFError, OSError, RuntimeError, UnicodeDecodeError, UnpicklingError):
                self.unreadable += 1
                continue
            return path
        return None

    def start(self) -> BaseProcess:
        """Start a process and wait until it trains, or has ended."""
        started = self.folder / "started"
        started.unlink(missing_ok=True)
        process = new_process(kill_worker.train, self.folder, self.newest())
        process.start()
        while not started.exists() and process.is_alive():
            time.sleep(0.002)
        assert process.is_alive(), "the process has ended before it trained"
        return process

    def finish(self) -> dict[str, Tensor]:
        process = self.start()
        process.join(120)
        assert process.exitcode == 0
        weights: dict[str, Tensor] = torch.load(self.folder / "final.pt")
        return weights


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not same_bits(ours[name].float(), theirs[name].float())]


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(
    runs: Runs, whole: dict[str, Tensor], kills: int
) -> None:
    moments = random.Random(kills)
    steps = []
    for _ in range(kills):
        process = runs.start()
        time.sleep(moments.uniform(0.05, 1.5 * SECONDS / kills))
        process.kill()
        process.join(60)
        if process.exitcode == 0:
            break  # it was done before the signal came
        assert process.exitcode == -signal.SIGKILL
        newest = runs.newest()
        steps.append(torch.load(newest)["global_step"] if newest else 0)
    assert len(steps) >= min(kills, 3)
    assert steps == sorted(steps)
    assert steps[-1] > 0
    assert_same(runs.finish(), whole)
    print(f"killed after the checkpoints of steps {steps}; unreadable checkpoints: {runs.unreadable}")


def test_a_run_that_is_asked_to_end_leaves_a_checkpoint_of_that_moment(runs: Runs, whole: dict[str, Tensor]) -> None:
    process = runs.start()
    time.sleep(SECONDS / 4)
    process.terminate()
    process.join(60)
    assert not (runs.folder / "final.pt").exists()
    exception, step = (runs.folder / "exception").read_text().split()
    assert exception == "SIGTERMException"
    newest = runs.newest()
    assert newest is not None
    assert torch.load(newest)["global_step"] == int(step)
    assert_same(runs.finish(), whole)
