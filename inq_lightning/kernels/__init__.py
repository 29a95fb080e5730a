"""The hot path of every training step: mask gradients, restore weights; one kernel for each type of device.

Each does, bit for bit, what :class:`~inq_lightning.kernels.reference.ReferenceKernel` does. All read the values that
frozen weights have, in the shape of the weights and in a type whose normal numbers hold them: +0.0 marks a free weight,
and a weight frozen at zero is kept as -0.0.
"""

from torch import Tensor

from inq_lightning.kernels.cpu import CPUKernel
from inq_lightning.kernels.reference import ReferenceKernel, bits_of, split

__all__ = ["KERNELS", "CPUKernel", "ReferenceKernel", "bits_of", "kernel_for", "split"]

#: Kernels by the type of device that they are made for; the reference serves all others.
KERNELS: dict[str, type[ReferenceKernel]] = {"cpu": CPUKernel}


def kernel_for(values: Tensor) -> ReferenceKernel:
    """The kernel for values on their device."""
    return KERNELS.get(values.device.type, ReferenceKernel)(values)
