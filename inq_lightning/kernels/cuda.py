"""CUDA: all tensors of a network in one launch, since launches are what a step of small layers costs.

Triton comes with PyTorch's builds for CUDA. It is imported with this module, so import it where a GPU is at hand.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

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
    """Masks or restores many tensors in one launch for each dtype.

    Args:
        action: ``"mask"`` or ``"restore"``, see :class:`~inq_lightning.kernels.reference.ReferenceKernel`.
    """

    def __init__(self, action: str) -> None:
        self._action = action  # not the kernel: callbacks are pickled
        self._tables: dict[torch.dtype, tuple[list[int], Tensor, Tensor]] = {}
        self._last: tuple[list[int], list[torch.dtype]] | None = None

    @staticmethod
    def takes(tensor: Tensor, values: Tensor) -> bool:
        """Whether it can be one of them, with the values that its frozen weights have."""
        same = tensor.device == values.device and tensor.stride() == values.stride()
        return same and tensor.dtype in _DTYPES and values.dtype is torch.bfloat16

    @torch.compiler.disable
    def repeat(self, addresses: list[int]) -> bool:
        """Do again what the last call did, if it was for these addresses; whether it was."""
        if self._last is None or self._last[0] != addresses:
            return False
        for dtype in self._last[1]:
            self._start(dtype)
        return True

    @torch.compiler.disable
    def __call__(self, pairs: list[tuple[Tensor, Tensor]], addresses: list[int] | None = None) -> None:
        """Do it for pairs of a tensor and its values, all on one device.

        Args:
            pairs: Them.
            addresses: Where they are, for :meth:`repeat`; None if there is more to do than this.
        """
        dtypes = list(dict.fromkeys(tensor.dtype for tensor, _ in pairs))
        self._last = None if addresses is None else (addresses, dtypes)
        for dtype in dtypes:
            chosen = [pair for pair in pairs if pair[0].dtype is dtype]
            rows = [number for t, v in chosen for number in (t.data_ptr(), v.data_ptr(), t.numel())]
            if dtype not in self._tables or self._tables[dtype][0] != rows:
                # Not in place: the last launch may not have read its table yet.
                self._tables[dtype] = (rows, *_upload(rows, chosen[0][0].device))
            self._start(dtype)

    def _start(self, dtype: torch.dtype) -> None:
        _, table, blocks = self._tables[dtype]
        if len(blocks):
            with torch.cuda.device(table.device):
                {"mask": _mask, "restore": _restore}[self._action][(len(blocks),)](
                    table, blocks, dtype=_DTYPES[dtype], block=_BLOCK
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
