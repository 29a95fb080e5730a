"""INQ in a loop on Lightning Fabric: the loop's front end, with Fabric's wrappers, strategies and loggers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from inq_lightning.frontends.lightning import guards
from inq_lightning.frontends.loop import INQ


class FabricINQ(INQ):
    """:class:`~inq_lightning.INQ` for what ``fabric.setup`` returns.

    It is one more entry of the dict that ``fabric.save`` and ``fabric.load`` take.

    Args:
        fabric: The Fabric; its loggers get ``inq/quantized_fraction`` and ``inq/phase`` at each :meth:`advance`.
        model: The module, as ``fabric.setup`` returned it.
        optimizer: Its optimizer likewise, or a list of several.
        arguments: Those of :class:`~inq_lightning.INQ`.

    Raises:
        ValueError: The strategy shows no parameters that could be kept exact, or see :class:`~inq_lightning.INQ`.
    """

    def __init__(
        self, fabric: Any, model: nn.Module, optimizer: Optimizer | Sequence[Optimizer], **arguments: Any
    ) -> None:
        guards.check_strategy(fabric.strategy)
        optimizers: Any = [optimizer] if isinstance(optimizer, Optimizer) else optimizer
        super().__init__(_within(model), [getattr(one, "optimizer", one) for one in optimizers], **arguments)
        self._fabric = fabric

    def advance(self, now: int) -> bool:
        """Begin the phase that the schedule asks for, and log where the quantization stands."""
        began = super().advance(now)
        self._fabric.log_dict(self.quantizer.metrics(), step=now)
        return began


def _within(model: nn.Module) -> nn.Module:
    """The user's module within what Fabric and `torch.compile` have wrapped around it: its names are the plain ones."""
    inner: Any = getattr(model, "_orig_mod", model)
    own: nn.Module = inner.module if hasattr(inner, "_forward_module") else model
    return own
