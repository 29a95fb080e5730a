"""Makes the figure of docs/how-to/learning-rate.md: ``python tools/learning_rates.py [FOLDER]``.

Trains a layer with usual learning-rate schedules, without INQ and with it, and draws the rate of every step.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import DataLoader, TensorDataset

from inq_lightning import INQCallback, phase_length

WITH, WITHOUT, RULE = "#1f6feb", "#8b949e", "#d0d7de"
EPOCHS, BATCHES, PHASES = 16, 25, 4


class Example(NamedTuple):
    """One schedule as a script would make it: ``make`` takes the optimizer and the Trainer."""

    title: str
    interval: str
    make: Callable[[SGD, Any], Any]


def warm_up(optimizer: SGD, trainer: Any) -> Any:
    """Two epochs up, the others down along a cosine."""
    up = schedulers.LinearLR(optimizer, 0.05, total_iters=2)
    down = schedulers.CosineAnnealingLR(optimizer, trainer.max_epochs - 2)
    return schedulers.SequentialLR(optimizer, [up, down], [2])


EXAMPLES = [
    Example(
        "OneCycleLR over the whole run, by steps",
        "step",
        lambda o, t: schedulers.OneCycleLR(o, 0.1, total_steps=t.estimated_stepping_batches),
    ),
    Example("warm-up, then CosineAnnealingLR, by epochs", "epoch", warm_up),
    Example("MultiStepLR over the whole run", "epoch", lambda o, t: schedulers.MultiStepLR(o, [8, 12], 0.3)),
    Example(
        "CosineAnnealingLR over one phase, by steps",
        "step",
        lambda o, t: schedulers.CosineAnnealingLR(o, phase_length(t)),
    ),
    Example("ExponentialLR", "epoch", lambda o, t: schedulers.ExponentialLR(o, 0.8)),
]


class Layer(LightningModule):
    """One layer, and the learning rate of each of its steps."""

    def __init__(self, example: Example) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.example = example
        self.rates: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Note the rate."""
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        """SGD with the example's schedule."""
        optimizer = SGD(self.parameters(), 0.1)
        scheduler = self.example.make(optimizer, self.trainer)
        return [optimizer], [{"scheduler": scheduler, "interval": self.example.interval}]

    def train_dataloader(self) -> DataLoader[Any]:
        """The batches of an epoch."""
        return DataLoader(TensorDataset(torch.ones(BATCHES, 4)), batch_size=1)


def rates(example: Example, *callbacks: INQCallback) -> list[float]:
    """The learning rate of each step of a run."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    module = Layer(example)
    Trainer(max_epochs=EPOCHS, accelerator="cpu", callbacks=list(callbacks), **quiet).fit(module)
    return module.rates


def draw(axes: Axes, example: Example) -> None:
    """The rates without INQ, and with it."""
    for begin in range(0, EPOCHS, EPOCHS // PHASES):
        axes.axvline(begin, color=RULE, linewidth=1, zorder=0)
    epochs = [step / BATCHES for step in range(EPOCHS * BATCHES)]
    axes.plot(epochs, rates(example), color=WITHOUT, linewidth=1.6, label="without INQ")
    axes.plot(epochs, rates(example, INQCallback()), color=WITH, linewidth=1.6, label="with INQ")
    axes.set_title(example.title, fontsize=10, loc="left")
    axes.set(xlim=(0, EPOCHS), ylim=(0, 0.108), yticks=[0, 0.05, 0.1])


def main() -> None:
    """Run and draw."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs" / "images"
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "inq"}
    mpl.rcParams.update(style)
    figure, all_axes = plt.subplots(len(EXAMPLES), figsize=(7, 1.55 * len(EXAMPLES)), sharex=True)
    for axes, example in zip(all_axes, EXAMPLES, strict=True):
        draw(axes, example)
    all_axes[0].legend(frameon=False, fontsize=9, bbox_to_anchor=(1, 1.35), loc="upper right", ncols=2)
    all_axes[-1].set(xlabel="epoch; a phase begins at each line", xticks=range(0, EPOCHS + 1, 4))
    figure.supylabel("learning rate", fontsize=10)
    figure.tight_layout(h_pad=0.6)
    figure.savefig(folder / "learning-rate.svg", bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()
