"""What INQCallback costs, as ratios measured in one process: ``python -m benchmarks.overhead [--device cuda]``.

(a) and (b) alternate with what they are compared to, over the weight shapes of ResNet-18; (c) alternates step by step
within one real Trainer; (d) counts tensors; (e) compares files; (f) alternates two networks.

On a GPU (c) alternates in blocks of steps, since one step there is under way while the next is being launched, and goes
on to ResNet-50 where torchvision is there; an event's time and the moments at which the processor waits for the GPU
are counted, too.
"""

from __future__ import annotations

import argparse
import gc
import json
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

from inq_lightning import FrozenWeight, INQCallback, quantize_activations
from inq_lightning.core.together import Together
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


BLOCK = 16  # steps with the callback, then as many without, on a GPU


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    torch.manual_seed(0)
    if parser.parse_args().device == "cpu":
        on_cpu()
    elif torch.cuda.is_available():
        on_cuda()
    else:
        print("skipped: no CUDA GPU")


def on_cpu() -> None:
    print(f"ResNet-18: {len(RESNET18)} weight tensors, {NUMEL:,} weights; {torch.get_num_threads()} threads\n")
    row("(a) partition + quantize / torch.sort", event(), 0.15)
    for portion in (0.5, 0.875, 1.0):
        row(f"(b) mask + restore / SGD step, portion {portion}", step(portion), 1.0)
    ratio, _ = training_step(ResNetCIFAR(20), 128, 32, "cpu", 161)
    row("(c) ResNet-20 training step, with / without", ratio, 1.01)
    row("(d) extra bytes a weight", memory(), 2.0)
    row("(e) checkpoint growth / float32 weights", checkpoint(), 1 / 24)
    row("(f) ResNet-20 training step, activations of 8 bits / floats", activation_step(), 2.0)


def on_cuda() -> None:
    """On one card; the last line is JSON, for the page."""
    card = torch.cuda.get_device_name()
    print(f"{card}, torch {torch.__version__}\n")
    found: dict[str, Any] = {"card": card, "torch": torch.__version__}
    shapes = {"ResNet-20": [tuple(p.shape) for p in ResNetCIFAR(20).parameters() if p.dim() > 1]}
    networks: dict[str, tuple[Callable[[], nn.Module], int]] = {"ResNet-20": (lambda: ResNetCIFAR(20), 32)}
    try:
        from torchvision.models import resnet50
    except (ImportError, RuntimeError):
        print("no torchvision, no ResNet-50\n")
    else:
        shapes["ResNet-50"] = [tuple(p.shape) for p in resnet50().parameters() if p.dim() > 1]
        networks["ResNet-50"] = (resnet50, 224)
    for name, shape in shapes.items():
        first, later, sort, waits = cuda_event(shape)
        found[f"event {name}"] = {"first_ms": first, "later_ms": later, "sort_ms": sort, "waits_a_layer": waits}
        print(f"(a) {name}: first event {first:.2f} ms, a later one {later:.2f} ms, torch.sort {sort:.2f} ms")
        print(f"    waits for the GPU in a later event, a layer: {waits:.2f}")
    for fused in (False, True):
        ratio, waited = cuda_step(shapes["ResNet-50" if "ResNet-50" in shapes else "ResNet-20"], fused)
        found[f"step {'fused' if fused else 'default'}"] = {"ratio": ratio, "waits": waited}
        print(
            f"(b) mask + restore / {'fused' if fused else 'default'} SGD step, portion 0.5: {ratio:.3f}; {waited} waits"
        )
    for name, (network, size) in networks.items():
        for batch in (128, 256) if name == "ResNet-20" else (256,):
            ratio, seconds = training_step(network(), batch, size, "cuda", 4 * BLOCK if name == "ResNet-50" else 480)
            found[f"training {name} {batch}"] = {"ratio": ratio, "step_ms": 1e3 * seconds}
            print(f"(c) {name}, batch {batch}, with / without: {ratio:.4f}, of {1e3 * seconds:.2f} ms", flush=True)
    print(json.dumps(found))


def cuda_event(shapes: list[tuple[int, ...]]) -> tuple[float, float, float, float]:
    """Milliseconds of the first and of later events of a layer set and of sorting it; waits a layer in later ones."""
    first, later, sort = [], [], []
    waits = 0
    for _ in range(6):
        layers = [FrozenWeight(str(i), torch.randn(s, device="cuda") * 0.05) for i, s in enumerate(shapes)]
        tensors = [layer.parameter.detach().clone() for layer in layers]
        first.append(cuda_ms(lambda layers=layers: [layer.freeze(0.5, grid=layer.check()) for layer in layers]))
        with CountWaits() as counted:
            later.append(cuda_ms(lambda layers=layers: [layer.freeze(0.75, grid=layer.check()) for layer in layers]))
        waits = counted.number
        sort.append(cuda_ms(lambda tensors=tensors: [torch.sort(tensor.flatten()) for tensor in tensors]))
    return (*(statistics.median(times[1:]) for times in (first, later, sort)), waits / len(shapes))  # type: ignore[return-value]


