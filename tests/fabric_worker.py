"""What the processes of test_fabric.py run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import ModelParallelStrategy
from support import SCHEDULE, TinyModule, same_bits
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from inq_lightning import FabricINQ


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def shard(net: nn.Module, mesh: Any) -> nn.Module:
    fully_shard(net[0], mesh=mesh["data_parallel"])
    return fully_shard(net, mesh=mesh["data_parallel"])


def train(
    out: str, *, fsdp: bool = False, save_at: int = -1, ckpt: str = "", loggers: Any = None, **fabric: Any
) -> None:
    """Train four epochs of four steps, and save what this process ends with as ``out/<rank>.pt``.

    Args:
        out: Folder for everything that the run writes.
        fsdp: Whether two processes share the weights.
        save_at: Step after which to write the checkpoint ``out/<step>``.
        ckpt: Checkpoint to go on from.
        loggers: Loggers.
        fabric: Arguments of Fabric.
    """
    if fsdp:
        fabric["strategy"] = ModelParallelStrategy(shard, data_parallel_size=2, tensor_parallel_size=1)
    run = Fabric(accelerator="cpu", loggers=loggers, **({"devices": 1} | fabric))
    run.launch()
    module = TinyModule(seed=5 if ckpt else 0)
    net = run.setup_module(module.net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
    optimizer = run.setup_optimizers(optimizer)
    inq = FabricINQ(run, net, optimizer, schedule=SCHEDULE, epochs=4, schedulers=[scheduler])
    parts = {"net": net, "optimizer": optimizer, "scheduler": scheduler, "inq": inq, "step": 0}
    if ckpt:
        run.load(ckpt, parts)
        for name in ("scheduler", "inq"):
            if isinstance(parts[name], dict):  # of checkpoints in shards, Fabric loads only module and optimizer itself
                {"scheduler": scheduler, "inq": inq}[name].load_state_dict(parts[name])
    moved = 0
    for step in range(parts["step"], 16):
        if step % 4 == 0 or step == parts["step"]:
            inq.advance(step // 4)
        held = {layer.name: (inq.frozen_mask(layer.name), whole(of(net, layer.name))) for layer in inq.layers}
        optimizer.zero_grad()
        x, y = module.batches[step % 4]
        run.backward(nn.functional.cross_entropy(net(x), y))
        for name, (mask, _) in held.items():
            assert not whole(of(net, name).grad)[mask].any(), f"the gradient of {name} is not masked"
        optimizer.step()
        moved += sum(not same_bits(whole(of(net, name))[mask], value[mask]) for name, (mask, value) in held.items())
        if step % 4 == 3:
            scheduler.step()
        if step == save_at:
            run.save(f"{out}/{step}", {**parts, "step": step + 1})
    inq.finish()
    result = {
        "weights": {name: whole(p) for name, p in net.module.named_parameters()},
        "layers": [(layer.name, layer.n1, layer.frozen) for layer in inq.layers],
        "fraction": inq.quantized_fraction,
        "moved": moved,
        "world": run.world_size,
        "sharded": any(isinstance(p, DTensor) for p in net.parameters()),
    }
    Path(out).mkdir(parents=True, exist_ok=True)
    torch.save(result, f"{out}/{run.global_rank}.pt")


def of(net: nn.Module, name: str) -> Tensor:
    return net.module.get_parameter(name)


def train_all(jobs: list[dict[str, Any]]) -> None:
    for job in jobs:
        train(**job)
