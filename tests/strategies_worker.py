"""What the processes of tests/test_strategies.py run; as a script it is a training script that Lightning launches."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.strategies import ModelParallelStrategy
from support import SCHEDULE, TinyModule, same_bits, trainer
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from inq_lightning import INQCallback

WORKERS = multiprocessing.get_context("forkserver")  # clean processes that need not import everything anew


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-2)


def decay(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)


class Net(TinyModule):
    """Rows that two or three processes cannot share evenly, and one row, of which all but one process have nothing.

    Args:
        copies: Average the gradient over so many copies of itself, as processes with the same data do.
        own_data: Every process trains on batches of its own; otherwise all on the same ones.
    """

    def __init__(self, copies: int = 1, own_data: bool = False) -> None:
        super().__init__(sgd, decay)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.net = nn.Sequential(
                nn.Linear(8, 15), nn.BatchNorm1d(15), nn.ReLU(), nn.Linear(15, 1), nn.Tanh(), nn.Linear(1, 4)
            )
        self.copies = copies
        self.own_data = own_data

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        step = self.global_step
        if self.own_data:
            step = step * self.trainer.world_size + self.trainer.global_rank
        return self.loss(self.batches[step % len(self.batches)])

    def on_after_backward(self) -> None:
        if self.copies > 1:
            for parameter in self.parameters():
                parameter.grad = sum([parameter.grad] * self.copies, torch.zeros(())) / self.copies


class ShardedNet(Net):
    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        fully_shard(self.net[0], mesh=mesh)
        fully_shard(self.net, mesh=mesh)  # the other layers belong to the root, which a validation leaves gathered


def gathered(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


class Notes(Callback):
    """Looks at what the optimizer holds after every batch, and writes down what this process saw."""

    def __init__(self, callback: INQCallback) -> None:
        self.callback = callback
        self.frozen: dict[str, tuple[Tensor, Tensor]] = {}
        self.names: list[str] = []
        self.losses: list[Tensor] = []
        self.validation: list[float] = []
        self.masks: list[dict[str, Tensor]] = []  # of every epoch
        self.fractions: list[float] = []
        self.checks = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.names = [name for name, _ in pl_module.named_parameters()]

    def weights(self, trainer: Trainer) -> dict[str, Tensor]:
        (group,) = trainer.optimizers[0].param_groups
        return {n: gathered(p) for n, p in zip(self.names, group["params"], strict=True)}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        self.losses.append(outputs["loss"].detach().clone())
        now = self.weights(trainer)
        for layer in self.callback.layers:
            mask = self.callback.frozen_mask(layer.name)
            assert mask.shape == now[layer.name].shape == layer.shape
            assert int(mask.sum()) == layer.frozen
            if layer.name in self.frozen:
                old_mask, old = self.frozen[layer.name]
                assert bool((mask | ~old_mask).all()), f"{layer.name} was unfrozen"
                assert same_bits(now[layer.name][old_mask], old[old_mask]), f"{layer.name} moved"
                self.checks += 1
            self.frozen[layer.name] = (mask, now[layer.name])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.validation.append(float(trainer.callback_metrics["val_loss"]))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.masks.append({layer.name: self.callback.frozen_mask(layer.name) for layer in self.callback.layers})
        self.fractions.append(self.callback.quantized_fraction)


def fit(out: str, *, inq: dict[str, Any] | None = None, **job: Any) -> tuple[Net, INQCallback, Trainer]:
    """Train as ``job`` says, and save what this process ends with as ``out/<rank>.pt``.

    Args:
        out: Folder for everything that the run writes.
        inq: Arguments of INQCallback.
        job: ``fsdp``: a size for ModelParallelStrategy; ``save``: write a checkpoint every so many steps;
            ``net``: arguments of the module; ``ckpt_path``; all else is for the Trainer.
    """
    folder = Path(out)
    ckpt_path, save, sharded = job.pop("ckpt_path", None), job.pop("save", None), job.pop("fsdp", None)
    module = (ShardedNet if sharded else Net)(**job.pop("net", {}))
    whole_file = job.pop("whole_file", True)
    if sharded:
        job["devices"] = sharded
        job["strategy"] = ModelParallelStrategy(
            data_parallel_size=sharded,
            tensor_parallel_size=1,
            save_distributed_checkpoint=not whole_file,
            timeout=timedelta(seconds=60),
        )
    callback = INQCallback(**{"schedule": SCHEDULE, **(inq or {})})
    notes = Notes(callback)
    callbacks: list[Callback] = [callback, notes]
    if save:
        callbacks.append(ModelCheckpoint(folder, filename="{step}", every_n_train_steps=save, save_top_k=-1))
    options = {
        "use_distributed_sampler": False,
        "limit_val_batches": 1.0,
        "num_sanity_val_steps": 1,
        "logger": CSVLogger(folder, name="", version=""),
        "enable_checkpointing": bool(save),
        "devices": 1,
    }
    run = trainer(*callbacks, **(options | job))
    run.fit(module, ckpt_path=ckpt_path)
    write(folder, run, module, callback, notes)
    return module, callback, run


def write(folder: Path, run: Trainer, module: Net, callback: INQCallback, notes: Notes) -> None:
    result = {
        "weights": notes.weights(run),
        "buffers": {n: b.clone() for n, b in module.named_buffers()},
        "layers": [tuple(layer) for layer in callback.layers],
        "fraction": callback.quantized_fraction,
        "fractions": notes.fractions,
        "masks": notes.masks,
        "losses": torch.stack(notes.losses) if notes.losses else torch.zeros(0),
        "validation": notes.validation,
        "checks": notes.checks,
        "logged": float(run.callback_metrics["inq/quantized_fraction"]),
        "world": run.world_size,
        "sharded": [n for n, p in zip(notes.names, run.optimizers[0].param_groups[0]["params"], strict=True)
                    if isinstance(p, DTensor)],
        "local": {n: tuple(p.to_local().shape) for n, p in module.named_parameters() if isinstance(p, DTensor)},
    }  # fmt: skip
    torch.save(result, folder / f"{run.global_rank}.pt")


def launch(processes: int, jobs: Callable[..., None], *args: Any) -> None:
    """Call ``jobs(*args)`` in so many processes at once, with the environment that torchrun gives."""
    WORKERS.set_forkserver_preload(["strategies_worker"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        WORKERS.Process(target=_as_rank, args=(rank, processes, port, jobs, *args)) for rank in range(processes)
    ]
    for process in started:
        process.start()
    failed = []
    for process in started:
        process.join(5 if failed else 240)
        if process.exitcode != 0:
            failed.append(process)
    for process in started:
        if process.is_alive():
            process.kill()
    assert not failed, f"{len(failed)} of {processes} processes failed; what they said is on stderr"


def _as_rank(rank: int, processes: int, port: int, jobs: Callable[..., None], *args: Any) -> None:
    torch.set_num_threads(1)
    if processes > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "GROUP_RANK": "0",
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "tests",
        }
    jobs(*args)


def fit_all(jobs: list[dict[str, Any]]) -> None:
    for job in jobs:
        fit(**job)


if __name__ == "__main__":
    torch.set_num_threads(1)
    fit_all(json.loads(sys.argv[1]))
