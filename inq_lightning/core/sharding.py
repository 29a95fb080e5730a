"""What a process sees of a parameter that is sharded over several processes (``DTensor``); plain tensors pass through.

Only this module knows about distributed tensors: the rest works on the local piece and adds up counts. It imports
`torch.distributed` only where a distributed tensor has turned up, which somebody else's import must have made: plain
loops and inference are spared a second and 46 MB.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from inq_lightning.grid import Reduction

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


def is_sharded(tensor: Tensor) -> TypeIs[DTensor]:
    """Whether it is a ``DTensor``."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The piece of ``tensor`` that lives in this process, without autograd; writing to it writes to the tensor."""
    tensor = tensor.detach()
    return tensor.to_local() if is_sharded(tensor) else tensor


def local_part(full: Tensor, like: Tensor) -> Tensor:
    """Cut out of ``full`` (the same in every process) the piece that corresponds to ``local(like)``.

    Args:
        full: Tensor of the global shape of ``like``, any dtype; one that is sharded as ``like`` is cut already.
        like: The sharded or plain tensor to follow.
    """
    if is_sharded(full):
        return local(full)
    full = full.to(like.device)
    if not is_sharded(like):
        return full
    from torch.distributed.tensor import distribute_tensor

    # Without a source rank nothing is sent: every process cuts its piece from its own copy.
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None).to_local()


def full(piece: Tensor, like: Tensor) -> Tensor:
    """Put the pieces of all processes together: the inverse of :func:`local_part`. A collective call."""
    if not is_sharded(like):
        return piece
    sharded = type(like).from_local(
        piece, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return sharded.full_tensor()


def global_index(flat: Tensor, like: Tensor) -> Tensor:
    """Turn flat indices into ``local(like)`` into flat indices into the whole of ``like``; int64, same shape."""
    if not is_sharded(like):
        return flat
    return local_part(torch.arange(like.numel()).view(like.shape), like).reshape(-1)[flat]


def sum_over_shards(counts: Tensor, like: Tensor) -> Tensor:
    """Add up ``counts`` over the processes that hold different pieces of ``like``, in place. A collective call."""
    return _reduce(counts, like, "SUM")


def max_over_shards(value: Tensor, like: Tensor) -> Tensor:
    """The largest ``value`` over the processes that hold different pieces of ``like``, in place. A collective call."""
    return _reduce(value, like, "MAX")


def reduction(like: Tensor) -> Reduction:
    """What a grid needs in order to be fitted to all shards of ``like`` at once."""
    return Reduction(lambda partial: sum_over_shards(partial, like), lambda partial: max_over_shards(partial, like))


def is_first_process() -> bool:
    """Whether this process is the first of several, or the only one: the one that says things."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def reshard(module: nn.Module) -> None:
    """Make FSDP2 modules show their shards again, those that the optimizer sees, before weights are touched.

    After a validation the root module's parameters stay gathered; what is written to the shards then would be lost.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return
    for submodule in module.modules():
        if isinstance(submodule, fsdp.FSDPModule):
            submodule.reshard()


def _reduce(partial: Tensor, like: Tensor, operation: str) -> Tensor:
    if is_sharded(like):
        operator = getattr(torch.distributed.ReduceOp, operation)
        for dimension, placement in enumerate(like.placements):
            if not placement.is_replicate():  # FSDP2 over tensor parallelism shards in strides, no `is_shard()`
                torch.distributed.all_reduce(partial, operator, group=like.device_mesh.get_group(dimension))
    return partial
