"""The network as it was before INQ as a teacher of the one that is quantized (Hinton et al. 2015, section 2)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn

from inq_lightning.core import sharding
from inq_lightning.frontends.lightning.base import Callback, callbacks_of


def soft_divergence(output: Tensor, target: Tensor, temperature: float = 4.0) -> Tensor:
    """Kullback-Leibler divergence between softened outputs, with gradients of the cross-entropy's size: a scalar.

    Args:
        output: Logits (batch, classes, ...) of the network.
        target: The teacher's, of the same shape.
        temperature: What both are divided by.
    """
    own, taught = ((logits / temperature).log_softmax(1) for logits in (output, target))
    return temperature**2 * nn.functional.kl_div(own, taught, reduction="batchmean", log_target=True)


class Teacher(Callback):
    """Keeps a copy of the network as it is when training begins; :func:`distill` makes it teach.

    Put it beside an :class:`~inq_lightning.INQCallback`, and the teacher is the full-precision network. Checkpoints
    carry its weights, so that a resumed run goes on with the same one; those of weights alone do not. In DDP each
    process has its copy.

    Args:
        weight: Share of the teacher's word in the loss, in [0, 1]; the labels have the rest.
        network: Name of the submodule that :func:`distill` is given inputs and outputs of; left out, it is the
            LightningModule and its own forward.
        divergence: Maps the outputs of network and teacher to a scalar loss. That of classifiers by default; for a
            regression ``torch.nn.functional.mse_loss``.

    Attributes:
        teacher: The copy, in evaluation mode and without gradients; None before training.

    Raises:
        ValueError: ``weight`` is out of range.
    """

    def __init__(
        self, weight: float = 0.7, *, network: str = "", divergence: Callable[[Any, Any], Tensor] = soft_divergence
    ) -> None:
        super().__init__()
        if not 0 <= weight <= 1:
            raise ValueError(f"weight is the teacher's share of the loss, in [0, 1]; got {weight}")
        self.weight = weight
        self.network = network
        self.divergence = divergence
        self.teacher: nn.Module | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy the network, unless training resumes with the teacher that a checkpoint carries.

        Raises:
            ValueError: Its parameters are sharded, so that no process has a whole copy, or there is no ``network``.
        """
        if any(sharding.is_sharded(parameter) for parameter in pl_module.parameters()):
            raise ValueError("Teacher copies whole networks, and this one is sharded; train it with strategy='ddp'")
        if trainer.ckpt_path is None or self.teacher is None:
            self.teacher = self._copy(pl_module)
        self.teacher.to(pl_module.device)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the teacher's weights, under ``teacher``."""
        if self.teacher is not None:
            checkpoint["teacher"] = self.teacher.state_dict()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take up the teacher's weights.

        Raises:
            ValueError: There is no ``network``.
        """
        if "teacher" in checkpoint:
            self.teacher = self._copy(pl_module)
            self.teacher.load_state_dict(checkpoint["teacher"])

    def _copy(self, pl_module: LightningModule) -> nn.Module:
        try:
            network = pl_module.get_submodule(self.network)
        except AttributeError:
            names = ", ".join(name for name, _ in pl_module.named_children())
            raise ValueError(
                f"Teacher(network={self.network!r}) names no submodule of {type(pl_module).__name__}, which has {names}"
            ) from None
        return copy.deepcopy(network).eval().requires_grad_(False)


def distill(trainer: Trainer, loss: Tensor, output: Any, *inputs: Any, **named: Any) -> Tensor:
    """Blend the teacher's word into a loss, in ``training_step``; without a :class:`Teacher` the loss is what it was.

    Args:
        trainer: The module's Trainer.
        loss: Of the labels, a scalar.
        output: What the network made of its inputs.
        *inputs: The network's arguments, which the teacher gets, too.
        **named: Those by name.

    Returns:
        The loss to train on, a scalar.
    """
    for callback in callbacks_of(trainer):
        if isinstance(callback, Teacher) and callback.teacher is not None:
            with torch.no_grad():
                target = callback.teacher(*inputs, **named)
            loss = (1 - callback.weight) * loss + callback.weight * callback.divergence(output, target)
    return loss
