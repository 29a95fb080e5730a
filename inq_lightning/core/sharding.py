"""What a process sees of a parameter that is sharded over several processes (``DTensor``); plain tensors pass through.

Only this module knows about distributed tensors: the rest works on the local piece and adds up counts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed import all_reduce
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def local(tensor: Tensor) -> Tensor:
    """The piece of ``tensor`` that lives in this process, without autograd; writing to it writes to the tensor."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_part(full: Tensor, like: Tensor) -> Tensor:
    """Cut out of ``full`` (the same in every process) the piece that corresponds to ``local(like)``.

    Args:
        full: Tensor of the global shape of ``like``, any dtype; one that is sharded as ``like`` is cut already.
        like: The sharded or plain tensor to follow.
    """
    if isinstance(full, DTensor):
        return local(full)
    full = full.to(like.device)
    if not isinstance(like, DTensor):
        return full
    # Without a source rank nothing is sent: every process cuts its piece from its own copy.
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None).to_local()


def full(piece: Tensor, like: Tensor) -> Tensor:
    """Put the pieces of all processes together: the inverse of :func:`local_part`. A collective call."""
    if not isinstance(like, DTensor):
        return piece
    sharded = DTensor.from_local(
        piece, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return sharded.full_tensor()


def global_index(flat: Tensor, like: Tensor) -> Tensor:
    """Turn flat indices into ``local(like)`` into flat indices into the whole of ``like``; int64, same shape."""
    if not isinstance(like, DTensor):
        return flat
    return local_part(torch.arange(like.numel()).view(like.shape), like).reshape(-1)[flat]


def sum_over_shards(counts: Tensor, like: Tensor) -> Tensor:
    """Add up ``counts`` over the processes that hold different pieces of ``like``, in place. A collective call."""
    if isinstance(like, DTensor):
        for dimension, placement in enumerate(like.placements):
            if not placement.is_replicate():  # FSDP2 over tensor parallelism shards in strides, no `is_shard()`
                all_reduce(counts, group=like.device_mesh.get_group(dimension))
    return counts


def max_over_shards(value: Tensor, like: Tensor) -> Tensor:
    """The largest ``value`` over the processes that hold different pieces of ``like``, in place. A collective call."""
    if isinstance(like, DTensor):
        for dimension, placement in enumerate(like.placements):
            if not placement.is_replicate():
                all_reduce(value, op=torch.distributed.ReduceOp.MAX, group=like.device_mesh.get_group(dimension))
    return value


def reshard(module: nn.Module) -> None:
    """Make FSDP2 modules show their shards again, those that the optimizer sees, before weights are touched.

    After a validation the root module's parameters stay gathered; what is written to the shards then would be lost.
    """
    for submodule in module.modules():
        if isinstance(submodule, FSDPModule):
            submodule.reshard()
