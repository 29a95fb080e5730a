"""What a kernel computes, in the plainest way: the definition for all others, and the kernel of every other device."""

from __future__ import annotations

import torch
from torch import Tensor

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 18  # elements whose temporaries stay in a core's cache


class ReferenceKernel:
    """Masks and restores one tensor.

    Args:
        values: The frozen weights' values, see :mod:`inq_lightning.kernels`; where they change, make another kernel.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def mask_gradient(self, grad: Tensor) -> None:
        """Zero ``grad``, of the shape of the values, where weights are frozen, whatever it holds, nan included."""
        grad.masked_fill_(bits_of(self.values) != 0, 0.0)

    def restore(self, weight: Tensor) -> None:
        """Put frozen weights back to their values; a zero becomes +0.0."""
        weight.copy_(torch.where(bits_of(self.values) != 0, self.values.to(weight.dtype), weight))
        weight.add_(0.0)


def bits_of(tensor: Tensor) -> Tensor:
    """The same memory seen as integers."""
    return tensor.view(_INTEGERS[tensor.element_size()])


def split(tensor: Tensor) -> tuple[Tensor, ...]:
    """Views of a CPU's cache size, the same cuts for tensors of the same shape, whatever their memory formats."""
    if tensor.dim() == 0 or tensor.is_cuda:
        return (tensor,)
    rows = max(1, _CHUNK * tensor.shape[0] // max(tensor.numel(), 1))
    return torch.split(tensor, rows)
