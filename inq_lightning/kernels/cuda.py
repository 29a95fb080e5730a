"""The kernel for CUDA: few launches a tensor, since they are what a step of small layers costs."""

from __future__ import annotations

import torch
from torch import Tensor

from inq_lightning.kernels.reference import ReferenceKernel, bits_of


class CUDAKernel(ReferenceKernel):
    """Masks in one launch and restores in two, from a mask that is kept: a byte a weight more than on a CPU."""

    def __init__(self, values: Tensor) -> None:
        super().__init__(values)
        self._frozen = bits_of(values) != 0

    def mask_gradient(self, grad: Tensor) -> None:
        """See :class:`~inq_lightning.kernels.reference.ReferenceKernel`."""
        grad.masked_fill_(self._frozen, 0.0)

    def restore(self, weight: Tensor) -> None:
        """See :class:`~inq_lightning.kernels.reference.ReferenceKernel`."""
        wide = torch.promote_types(self.values.dtype, weight.dtype) is weight.dtype
        values = self.values if wide else self.values.to(weight.dtype)
        torch.where(self._frozen, values, weight, out=weight).add_(0.0)
