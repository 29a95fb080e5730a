"""A progress bar that also tells how far the quantization is; needs the extra ``train``."""

from __future__ import annotations

import math
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import RichProgressBar

from inq_lightning.frontends.lightning.find import find_inq


class INQProgressBar(RichProgressBar):
    """Lightning's Rich progress bar with a line for the quantization, while an INQCallback is at work.

    The line shows the phase, the portion of the weights that it freezes, the batches that are done of those until all
    weights are quantized, and the time until then, measured from the speed so far. The fraction and the logger's
    version are not shown beside Lightning's bars. Its arguments are those of
    :class:`~pytorch_lightning.callbacks.RichProgressBar`.

    Raises:
        ModuleNotFoundError: rich is not installed.
    """

    _inq_task: Any = None  # the line, once training has started

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What stands beside Lightning's bars: not the fraction, which has a line, nor the version of a logger."""
        metrics = super().get_metrics(trainer, pl_module)
        return {name: value for name, value in metrics.items() if name not in ("v_num", "inq/quantized_fraction")}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with a fresh display."""
        super().on_train_start(trainer, pl_module)
        self._inq_task = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the epoch's line, and below it the quantization's."""
        if self._leave:  # a new display begins with every epoch
            self._inq_task = None
        super().on_train_epoch_start(trainer, pl_module)
        self._show(trainer, 0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move both lines on."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._show(trainer, batch_idx + 1)

    def _show(self, trainer: Trainer, batch: int) -> None:
        """Bring the line up to date, ``batch`` batches into the epoch."""
        inq = find_inq(trainer)
        if self.progress is None or self.is_disabled or inq is None:
            return
        timetable, origin = inq.quantizer.timetable, inq.quantizer.origin
        if timetable.starts is None:
            return
        if timetable.unit == "step":
            done, total = trainer.global_step - origin, float(timetable.starts[-1])
            done, total = done * trainer.accumulate_grad_batches, total * trainer.accumulate_grad_batches
        elif math.isfinite(trainer.num_training_batches):
            done = (trainer.current_epoch - origin) * int(trainer.num_training_batches) + batch
            total = timetable.starts[-1] * trainer.num_training_batches
        else:  # a stream without a known end
            done, total = batch, math.inf
        total = max(total, 1)
        portion = timetable.portions[inq.phase - 1] if inq.phase else 0.0
        text = f"INQ phase {inq.phase}/{len(timetable.portions)}: {portion:.1%}{' → 100%' if portion < 1 else ''}"
        if self._inq_task is None:
            self._inq_task = self.progress.add_task(text, total=total, completed=int(min(done, total)))
        self.progress.update(self._inq_task, description=text, total=total, completed=min(done, total))
        self.refresh()
