"""Which bytes of one static buffer hold what, so that it is small: values that are never needed together share them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Block:
    """Bytes that are needed for a while.

    Attributes:
        size: How many.
        first: The operation from which on they are needed.
        last: The operation after which they are not.
    """

    size: int
    first: int
    last: int

    def meets(self, other: Block) -> bool:
        """Whether both are needed at one time."""
        return self.first <= other.last and other.first <= self.last


def place(blocks: list[Block], unit: int = 4) -> tuple[list[int], int]:
    """Where each block begins, the largest first, each as low as it can be.

    Args:
        blocks: What is to be placed.
        unit: Beginnings are multiples of it.

    Returns:
        The beginnings, in bytes, and the size of all.
    """
    starts = [0] * len(blocks)
    placed: list[int] = []
    for k in sorted(range(len(blocks)), key=lambda k: (-blocks[k].size, blocks[k].first)):
        taken = sorted((starts[j], starts[j] + blocks[j].size) for j in placed if blocks[j].meets(blocks[k]))
        start = 0
        for begin, end in taken:
            if begin - start >= blocks[k].size:
                break
            start = max(start, -(-end // unit) * unit)
        starts[k] = start
        placed.append(k)
    return starts, max((start + block.size for start, block in zip(starts, blocks, strict=True)), default=0)
