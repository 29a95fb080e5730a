"""The kernel for CPUs: shifts in vectorized passes over pieces that stay in the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from inq_lightning.kernels.reference import ReferenceKernel, bits_of, split


class CPUKernel(ReferenceKernel):
    """Masks and restores by shifting.

    A shift by the bits of the value clears what is frozen in one vectorized pass, several times faster than a masked
    fill: a free weight's bits are 0, which shifts nothing; those of a normal number are negative or exceed the width of
    any word, for which PyTorch defines the result 0.
    """

    def __init__(self, values: Tensor) -> None:
        super().__init__(values)
        self._chunks = [(chunk, bits_of(chunk)) for chunk in split(values)]  # views, cut once and used at every step

    def mask_gradient(self, grad: Tensor) -> None:
        """See :class:`~inq_lightning.kernels.reference.ReferenceKernel`."""
        for g, (_, bits) in zip(split(bits_of(grad)), self._chunks, strict=True):
            g.bitwise_left_shift_(bits)

    def restore(self, weight: Tensor) -> None:
        """See :class:`~inq_lightning.kernels.reference.ReferenceKernel`."""
        widened = weight.element_size() > self.values.element_size()
        exact = torch.empty(0)
        for w, (value, bits) in zip(split(weight), self._chunks, strict=True):
            if exact.shape != w.shape:
                exact = torch.empty_like(w)
            exact.copy_(value)
            bits_of(w).bitwise_left_shift_(bits_of(exact) if widened else bits)
            w.add_(exact)  # free: x + 0.0; frozen: 0.0 + value, where -0.0 becomes +0.0
