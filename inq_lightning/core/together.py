"""All parameters of a network at once, in every step: in one launch where a GPU has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from inq_lightning.core import sharding
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
        self._launches: dict[str, Launch | None] = {}

    def mask_gradients(self) -> None:
        """Zero the gradients of frozen weights."""
        weights = list(self._weights.values())
        self._run("mask", weights, [weight.parameter.grad for weight in weights], FrozenWeight.mask_gradient)

    def restore(self) -> None:
        """Put frozen weights back to their values, bit for bit."""
        weights = list(self._weights.values())
        self._run("restore", weights, [weight.parameter for weight in weights], FrozenWeight.restore)

    def _run(
        self,
        action: str,
        weights: Sequence[FrozenWeight],
        tensors: Sequence[Tensor | None],
        one: Callable[[FrozenWeight], None],
    ) -> None:
        """Do it to all tensors, in one launch to those that it takes."""
        if action not in self._launches and any(tensor is not None and tensor.is_cuda for tensor in tensors):
            self._launches[action] = _launch(action)
        launch = self._launches.get(action)
        if launch is None:
            for weight in weights:
                one(weight)
            return
        places = _addresses(tensors, weights)
        if places is not None and launch.repeat(places):
            return
        pairs: list[tuple[Tensor, Tensor]] = []
        for weight, tensor in zip(weights, tensors, strict=True):
            if tensor is None or not weight.frozen:
                continue
            if not tensor.is_sparse and launch.takes(piece := sharding.local(tensor), weight.values):
                pairs.append((piece, weight.values))
            else:
                one(weight)
        launch(pairs, places if len(pairs) == len(weights) else None)


def _addresses(tensors: Sequence[Tensor | None], weights: Sequence[FrozenWeight]) -> list[int] | None:
    """Where plain tensors on a GPU, and their values, are; None if they are others."""
    places = []
    for tensor, weight in zip(tensors, weights, strict=True):
        if tensor is None or not tensor.is_cuda or type(tensor) not in (Tensor, nn.Parameter) or tensor.is_sparse:
            return None
        places += [tensor.data_ptr(), weight.values.data_ptr()]
    return places


def _launch(action: str) -> Launch | None:
    try:
        from inq_lightning.kernels.cuda import Launch
    except ImportError:  # Triton comes with PyTorch on Linux only
        return None
    return Launch(action)
