"""What the tests run in a process of its own, to kill it or to let it run out of disk (``kill_worker.py FOLDER``)."""

from __future__ import annotations

import json
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from support import TinyModule, trainer
from torch import optim
from torch.optim import lr_scheduler

from inq_lightning import INQCallback
from inq_lightning.report.run import Report

EPOCHS, BATCHES = 60, 4  # 240 steps
EVERY = 3  # steps from one checkpoint to the next


def module() -> TinyModule:
    return TinyModule(lambda p: optim.AdamW(p, lr=1e-2, weight_decay=0.1), lambda o: lr_scheduler.ExponentialLR(o, 0.9))


def callback() -> INQCallback:
    return INQCallback(4, {5: 0.3, 14: 0.5, 23: 0.8, 31: 0.9, 45: 1.0}, partition="random", reset_optimizer=True)


class Pace(Callback):
    """Says when training begins, and slows it down to about 4 seconds."""

    def __init__(self, started: Path) -> None:
        self.started = started

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.started.touch()
        time.sleep(0.01)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.started.with_name("exception").write_text(f"{type(exception).__name__} {trainer.global_step}")


class AfterStep(ModelCheckpoint):
    """Leaves out the last batch of each epoch, from which Lightning resumes exactly only once."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step % BATCHES:
            super().on_train_batch_end(trainer, pl_module, *args)


def train(folder: Path, resume: Path | None) -> None:
    """Train, from a checkpoint if there is one, and write the final weights."""
    torch.set_num_threads(1)
    saver = AfterStep(folder, save_last=True, every_n_train_steps=EVERY, save_on_exception=True)
    net = module()
    run = trainer(callback(), Pace(folder / "started"), saver, max_epochs=EPOCHS, enable_checkpointing=True)
    run.fit(net, ckpt_path=resume)
    torch.save(net.state_dict(), folder / "final.partial")
    (folder / "final.partial").rename(folder / "final.pt")


def full(folder: Path) -> None:
    """Write checkpoints and reports where files cannot grow beyond a few kilobytes; tell what came of it."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    inq, net = callback(), module()
    run = trainer(inq, max_epochs=EPOCHS)
    run.fit(net)
    report = Report.of(net, inq.layers, {"accuracy": 0.5}, {f"metric {i}": 0.5 for i in range(100)}, 1.0)
    run.save_checkpoint(folder / "good.ckpt", weights_only=False)
    report.write(folder / "report.json")
    with torch.no_grad():
        net.net[1].bias.zero_()  # so that a checkpoint written over the good one can be told
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    errors = {}
    for size in (0, 500, 2000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        for name in ("new.ckpt", "good.ckpt", "new.json", "report.json"):
            try:
                if name.endswith("json"):
                    report.write(folder / name)
                else:
                    run.save_checkpoint(folder / name, weights_only=False)
            except OSError as error:
                errors[f"{name} at {size}"] = error.strerror
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    run.save_checkpoint(folder / "afterwards.ckpt", weights_only=False)
    (folder / "errors.json").write_text(json.dumps(errors))


if __name__ == "__main__":
    full(Path(sys.argv[1]))
