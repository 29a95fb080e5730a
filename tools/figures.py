"""Makes the figures of docs/explanation.md from a run of the package itself: ``python tools/figures.py [FOLDER]``.

Trains a small network on the digits of scikit-learn, quantizes it to 5 bits in the paper's four phases and draws what
happened; then measures what becomes of frozen weights when only their gradients are zeroed, and prints the table.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.figure import Figure
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn

from inq_lightning import FrozenWeight, INQCallback, PowerOfTwoGrid, select_parameters
from inq_lightning.grid import Exponent
from inq_lightning.recipes.classifier import Classifier
from inq_lightning.recipes.data import DigitsDataModule
from inq_lightning.recipes.models import SmallCNN

LAYER = "net.features.8.weight"  # the third convolution, 18,432 weights
FROZEN, FREE, MSE, RULE = "#1f6feb", "#d9822b", "#8250df", "#8b949e"
EPOCHS = 16
STEPS = 100  # of the drift measurement


class Moment(NamedTuple):
    """The layer at one moment of the run."""

    phase: int
    weights: Tensor
    frozen: Tensor


class Recorder(Callback):
    """Copies the layer's weights and mask after each freeze and each batch, and the validation loss."""

    def __init__(self, inq: INQCallback) -> None:
        self.inq = inq
        self.moments: list[Moment] = []
        self.losses: list[tuple[float, float]] = []  # epochs done, validation loss: after each epoch and each freeze

    @property
    def grid(self) -> PowerOfTwoGrid:
        """The layer's grid, once its first weights are frozen."""
        layer = next(layer for layer in self.inq.layers if layer.name == LAYER)
        return PowerOfTwoGrid(layer.n1, layer.bits)

    def record(self, module: LightningModule) -> None:
        """Copy the layer as it is now."""
        weights = module.get_parameter(LAYER).detach().clone().flatten()
        self.moments.append(Moment(self.inq.phase, weights, self.inq.frozen_mask(LAYER).clone().flatten()))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After INQ's own hook: what has frozen lies on the grid."""
        if self.inq.phase > self.moments[-1].phase:
            self.record(pl_module)
            self.losses.append((trainer.current_epoch, validation_loss(pl_module)))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """After the restored update."""
        self.record(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After re-training."""
        self.losses.append((trainer.current_epoch + 1, validation_loss(pl_module)))


def main() -> None:
    """Run, measure, draw."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs" / "images"
    mpl.rcParams.update(
        {
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "svg.hashsalt": "inq",
            "figure.dpi": 110,
        }
    )
    seed_everything(0, verbose=False)
    digits = DigitsDataModule()
    model = Classifier(SmallCNN(), num_classes=10)
    trainer().fit(model, digits)
    print_errors(model.net)
    kinds: list[tuple[int, Exponent]] = [(5, "max"), (3, "max"), (3, "mse")]
    runs = {kind: quantize(copy.deepcopy(model.net), *kind, digits) for kind in kinds}
    default = runs[5, "max"]

    for name, figure in (
        ("rounding", draw_rounding()),
        ("partition", draw_partition(default.moments)),
        ("phases", draw_phases(runs)),
        ("histogram", draw_histogram(default)),
        ("drift", draw_drift(measure_drift(model.net, digits))),
    ):
        figure.savefig(folder / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
        plt.close(figure)
    animate(default, folder / "onto-the-grid.gif")


def trainer(*callbacks: Callback) -> Trainer:
    """Sixteen quiet epochs on the CPU."""
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(max_epochs=EPOCHS, accelerator="cpu", callbacks=list(callbacks), **quiet)


def quantize(net: nn.Module, bits: int, exponent: Exponent, digits: DigitsDataModule) -> Recorder:
    """Quantize a trained network and return what has been recorded."""
    module = Classifier(net, num_classes=10, lr=0.05, weight_decay=1e-3, lr_epochs=2 if bits < 5 else 4)
    recorder = Recorder(INQCallback(bits=bits, exponent=exponent, levels="paper"))
    weights = module.get_parameter(LAYER).detach().clone().flatten()
    recorder.moments.append(Moment(0, weights, torch.zeros_like(weights, dtype=torch.bool)))
    recorder.losses.append((0, validation_loss(module, digits)))
    trainer(recorder.inq, recorder).fit(module, digits)
    return recorder


def validation_loss(module: LightningModule, digits: DigitsDataModule | None = None) -> float:
    """Mean cross-entropy on the validation images, in evaluation mode."""
    data = digits or module.trainer.datamodule
    was_training = module.training
    module.eval()
    with torch.no_grad():
        losses = [nn.functional.cross_entropy(module(x), y, reduction="none") for x, y in data.val_dataloader()]
    module.train(was_training)
    return float(torch.cat(losses).mean())


def freezes(moments: list[Moment]) -> Iterator[tuple[Moment, Moment]]:
    """The moments just before and just after each phase began."""
    return ((old, new) for old, new in pairwise(moments) if new.phase > old.phase)


# ---- the grid and its rounding ---------------------------------------------------------------------------------------


def draw_rounding() -> Figure:
    """Equation 4 as a staircase, for 4 bits and n1 = 0."""
    figure, axes = plt.subplots(figsize=(7, 4))
    w = torch.linspace(0, 1.9, 20_000)
    axes.plot(w, w, color=RULE, linewidth=1, linestyle=":", label="no rounding")
    for underflow, color, style in (("nearest", FROZEN, "-"), ("truncate", FREE, "--")):
        values = PowerOfTwoGrid(0, bits=4, underflow=underflow).quantize(w).numpy().copy()
        values[1:][np.diff(values) != 0] = np.nan  # no risers
        axes.plot(w, values, style, color=color, linewidth=2.5, label=f'underflow="{underflow}"')
    levels = [2.0**-k for k in range(4)]
    axes.set_yticks([0, *levels], ["0", *(f"$2^{{{-k}}}$" if k else "$1 = 2^{n1}$" for k in range(4))])
    ticks = [1 / 16, 1 / 8, 3 / 16, 3 / 8, 3 / 4, 3 / 2]
    axes.set_xticks(ticks, ["1/16", "\n1/8", "3/16", "3/8", "3/4", "3/2"])
    for tick in ticks:
        axes.axvline(tick, color=RULE, linewidth=0.5, alpha=0.5)
    note = {"color": "#57606a", "fontsize": 9}
    axes.annotate("ties go up", (0.75, 0.5), (0.83, 0.4), arrowprops={"arrowstyle": "->", "color": RULE}, **note)
    axes.annotate("beyond: saturation", (1.6, 1.0), (1.32, 0.8), arrowprops={"arrowstyle": "->", "color": RULE}, **note)
    axes.set(xlabel="|w|", ylabel="level", xlim=(0, 1.9), ylim=(-0.04, 1.25))
    axes.legend(frameon=False, loc="lower right")
    return figure


def print_errors(net: nn.Module) -> None:
    """Squared error of rounding all weights at once, relative to their squares: by bits and choice of n1."""
    weights = [selected.parameter.detach() for selected in select_parameters(net)]
    power = sum(float(w.double().square().sum()) for w in weights)
    rules: list[Exponent] = ["max", "mse"]
    print("| bits | max | mse |")
    print("|---:|---:|---:|")
    for bits in (2, 3, 4, 5):
        errors = [
            sum(PowerOfTwoGrid.from_weights(w, bits, exponent=exponent).squared_error(w) for w in weights) / power
            for exponent in rules
        ]
        print(f"| {bits} | {errors[0]:.3f} | {errors[1]:.3f} |")


# ---- the run ---------------------------------------------------------------------------------------------------------


def draw_partition(moments: list[Moment]) -> Figure:
    """Magnitudes at each freeze, coloured by the phase that took them."""
    figure, axes = plt.subplots(1, 4, figsize=(9, 2.8), sharey=True)
    for ax, (old, new) in zip(axes, freezes(moments), strict=True):
        order = old.weights.abs().argsort(descending=True)[:: len(old.weights) // 300]
        now = (new.frozen & ~old.frozen)[order]
        rank = np.linspace(0, 1, len(order))
        magnitude = old.weights.abs()[order]
        for chosen, color, label in (
            (old.frozen[order], RULE, "frozen before"),
            (now, FROZEN, "freezes now"),
            (~new.frozen[order], FREE, "stays free"),
        ):
            ax.scatter(rank[chosen], magnitude[chosen], s=3, color=color, label=label)
        share = float(new.frozen.double().mean())
        ax.set(title=f"phase {new.phase}: {share:.1%}", yscale="log", ylim=(2**-13, 1), xlabel="rank by magnitude")
        ax.set_xticks([0, 1], ["largest", "smallest"])
    axes[0].set_ylabel("|w|")
    axes[-1].legend(frameon=False, markerscale=3, loc="lower left", fontsize=8)
    figure.tight_layout()
    return figure


def draw_phases(runs: dict[tuple[int, Exponent], Recorder]) -> Figure:
    """Portion and validation loss over the epochs: up when weights are rounded, down when the others make up for it."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 4), sharex=True, height_ratios=[1, 1.6])
    for ((bits, exponent), recorder), color in zip(runs.items(), (FROZEN, FREE, MSE), strict=True):
        schedule = recorder.inq.schedule.spread(EPOCHS)
        portions = [schedule.portion_at(epoch) for epoch in range(EPOCHS)]
        top.step(range(EPOCHS + 1), [*portions, portions[-1]], where="post", color=color, linewidth=2)
        epochs, losses = zip(*recorder.losses, strict=True)
        bottom.plot(epochs, losses, "o-", color=color, markersize=3, label=f'{bits} bits, exponent="{exponent}"')
    top.set(ylabel="portion", ylim=(0, 1.08))
    bottom.set(ylabel="validation loss", xlabel="epochs done", ylim=(0, None))
    bottom.legend(frameon=False, loc="lower center", ncols=3, fontsize=8)
    return figure


def draw_histogram(run: Recorder) -> Figure:
    """The layer's weights on the exponent axis: before, in the middle, at the end."""
    moments, grid = run.moments, run.grid
    middle = [moment for moment in moments if moment.phase == 2][-1]
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.8), sharey=True)
    for ax, moment, title in zip(
        axes, (moments[0], middle, moments[-1]), ("before", "end of phase 2", "fully quantized"), strict=True
    ):
        place = height(moment.weights, grid).numpy()
        bins = np.arange(grid.n2 - 2.125, grid.n1 + 1.5, 0.25)  # four to an octave, with the levels in the middle
        frozen = moment.frozen.numpy()
        ax.hist(
            [place[frozen], place[~frozen]],
            bins,
            stacked=True,
            color=[FROZEN, FREE],
            label=["frozen", "free"],
            log=True,
        )
        ax.set(title=title, xlabel="log2 |w|")
        ax.set_xticks([grid.n2 - 2, *range(grid.n2, grid.n1 + 1)], ["0", *map(str, range(grid.n2, grid.n1 + 1))])
        ax.tick_params(axis="x", labelsize=8)
    axes[0].set_ylabel("weights")
    axes[1].legend(frameon=False, loc="upper left", fontsize=8)
    figure.tight_layout()
    return figure


def height(weights: Tensor, grid: PowerOfTwoGrid) -> Tensor:
    """log2 |w|, with zero and what is far below the grid two octaves under the smallest level."""
    return weights.abs().clamp_min(1e-30).log2().clamp_min(grid.n2 - 2)


# ---- what freezing takes ---------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "SGD, weight decay 1e-3": lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=1e-3),
    "SGD, momentum 0.9": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "AdamW, weight decay 0.01": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.01),
}


