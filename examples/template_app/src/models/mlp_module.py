"""The network's training."""

from collections.abc import Callable
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy


class MLPModule(LightningModule):
    """A classifier whose optimizer and scheduler come from the config."""

    def __init__(
        self, net: nn.Module, optimizer: Callable[..., torch.optim.Optimizer], scheduler: Callable[..., Any]
    ) -> None:
        super().__init__()
        self.net = net
        self.optimizer, self.scheduler = optimizer, scheduler
        self.val_acc = MulticlassAccuracy(10)
        self.test_acc = MulticlassAccuracy(10)

    def step(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, predictions and targets."""
        x, y = batch
        logits = self.net(x)
        return nn.functional.cross_entropy(logits, y), logits.argmax(1), y

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Log and return the loss."""
        loss, _, _ = self.step(batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log loss and accuracy."""
        loss, predictions, y = self.step(batch)
        self.val_acc(predictions, y)
        self.log("val/loss", loss)
        self.log("val/acc", self.val_acc)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the accuracy."""
        _, predictions, y = self.step(batch)
        self.test_acc(predictions, y)
        self.log("test/acc", self.test_acc)

    def configure_optimizers(self) -> dict[str, Any]:
        """Build them from what the config describes."""
        optimizer = self.optimizer(params=self.parameters())
        scheduler = self.scheduler(optimizer=optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val/loss"}}
