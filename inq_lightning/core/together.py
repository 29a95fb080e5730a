"""All parameters of a network at once, in every step: in one launch where a GPU has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from inq_lightning.core.frozen import FrozenWeight

if TYPE_CHECKING:
    from inq_lightning.kernels.cuda import Launch


class Together:
    """Masks the gradients of some parameters, and restores their frozen weights.

    Args:
        weights: Them, by name; what joins later counts too.
    """

    def __init__(self, weights: Mapping[str, FrozenWeight]) -> None:
        self._weights = weights
        self._mask: Launch | None = None
        self._restore: Launch | None = None

    def mask_gradients(self) -> None:
        """Zero the gradients of frozen weights."""
        pairs: list[tuple[Tensor, Tensor]] = []
        for weight in self._weights.values():
            gradient = weight.gradient()
            if gradient is None:
                continue
            self._mask = self._mask or _launch("mask", gradient)
            if self._mask is not None and self._mask.takes(gradient, weight.values):
                pairs.append((gradient, weight.values))
            else:
                weight.mask_gradient()
        if self._mask is not None:
            self._mask(pairs)

    def restore(self) -> None:
        """Put frozen weights back to their values, bit for bit."""
        pairs: list[tuple[Tensor, Tensor]] = []
        for weight in self._weights.values():
            if not weight.frozen:
                continue
            tensor = weight.local
            self._restore = self._restore or _launch("restore", tensor)
            if self._restore is not None and self._restore.takes(tensor, weight.values):
                pairs.append((tensor, weight.values))
            else:
                weight.restore()
        if self._restore is not None:
            self._restore(pairs)


def _launch(action: str, tensor: Tensor) -> Launch | None:
    """What launches the action for many tensors at once; None where nothing does, as on a CPU."""
    if not tensor.is_cuda:
        return None
    try:
        from inq_lightning.kernels.cuda import Launch
    except ImportError:  # Triton comes with PyTorch on Linux only
        return None
    return Launch(action)