def measure_drift(trained: nn.Module, digits: DigitsDataModule) -> dict[str, list[float]]:
    """Freeze half of the layer, train on with zeroed gradients, and see how far frozen weights move."""
    digits.setup("fit")
    batches = list(islice(cycle(list(digits.train_dataloader())), 20 + STEPS))
    drifts = {}
    print(f"| optimizer | moved, gradients zeroed | mean drift after {STEPS} steps | moved, values restored |")
    print("|---|---:|---:|---:|")
    for name, make in OPTIMIZERS.items():
        drift, moved, frozen = drift_of(copy.deepcopy(trained), make, batches, restore=False)
        _, kept, _ = drift_of(copy.deepcopy(trained), make, batches, restore=True)
        drifts[name] = drift
        print(f"| {name} | {moved:,} of {frozen:,} | {drift[-1]:.2%} | {kept} |")
    return drifts


def drift_of(
    net: nn.Module, make: Callable[[Any], torch.optim.Optimizer], batches: list[tuple[Tensor, Tensor]], restore: bool
) -> tuple[list[float], int, int]:
    """Mean relative change of frozen weights after each step, zeros left out; how many moved; how many there are."""
    optimizer = make(net.parameters())
    layer = FrozenWeight(LAYER, net.get_parameter(LAYER.removeprefix("net.")))
    values, drift = torch.empty(0), []
    for step, (images, labels) in enumerate(batches):
        if step == len(batches) - STEPS:  # by now the optimizer has its momentum
            layer.freeze(0.5)
            values = layer.parameter.detach()[layer.mask]
        loss = nn.functional.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        layer.mask_gradient()
        optimizer.step()
        if restore:
            layer.restore()
        if layer.frozen:
            change = (layer.parameter.detach()[layer.mask] - values).abs() / values.abs()
            drift.append(float(change[values != 0].mean()))
    return drift, layer.drifted(), layer.frozen


