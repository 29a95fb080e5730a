"""What INQCallback costs, as ratios measured in one process: ``python -m benchmarks.overhead``.

(a) and (b) alternate with what they are compared to, over the weight shapes of ResNet-18; (c) alternates step by step
within one real Trainer; (d) counts tensors; (e) compares files.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from inq_lightning import FrozenWeight, INQCallback
from inq_lightning.recipes.models import ResNetCIFAR

warnings.filterwarnings("ignore")

RESNET18 = (
    [(64, 3, 7, 7)]
    + [(64, 64, 3, 3)] * 4
    + [(128, 64, 3, 3), (128, 64, 1, 1)]
    + [(128, 128, 3, 3)] * 3
    + [(256, 128, 3, 3), (256, 128, 1, 1)]
    + [(256, 256, 3, 3)] * 3
    + [(512, 256, 3, 3), (512, 256, 1, 1)]
    + [(512, 512, 3, 3)] * 3
    + [(1000, 512)]
)
NUMEL = sum(torch.Size(shape).numel() for shape in RESNET18)


def main() -> None:
    torch.manual_seed(0)
    print(f"ResNet-18: {len(RESNET18)} weight tensors, {NUMEL:,} weights; {torch.get_num_threads()} threads\n")
    row("(a) partition + quantize / torch.sort", event(), 0.15)
    for portion in (0.5, 0.875, 1.0):
        row(f"(b) mask + restore / SGD step, portion {portion}", step(portion), 1.0)
    row("(c) ResNet-20 training step, with / without", training_step(), 1.01)
    row("(d) extra bytes a weight", memory(), 2.0)
    row("(e) checkpoint growth / float32 weights", checkpoint(), 1 / 24)


def row(what: str, value: float, limit: float) -> None:
    print(f"{what:50s} {value:8.4f}   at most {limit:.4f}", flush=True)


def medians(rounds: int, *functions: Callable[[], object]) -> list[float]:
    """Median seconds of each function, called in turn."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds + 2):
        for function, seconds in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds[2:]) for seconds in times]


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape) * 0.05) for shape in RESNET18]


def event() -> float:
    """One phase of freshly trained weights, half of them frozen, against sorting the same tensors."""
    originals = [p.detach() for p in parameters()]
    layers: list[FrozenWeight] = []

    def freeze() -> None:
        for layer in layers:
            layer.freeze(0.5)

    def sort() -> None:
        for tensor in originals:
            torch.sort(tensor.flatten())

    ratios = []
    for _ in range(9):
        layers[:] = [FrozenWeight(str(i), w.clone()) for i, w in enumerate(originals)]
        start = time.perf_counter()
        freeze()
        middle = time.perf_counter()
        sort()
        ratios.append((middle - start) / (time.perf_counter() - middle))
    return statistics.median(ratios[1:])


def step(portion: float) -> float:
    """Masking all gradients and restoring all weights, against the default optimizer step of the same tensors."""
    weights = parameters()
    for p in weights:
        p.grad = torch.randn_like(p) * 1e-3
    optimizer = torch.optim.SGD(weights, lr=1e-3, momentum=0.9, weight_decay=1e-4)
    layers = [FrozenWeight(str(i), p) for i, p in enumerate(weights)]
    for layer in layers:
        layer.freeze(portion)

    def mask_and_restore() -> None:
        for layer in layers:
            layer.mask_gradient()
        for layer in layers:
            layer.restore()

    mine, theirs = medians(101, mask_and_restore, optimizer.step)
    return mine / theirs


class Module(LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # Without a rate nothing moves in the batches that the callback leaves out, which it would find and put right.
        return torch.optim.SGD(self.parameters(), lr=0.0, momentum=0.9, weight_decay=1e-4)


class EveryOtherStep(INQCallback):
    """INQCallback that does nothing at odd batches."""

    odd = False

    def on_train_batch_start(self, *args: Any) -> None:
        self.odd = args[-1] % 2 == 1
        if not self.odd:
            super().on_train_batch_start(*args)

    def on_after_backward(self, *args: Any) -> None:
        if not self.odd:
            super().on_after_backward(*args)

    def on_train_start(self, *args: Any) -> None:
        restore = self.quantizer.restore
        self.quantizer.restore = lambda: None if self.odd else restore()  # type: ignore[method-assign]
        super().on_train_start(*args)

    def on_train_batch_end(self, *args: Any) -> None:
        if not self.odd:
            super().on_train_batch_end(*args)


class Stopwatch(Callback):
    """Seconds from batch to batch, even and odd ones apart."""

    def __init__(self) -> None:
        self.seconds: tuple[list[float], list[float]] = ([], [])
        self.last: float | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        now = time.perf_counter()
        if self.last is not None and batch_idx > 10:
            self.seconds[(batch_idx - 1) % 2].append(now - self.last)
        self.last = now


def quiet(**options: Any) -> Trainer:
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(accelerator="cpu", **off, **options)


def training_step() -> float:
    """Steps of ResNet-20 at batch 128 under bf16 autocast, half of the weights frozen."""
    net = ResNetCIFAR(20).to(memory_format=torch.channels_last)
    x = torch.randn(128, 3, 32, 32).to(memory_format=torch.channels_last)
    batches = [[x, torch.randint(10, (128,))]] * 161
    stopwatch = Stopwatch()
    callback = EveryOtherStep(schedule={0: 0.5, 1: 1.0})
    trainer = quiet(max_epochs=2, precision="bf16-mixed", limit_train_batches=161, callbacks=[stopwatch, callback])
    trainer.fit(Module(net), DataLoader(batches, batch_size=None))
    with_callback, without = (statistics.median(seconds) for seconds in stopwatch.seconds)
    return with_callback / without


def memory() -> float:
    """Bytes of the tensors that the callback's records keep alive."""
    weights = parameters()
    layers = [FrozenWeight(str(i), p) for i, p in enumerate(weights)]
    before = tensors()
    for layer in layers:
        layer.freeze(0.5)
    after = tensors()
    kept = sum(after.values()) - sum(before.values())
    own = sum(layer._values.untyped_storage().nbytes() for layer in layers)
    return max(own, own + kept) / NUMEL


def tensors() -> dict[int, int]:
    """Bytes of every storage that is alive."""
    gc.collect()
    storages = (o.untyped_storage() for o in gc.get_objects() if isinstance(o, Tensor))
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def checkpoint() -> float:
    """A Trainer's checkpoint file with the callback's state, less the one without."""

    class Weights(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                nn.Conv2d(s[1], s[0], s[2], bias=False) if len(s) == 4 else nn.Linear(s[1], s[0], bias=False)
                for s in RESNET18
            )

        def forward(self, x: Tensor) -> Tensor:
            return sum(layer.weight.sum() for layer in self.layers) * x.mean()  # type: ignore[union-attr]

    class Sum(Module):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return self.net(batch[0]) * 1e-6

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-6)

    sizes = []
    with tempfile.TemporaryDirectory() as folder:
        for callbacks in ([], [INQCallback(schedule={0: 0.5, 1: 1.0})]):
            trainer = quiet(max_epochs=2, callbacks=callbacks)
            trainer.fit(Sum(Weights()), DataLoader([[torch.ones(1)]], batch_size=None))
            path = Path(folder) / "checkpoint.ckpt"
            trainer.save_checkpoint(path, weights_only=False)
            sizes.append(path.stat().st_size)
    return (sizes[1] - sizes[0]) / (4 * NUMEL)


if __name__ == "__main__":
    main()
