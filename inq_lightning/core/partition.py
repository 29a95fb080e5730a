"""Which free weights freeze next: an exact number of them, in linear time, also when a tensor is sharding."""

from __future__ import annotations

import zlib
from typing import Literal

import torch
from torch import Tensor

from inq_lightning._common import one_of
from inq_lightning.core import sharding

Partition = Literal["magnitude", "random"]

_RADIX = 16  # bits of a key that one histogram resolves
_BINS = 1 << _RADIX


def scores(w: Tensor, partition: Partition, name: str = "", seed: int = 0) -> Tensor:
    """How early each weight freezes, the highest score first.

    Args:
        w: Weights, plain or sharding.
        partition: ``"magnitude"``: the largest first (section 2.2 of the paper, its pruning-inspired strategy).
            ``"random"``: an order drawn once for each tensor from ``seed`` and ``name``, so that it is the same in
            every process, in every phase and after resuming.
        name: The parameter's name; only ``"random"`` reads it.
        seed: Seed of the random order; only ``"random"`` reads it.

    Returns:
        Non-negative scores in the shape of the local piece of ``w``.
    """
    one_of("partition", partition, Partition)
    if partition == "magnitude":
        return sharding.local(w).abs()
    # Hashed together: the generator reads no more than 32 bits of its seed.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    return sharding.local_part(torch.rand(w.shape, generator=generator), w)


def select(
    score: Tensor, free: Tensor, count: int, like: Tensor | None = None, candidates: int | None = None
) -> Tensor:
    """Choose the ``count`` free weights with the highest scores; among equal scores, the lowest index.

    Read as integers, the bits of non-negative floats are ordered as the floats are. So a histogram of their high 16
    bits tells in which bin the last chosen score lies, a histogram of the next 16 bits within that bin narrows it
    down, and so on; ties go on with the bits of the index. Histograms of shards add up, hence a sharded tensor is
    partitioned exactly without gathering it.

    Args:
        score: Non-negative scores of the local piece, any floating dtype and shape.
        free: bool, same shape: the candidates.
        count: How many to choose, over all shards.
        like: The sharded parameter that ``score`` belongs to, or None for a plain tensor.
        candidates: How many candidates there are, over all shards, where that is known: a GPU need not be asked.

    Returns:
        bool tensor in the shape of ``score`` with ``count`` elements (over all shards) set.

    Raises:
        ValueError: There are fewer than ``count`` candidates.
    """
    like = score if like is None else like
    if candidates is None:
        candidates = int(sharding.sum_over_shards(free.count_nonzero(), like))
    if not 0 <= count <= candidates:
        raise ValueError(f"cannot choose {count} of {candidates} free weights")
    if count == 0:
        return torch.zeros_like(free)
    if count == candidates:
        return free.clone()

    if score.is_cuda and not sharding.is_sharded(like):
        return _by_sorting(score, free, count)
    if score.element_size() == 2:
        score = score.float()
    # + 1, so that 0 remains for what is not free; the largest finite float leaves room for it.
    keys = score.reshape(-1).view(torch.int64 if score.element_size() == 8 else torch.int32).add(1)
    if not free.all():
        keys.mul_(free.reshape(-1))
    chosen = torch.zeros_like(keys, dtype=torch.bool)
    tied = torch.empty(0)  # flat indices of the candidates that the digits so far cannot tell apart
    first = True
    while True:
        for shift in range(keys.element_size() * 8 - _RADIX, -1, -_RADIX):
            digit = (keys >> shift).bitwise_and_(_BINS - 1)
            histogram = sharding.sum_over_shards(torch.bincount(digit, minlength=_BINS), like)
            at_least = histogram.flip(0).cumsum(0).flip(0)  # how many have this digit or a higher one
            pivot = int((at_least >= count).sum()) - 1  # the digit of the last one to be chosen
            count -= int(at_least[pivot] - histogram[pivot])
            same = (digit == pivot).nonzero().squeeze(1)
            if first:
                chosen, tied, first = digit > pivot, same, False
            else:
                chosen[tied[digit > pivot]] = True
                tied = tied[same]
            if count == int(histogram[pivot]):
                chosen[tied] = True
                return chosen.view(free.shape)
            keys = keys[same]
        # Equal scores: go on with the index, the lowest first; no two are equal there.
        keys = like.numel() - sharding.global_index(tied, like)


def _by_sorting(score: Tensor, free: Tensor, count: int) -> Tensor:
    """:func:`select` on one GPU, where sorting is quick and what waits for a number from the GPU is not."""
    order = torch.where(free, score, -1).reshape(-1).sort(descending=True, stable=True).indices
    chosen = torch.zeros(free.numel(), dtype=torch.bool, device=free.device)
    chosen[order[:count]] = True
    return chosen.view(free.shape)