def draw_drift(drifts: dict[str, list[float]]) -> Figure:
    """How far frozen weights move when only their gradients are zeroed."""
    figure, axes = plt.subplots(figsize=(7, 3.2))
    for (name, drift), color in zip(drifts.items(), ("#57606a", FREE, FROZEN, "#8250df"), strict=True):
        axes.plot(range(1, len(drift) + 1), np.array(drift) * 100, color=color, linewidth=2, label=name)
    axes.set_yscale("symlog", linthresh=1e-3)
    axes.set(xlabel="steps after freezing", ylabel="mean change of a\nfrozen weight, %", ylim=(-2e-4, None))
    axes.legend(frameon=False, fontsize=9, bbox_to_anchor=(1, 0.5), loc="center left")
    return figure


# ---- the animation ---------------------------------------------------------------------------------------------------


def animate(run: Recorder, path: Path) -> None:
    """The weights on their way to the grid: they jump when a phase begins, and the free ones train on between."""
    moments, grid = run.moments, run.grid
    chosen = moments[0].weights.abs().argsort()[:: len(moments[0].weights) // 500]
    frames: list[Moment] = [moments[0]] * 6
    for old, new in freezes(moments):
        frames += [old] + [tween(old, new, k / 6, grid) for k in range(1, 6)] + [new] * 3
        phase = [moment for moment in moments if moment.phase == new.phase]
        frames += phase[:: len(phase) // 9]
    frames += [moments[-1]] * 12

    figure, axes = plt.subplots(figsize=(6.4, 3.8), dpi=100)
    axes.set(xlabel="weights of one layer, by magnitude before", ylabel="|w|", xlim=(-0.01, 1.01))
    axes.set_ylim(grid.n2 - 2.5, grid.n1 + 1)
    axes.set_xticks([0, 1], ["smallest", "largest"])
    axes.set_yticks([grid.n2 - 2, *range(grid.n2, grid.n1 + 1)])
    axes.set_yticklabels(["0", *(f"$2^{{{k}}}$" for k in range(grid.n2, grid.n1 + 1))])
    for level in (grid.n2 - 2, *range(grid.n2, grid.n1 + 1)):
        axes.axhline(level, color=RULE, linewidth=0.6, alpha=0.6, zorder=0)
    dots = axes.scatter([], [], s=7, linewidths=0)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    colors = np.array([mpl.colors.to_rgba(FREE), mpl.colors.to_rgba(FROZEN)])

    def show(frame: Moment) -> None:
        place = frame.weights if frame.weights.dtype is torch.float64 else height(frame.weights, grid)
        dots.set_offsets(np.stack([np.linspace(0, 1, len(chosen)), place[chosen].numpy()], 1))
        dots.set_facecolors(colors[frame.frozen[chosen].long()])
        share = float(frame.frozen.double().mean())
        axes.set_title(f"phase {frame.phase} of 4: {share:.1%} frozen" if frame.phase else "before quantization")

    FuncAnimation(figure, show, frames, cache_frame_data=False).save(path, PillowWriter(fps=10))
    plt.close(figure)
    shrink(path)


def tween(old: Moment, new: Moment, share: float, grid: PowerOfTwoGrid) -> Moment:
    """Between two moments, already on the logarithmic axis (float64 marks that)."""
    place = height(old.weights, grid).lerp(height(new.weights, grid), share)
    return Moment(new.phase, place.double(), new.frozen)


def shrink(path: Path) -> None:
    """Rewrite a GIF with 32 colours, which halves it."""
    from PIL import Image, ImageSequence

    with Image.open(path) as image:
        duration = image.info["duration"]
        frames = [frame.convert("RGB").quantize(32) for frame in ImageSequence.Iterator(image)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=duration, loop=0, optimize=True)


if __name__ == "__main__":
    main()
