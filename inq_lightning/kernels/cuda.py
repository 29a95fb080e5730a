"""CUDA: all tensors of a network in one launch, since launches are what a step of small layers costs.

Triton comes with PyTorch's builds for CUDA. It is imported with this module, so import it where a GPU is at hand.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

_Kind: TypeAlias = tuple[torch.device, torch.dtype]

_BLOCK = 2048  # elements a program
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _mask(table, blocks, dtype: tl.constexpr, block: tl.constexpr):
    row = table + 3 * tl.load(blocks + 2 * tl.program_id(0))
    at = tl.load(blocks + 2 * tl.program_id(0) + 1) + tl.arange(0, block)
    inside = at < tl.load(row + 2)
    bits = tl.load(tl.load(row + 1).to(tl.pointer_type(tl.int16)) + at, mask=inside, other=0)
    grad = tl.load(row).to(tl.pointer_type(dtype))
    tl.store(grad + at, tl.zeros([block], dtype), mask=inside & (bits != 0))


@triton.jit
def _restore(table, blocks, dtype: tl.constexpr, block: tl.constexpr):
    row = table + 3 * tl.load(blocks + 2 * tl.program_id(0))
    at = tl.load(blocks + 2 * tl.program_id(0) + 1) + tl.arange(0, block)
    inside = at < tl.load(row + 2)
    bits = tl.load(tl.load(row + 1).to(tl.pointer_type(tl.int16)) + at, mask=inside, other=0)
    weight = tl.load(row).to(tl.pointer_type(dtype))
    old = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    value = (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)  # a bfloat16 is the upper half of a float32
    new = tl.where(bits != 0, value, 0.0)
    zero = (bits == 0) & (old == 0.0)  # a free weight is left alone, but that -0.0 becomes +0.0
    tl.store(weight + at, tl.where(new == 0.0, 0.0, new).to(dtype), mask=inside & ((bits != 0) | zero))


class Launch:
    """Masks or restores many tensors in one launch for each device and dtype.

    Args:
        action: ``"mask"`` or ``"restore"``, see :class:`~inq_lightning.kernels.reference.ReferenceKernel`.
    """

    def __init__(self, action: str) -> None:
        self._action = action  # not the kernel: callbacks are pickled
        self._tables: dict[_Kind, tuple[list[int], Tensor, Tensor]] = {}
        self._last: tuple[list[int], list[_Kind]] | None = None

    @staticmethod
    def takes(tensor: Tensor, values: Tensor) -> bool:
        """Whether it can be one of them, with the values that its frozen weights have."""
        same = tensor.device == values.device and tensor.stride() == values.stride()
        return same and tensor.is_cuda and tensor.dtype in _DTYPES and values.dtype is torch.bfloat16

    @torch.compiler.disable
    def repeat(self, addresses: list[int]) -> bool:
        """Do again what the last call did, if it was for these addresses; whether it was."""
        if self._last is None or self._last[0] != addresses:
            return False
        for kind in self._last[1]:
            self._start(kind)
        return True

    @torch.compiler.disable
    def __call__(self, pairs: list[tuple[Tensor, Tensor]], addresses: list[int] | None = None) -> None:
        """Do it for pairs of a tensor and its values.

        Args:
            pairs: Them.
            addresses: Where they are, for :meth:`repeat`; None if there is more to do than this.
        """
        rows: dict[_Kind, list[int]] = {}
        for t, v in pairs:
            rows.setdefault((t.device, t.dtype), []).extend((t.data_ptr(), v.data_ptr(), t.numel()))
        self._last = None if addresses is None else (addresses, list(rows))
        for kind, numbers in rows.items():
            if kind not in self._tables or self._tables[kind][0] != numbers:
                # Not in place: the last launch may not have read its table yet.
                self._tables[kind] = (numbers, *_upload(numbers, kind[0]))
            self._start(kind)

    def _start(self, kind: _Kind) -> None:
        _, table, blocks = self._tables[kind]
        if len(blocks):
            with torch.cuda.device(table.device):
                {"mask": _mask, "restore": _restore}[self._action][(len(blocks),)](
                    table, blocks, dtype=_DTYPES[kind[1]], block=_BLOCK
                )


def _upload(rows: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """The table of addresses and sizes, and which part of which tensor each program takes, without a wait."""
    numels = torch.tensor(rows[2::3])
    programs = (numels + _BLOCK - 1) // _BLOCK
    which = torch.repeat_interleave(torch.arange(len(numels)), programs)
    first = torch.repeat_interleave(programs.cumsum(0) - programs, programs)
    blocks = torch.stack([which, (torch.arange(len(which)) - first) * _BLOCK], dim=1)
    table, blocks = (t.pin_memory().to(device, non_blocking=True) for t in (torch.tensor(rows), blocks))
    return table, blocks