def cuda_step(shapes: list[tuple[int, ...]], fused: bool) -> tuple[float, int]:
    """Masking and restoring against an SGD step of the same tensors, and how often masking and restoring wait."""
    weights = [nn.Parameter(torch.randn(s, device="cuda") * 0.05) for s in shapes]
    for p in weights:
        p.grad = torch.randn_like(p) * 1e-3
    optimizer = torch.optim.SGD(weights, lr=1e-3, momentum=0.9, weight_decay=1e-4, fused=fused)
    layers = {str(i): FrozenWeight(str(i), p) for i, p in enumerate(weights)}
    for layer in layers.values():
        layer.freeze(0.5)
    together = Together(layers)

    def mask_and_restore() -> None:
        together.mask_gradients()
        together.restore()

    mine, theirs = [], []
    for _ in range(60):
        mine.append(cuda_ms(mask_and_restore))
        theirs.append(cuda_ms(optimizer.step))
    with CountWaits() as counted:
        mask_and_restore()
    return statistics.median(mine[10:]) / statistics.median(theirs[10:]), counted.number


def cuda_ms(function: Callable[[], object]) -> float:
    """Milliseconds from when the GPU is idle until it is idle again, by CUDA events."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


class CountWaits:
    """Counts how often PyTorch makes the processor wait for the GPU."""

    number = 0

    def __enter__(self) -> CountWaits:
        self._warnings = warnings.catch_warnings(record=True)
        self._caught = self._warnings.__enter__()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        return self

    def __exit__(self, *exception: object) -> None:
        torch.cuda.set_sync_debug_mode("default")
        self.number = sum("called a synchronizing" in str(one.message) for one in self._caught or ())
        self._warnings.__exit__(*exception)  # type: ignore[arg-type]


def row(what: str, value: float, limit: float) -> None:
    print(f"{what:60s} {value:8.4f}   at most {limit:.4f}", flush=True)


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
    layers = {str(i): FrozenWeight(str(i), p) for i, p in enumerate(weights)}
    for layer in layers.values():
        layer.freeze(portion)
    together = Together(layers)

    def mask_and_restore() -> None:
        together.mask_gradients()
        together.restore()

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
    """INQCallback that does nothing in every other block of batches."""

    odd = False
    block = 1

    def on_train_batch_start(self, *args: Any) -> None:
        self.odd = args[-1] // self.block % 2 == 1
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
    """Seconds a batch, those of even and odd blocks apart."""

    def __init__(self, block: int) -> None:
        self.block = block
        self.seconds: tuple[list[float], list[float]] = ([], [])
        self.last: float | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % self.block:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.last is not None and batch_idx > 10:
            self.seconds[(batch_idx // self.block - 1) % 2].append((now - self.last) / self.block)
        self.last = now


def quiet(accelerator: str = "cpu", **options: Any) -> Trainer:
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(accelerator=accelerator, devices=1, **off, **options)


def training_step(net: nn.Module, batch: int, size: int, device: str, steps: int) -> tuple[float, float]:
    """Steps under bf16 autocast, half of the weights frozen: with the callback against without; seconds without."""
    x = torch.randn(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)
    batches = [[x, torch.randint(10, (batch,), device=device)]] * steps
    stopwatch = Stopwatch(1 if device == "cpu" else BLOCK)
    callback = EveryOtherStep(schedule={0: 0.5, 1: 1.0})
    callback.block = stopwatch.block
    trainer = quiet(
        device, max_epochs=2, precision="bf16-mixed", limit_train_batches=steps, callbacks=[stopwatch, callback]
    )
    trainer.fit(Module(net.to(memory_format=torch.channels_last)), DataLoader(batches, batch_size=None))
    with_callback, without = (statistics.median(seconds) for seconds in stopwatch.seconds)
    return with_callback / without, without


def activation_step() -> float:
    """A training step under bf16 autocast with rounded activations against one without, in alternation."""
    x, y = torch.randn(128, 3, 32, 32).to(memory_format=torch.channels_last), torch.randint(10, (128,))
    steps = []
    for rounded in (True, False):
        net: nn.Module = ResNetCIFAR(20).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if rounded:
            quantize_activations(net)
        optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)

        def step(net: nn.Module = net, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()

        steps.append(step)
    mine, theirs = medians(31, *steps)
    return mine / theirs


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
