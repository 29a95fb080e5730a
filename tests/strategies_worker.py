"""What the processes of test_strategies.py run; as a script it is a training script that Lightning launches."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.strategies import ModelParallelStrategy
from support import SCHEDULE, TinyModule, same_bits, trainer
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from inq_lightning import INQCallback, Teacher, distill


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-2)


def decay(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)


class Net(TinyModule):
    """Rows that two or three processes cannot share evenly, and one row, of which all but one process have nothing.

    Args:
        copies: Average the gradient over so many copies of itself, as processes with the same data do: three of them
            round. DDP divides first, FSDP2 last.
        divide_first: Which of the two.
        own_data: Every process trains on batches of its own; otherwise all on the same ones.
        relu: Nothing in it but what whole numbers can follow.
    """

    def __init__(self, copies: int = 1, divide_first: bool = False, own_data: bool = False, relu: bool = False) -> None:
        super().__init__(sgd, decay)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.net = nn.Sequential(
                nn.Linear(8, 15), nn.BatchNorm1d(15), nn.ReLU(), nn.Linear(15, 1), nn.Tanh(), nn.Linear(1, 4)
            )
            if relu:
                self.net[4] = nn.ReLU()
        self.copies = copies
        self.divide_first = divide_first
        self.own_data = own_data

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        step = self.global_step
        if self.own_data:
            step = step * self.trainer.world_size + self.trainer.global_rank
        return self.loss(self.batches[step % len(self.batches)])

    def on_after_backward(self) -> None:
        if self.copies > 1:
            for parameter in self.parameters():
                grad = parameter.grad * (1 / self.copies) if self.divide_first else parameter.grad
                total = sum([grad] * self.copies, torch.zeros(()))
                parameter.grad = total if self.divide_first else total / self.copies


class Pupil(Net):
    """Asks a teacher in every step."""

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        output = self.net(x)
        return distill(self.trainer, nn.functional.cross_entropy(output, y), output, x)


class ShardedNet(Net):
    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        fully_shard(self.net[0], mesh=mesh)
        fully_shard(self.net, mesh=mesh)  # the other layers belong to the root, which a validation leaves gathered


class SquareNet(ShardedNet):
    """Sharded by FSDP2 within what tensor parallelism has sharded; it divides rows evenly only."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))

    def configure_model(self) -> None:
        if self.device_mesh is None:
            return
        style = ColwiseParallel(output_layouts=Replicate())
        parallelize_module(self.net, self.device_mesh["tensor_parallel"], {"0": style, "3": style})
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def gathered(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


class Notes(Callback):
    """Looks at what the optimizer holds after every batch, and writes down what this process saw."""

    def __init__(self, folder: Path, callback: INQCallback) -> None:
        self.folder = folder
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

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        write(self.folder, trainer, pl_module, self.callback, self)  # here, because processes that are spawned end soon

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.masks.append({layer.name: self.callback.frozen_mask(layer.name) for layer in self.callback.layers})
        self.fractions.append(self.callback.quantized_fraction)


def fit(
    out: str, *, inq: dict[str, Any] | None = None, callback: INQCallback | None = None, **job: Any
) -> tuple[Net, INQCallback, Trainer]:
    """Train as ``job`` says, and save what this process ends with as ``out/<rank>.pt``.

    Args:
        out: Folder for everything that the run writes.
        inq: Arguments of INQCallback.
        callback: Or the callback itself.
        job: ``fsdp``: so many processes under FSDP2; ``tensor_parallel``: times so many; ``whole_file``: whether its
            checkpoints are one file; ``save``: write one every so many steps; ``net``: arguments of the module;
            ``teacher``: the share of one; ``ckpt_path``; all else is for the Trainer.
    """
    folder = Path(out)
    ckpt_path, save, sharded = job.pop("ckpt_path", None), job.pop("save", None), job.pop("fsdp", None)
    tensor_parallel = job.pop("tensor_parallel", None)
    teacher = job.pop("teacher", None)
    kind = SquareNet if tensor_parallel else ShardedNet if sharded else Pupil if teacher else Net
    module = kind(**job.pop("net", {}))
    whole_file = job.pop("whole_file", True)
    if sharded:
        job["devices"] = sharded * (tensor_parallel or 1)
        job["strategy"] = ModelParallelStrategy(
            data_parallel_size=sharded,
            tensor_parallel_size=tensor_parallel or 1,
            save_distributed_checkpoint=not whole_file,
            timeout=timedelta(seconds=60),
        )
    callback = callback or INQCallback(**{"schedule": SCHEDULE, **(inq or {})})
    notes = Notes(folder, callback)
    callbacks: list[Callback] = [callback, notes, *([Teacher(teacher, network="net")] if teacher else [])]
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
    return module, callback, run


def write(folder: Path, run: Trainer, module: LightningModule, callback: INQCallback, notes: Notes) -> None:
    held = dict(zip(notes.names, run.optimizers[0].param_groups[0]["params"], strict=True))
    result = {
        "weights": notes.weights(run),
        "buffers": {n: b.clone() for n, b in module.named_buffers()},
        "layers": [(x.name, x.shape, x.bits, x.n1, x.n2, x.numel, x.frozen) for x in callback.layers],
        "fraction": callback.quantized_fraction,
        "fractions": notes.fractions,
        "masks": notes.masks,
        "losses": torch.stack(notes.losses) if notes.losses else torch.zeros(0),
        "validation": notes.validation,
        "checks": notes.checks,
        "logged": float(run.callback_metrics["inq/quantized_fraction"]),
        "world": run.world_size,
        "shards": {n: tuple(p.to_local().shape) for n, p in held.items() if isinstance(p, DTensor)},
    }
    torch.save(result, folder / f"{run.global_rank}.pt")


def fit_all(jobs: list[dict[str, Any]]) -> None:
    for job in jobs:
        fit(**job)


def resume_with_a_used_callback(runs: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    """What is left of a run in the callback must not reach the weights that the next one loads."""
    for first, second in runs:
        _, callback, _ = fit(**first)
        fit(**second, callback=callback)


def refuse_a_teacher_of_shards(out: str) -> None:
    with pytest.raises(ValueError, match="Teacher copies whole networks, and this one is sharded"):
        fit(out, fsdp=2, teacher=0.5)


class Counting(INQCallback):
    """Counts what the processes send each other while weights freeze."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        before = self.quantized_fraction
        with CommDebugMode() as sent:
            super().on_train_epoch_start(trainer, pl_module)
        assert self.quantized_fraction > before
        kinds = {str(kind) for kind in sent.get_comm_counts()}
        assert kinds == {"c10d.allreduce_"}, kinds


def count_collectives(out: str) -> None:
    for partition in ("magnitude", "random"):
        fit(out, fsdp=2, callback=Counting(schedule=SCHEDULE, partition=partition), num_sanity_val_steps=1)


def fit_in_children(out: str, strategies: Iterable[str]) -> None:
    """A fit with each strategy and the same callback, by processes that Lightning forks or spawns."""
    callback = INQCallback(schedule=SCHEDULE)
    for strategy in strategies:
        module, _, run = fit(f"{out}/{strategy}", strategy=strategy, devices=2, callback=callback)
        main = {
            "weights": {n: p.detach().clone() for n, p in module.named_parameters()},
            "fraction": callback.quantized_fraction,
            "layers": callback.layers,
            "logged": float(run.callback_metrics["inq/quantized_fraction"]),
        }
        torch.save(main, f"{out}/{strategy}/main.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    fit_all(json.loads(sys.argv[1]))
