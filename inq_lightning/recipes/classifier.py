"""The LightningModule that `inq-train` trains: an image classifier."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from pytorch_lightning import Callback, LightningModule
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.classification import MulticlassAccuracy

from inq_lightning._common import one_of
from inq_lightning.frontends.lightning.teacher import Teacher, distill
from inq_lightning.recipes.structured import configures

LRSchedule = Literal["constant", "cosine", "onecycle"]


class Classifier(LightningModule):
    """Trains a network by SGD on cross-entropy and logs loss and accuracy.

    Logs `train/loss`, `val/loss`, `val/acc`, `test/loss` and `test/acc`, each over an epoch. All parameters share one
    weight decay, biases and batch normalization included, as in the INQ paper. The learning rate follows its schedule
    per optimizer step and holds its last value when training goes on past the end.

    Args:
        net: Maps images (batch, channels, height, width) to logits (batch, num_classes). Its weights are in the
            checkpoint, but it is no hyperparameter: pass it again to `load_from_checkpoint`.
        num_classes: Number of classes.
        lr: Highest learning rate.
        momentum: Momentum of SGD, held constant by every schedule.
        weight_decay: Weight decay of SGD.
        nesterov: Whether the momentum is Nesterov's.
        label_smoothing: Label smoothing of the training loss, in [0, 1); validation and test losses have none.
        lr_schedule: `constant`; `cosine`, from `lr` to zero; or `onecycle`, up from `lr / 25` over 30% of the steps and
            down to `lr / 250000`, both along half a cosine, as torch's OneCycleLR does by default.
        lr_epochs: Epochs that one decay lasts; None is the Trainer's whole run. INQ restarts the schedule at each
            phase, so give the epochs of one phase.
        distillation: Weight of the teacher's word in the training loss, in [0, 1]: that much of the divergence between
            the softened outputs of a teacher and of the network (Hinton et al. 2015, section 2, temperature 4), and the
            rest of the cross-entropy. The teacher is the network as it is when training begins, before INQ: the
            full-precision one, see :class:`~inq_lightning.Teacher`.
        channels_last: Whether to compute in channels-last memory format, which is faster for most convolutions.

    Raises:
        ValueError: An argument is out of its range.
    """

    def __init__(
        self,
        net: nn.Module,
        num_classes: int,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        nesterov: bool = False,
        label_smoothing: float = 0.0,
        lr_schedule: LRSchedule = "cosine",
        lr_epochs: int | None = None,
        distillation: float = 0.0,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        one_of("lr_schedule", lr_schedule, LRSchedule)
        if not lr > 0:
            raise ValueError(f"lr must be above 0; got {lr}")
        if lr_epochs is not None and lr_epochs < 1:
            raise ValueError(f"lr_epochs must be at least 1, or None for the Trainer's whole run; got {lr_epochs}")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1); got {label_smoothing}")
        if not 0 <= distillation <= 1:
            raise ValueError(f"distillation must be in [0, 1]; got {distillation}")
        self.save_hyperparameters(ignore=["net"])
        # Moving to a device and loading a checkpoint both keep the memory format, so once is enough.
        self.net: nn.Module = net.to(memory_format=torch.channels_last) if channels_last else net  # type: ignore[call-overload]
        self.val_acc = MulticlassAccuracy(num_classes, average="micro")
        self.test_acc = MulticlassAccuracy(num_classes, average="micro")
        self.lr = lr
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.nesterov = nesterov
        self.label_smoothing = label_smoothing
        self.lr_schedule = lr_schedule
        self.lr_epochs = lr_epochs
        self.distillation = distillation
        self.teacher = Teacher(distillation, network="net")
        self.channels_last = channels_last

    def forward(self, images: Tensor) -> Tensor:
        """Maps images (batch, channels, height, width) to logits (batch, num_classes)."""
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        logits: Tensor = self.net(images)
        return logits

    def configure_callbacks(self) -> list[Callback]:
        """Brings the teacher, the same one to each Trainer."""
        return [self.teacher] if self.distillation else []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Returns the training loss, a scalar, of images and int64 labels (batch,)."""
        images, labels = batch
        logits = self(images)
        loss = nn.functional.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        loss = distill(self.trainer, loss, logits, images)
        self.log("train/loss", loss, on_step=False, on_epoch=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Logs `val/loss` and `val/acc` of images and int64 labels (batch,)."""
        self._evaluate("val", self.val_acc, batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Logs `test/loss` and `test/acc` of images and int64 labels (batch,)."""
        self._evaluate("test", self.test_acc, batch)

    def _evaluate(self, stage: str, accuracy: MulticlassAccuracy, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        logits = self(images)
        accuracy.update(logits, labels)
        self.log(f"{stage}/loss", nn.functional.cross_entropy(logits, labels), batch_size=len(labels), sync_dist=True)
        self.log(f"{stage}/acc", accuracy, prog_bar=stage == "val", batch_size=len(labels))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Returns SGD and, unless the rate is constant, its schedule.

        Raises:
            ValueError: The length of the decay is unknown: neither `lr_epochs` nor the Trainer bounds it.
        """
        optimizer = torch.optim.SGD(
            self.parameters(),
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov,
        )
        if self.lr_schedule == "constant":
            return optimizer
        shape = _cosine if self.lr_schedule == "cosine" else _onecycle
        scheduler = LambdaLR(optimizer, _held(shape, self._decay_steps()))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _decay_steps(self) -> int:
        if self.lr_epochs is None:
            steps = self.trainer.estimated_stepping_batches
        else:
            self.trainer.fit_loop.setup_data()
            batches = self.trainer.num_training_batches
            steps = batches if math.isinf(batches) else math.ceil(batches / self.trainer.accumulate_grad_batches)
            steps *= self.lr_epochs
        if math.isinf(steps) or steps < 1:
            raise ValueError(
                f"lr_schedule={self.lr_schedule!r} with lr_epochs={self.lr_epochs} needs to know how many steps it "
                "lasts: set the Trainer's max_epochs or max_steps, or lr_epochs and a training set of known length, "
                "or lr_schedule='constant'"
            )
        return int(steps)


@configures(Classifier)
class ClassifierConfig:
    """Arguments of :class:`Classifier`."""


def _held(shape: Callable[[float], float], steps: int) -> Callable[[int], float]:
    """Stretches a shape over [0, 1] to a number of steps, of which the last holds from then on."""
    return lambda step: shape(min(step / steps, 1.0))


def _cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2


def _onecycle(progress: float) -> float:
    rise, start, end = 0.3, 1 / 25, 1 / 250_000
    if progress < rise:
        return start + (1 - start) * (1 - _cosine(progress / rise))
    return end + (1 - end) * _cosine((progress - rise) / (1 - rise))
