"""All parameters of a network at once, in every step: in one launch where a GPU has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

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
        weights = list(self._weights.values())
        places = _addresses([weight.parameter.grad for weight in weights], weights)
        if places is not None and self._mask is not None and self._mask.repeat(places):
            return
        pairs: list[tuple[Tensor, Tensor]] = []
        for weight in weights:
            gradient = weight.gradient()
            if gradient is None:
                continue
            self._mask = self._mask or _launch("mask", gradient)
            if self._mask is not None and self._mask.takes(gradient, weight.values):
                pairs.append((gradient, weight.values))
            else:
                weight.mask_gradient()
                places = None
        if self._mask is not None:
            self._mask(pairs, places if len(pairs) == len(weights) else None)

    def restore(self) -> None:
        """Put frozen weights back to their values, bit for bit."""
        weights = list(self._weights.values())
        places = _addresses([weight.parameter for weight in weights], weights)
        if places is not None and self._restore is not None and self._restore.repeat(places):
            return
        pairs: list[tuple[Tensor, Tensor]] = []
        for weight in weights:
            if not weight.frozen:
                continue
            tensor = weight.local
            self._restore = self._restore or _launch("restore", tensor)
            if self._restore is not None and self._restore.takes(tensor, weight.values):
                pairs.append((tensor, weight.values))
            else:
                weight.restore()
                places = None
        if self._restore is not None:
            self._restore(pairs, places if len(pairs) == len(weights) else None)


def _addresses(tensors: Sequence[Tensor | None], weights: Sequence[FrozenWeight]) -> list[int] | None:
    """Where plain tensors on a GPU, and their values, are; None if they are others."""
    places = []
    for tensor, weight in zip(tensors, weights, strict=True):
        if tensor is None or not tensor.is_cuda or type(tensor) not in (Tensor, nn.Parameter) or tensor.is_sparse:
            return None
        places += [tensor.data_ptr(), weight.values.data_ptr()]
    return places


def _launch(action: str, tensor: Tensor) -> Launch | None:
    """What launches the action for many tensors at once; None where nothing does, as on a CPU."""
    if not tensor.is_cuda:
        return None
    try:
        from inq_lightning.kernels.cuda import Launch
    except ImportError:  # Triton comes with PyTorch on Linux only
        return None
    return Launch(action)
