"""Lines of JSON about a run, for programs that follow it."""

from __future__ import annotations

from pytorch_lightning import LightningModule, Trainer

from inq_lightning.frontends.lightning.base import Callback
from inq_lightning.frontends.lightning.find import find_inq
from inq_lightning.report.run import finite, print_json


class JSONLines(Callback):
    """Prints a line of JSON for each epoch: where the quantization stands, and all metrics.

    ::

        {"event": "epoch", "stage": "quantize", "epoch": 0, "step": 24, "phase": 1, "quantized_fraction": 0.5,
         "metrics": {"train/loss": 0.03, "val/acc": 0.98}}

    Args:
        stage: What is going on, as ``"stage"`` of each line.
    """

    def __init__(self, stage: str) -> None:
        super().__init__()
        self.stage = stage

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the epoch's line."""
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        inq = find_inq(trainer)
        if trainer.is_global_zero:
            print_json(
                event="epoch",
                stage=self.stage,
                epoch=trainer.current_epoch,
                step=trainer.global_step,
                phase=inq.phase if inq else 0,
                quantized_fraction=inq.quantized_fraction if inq else 0.0,
                metrics=finite(metrics),
            )
