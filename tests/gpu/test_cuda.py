"""What needs a CUDA GPU. Everything here equals, bit for bit, what the CPU does, unless it says otherwise."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from support import same_bits
from torch import Tensor, nn
from torch.utils.data import DataLoader

from inq_lightning import (
    FrozenWeight,
    INQCallback,
    INQMonitor,
    Levels,
    PowerOfTwoGrid,
    export_onnx,
    load_packed,
    quantize,
    save_packed,
    to_packed,
)
from inq_lightning.core.frozen import unpack_mask
from inq_lightning.core.partition import scores, select
from inq_lightning.core.together import Together
from inq_lightning.kernels import ReferenceKernel
from inq_lightning.recipes.data import NpzDataModule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU"),
]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SHAPES = [(), (1,), (7,), (0, 4), (16, 3, 3, 3), (512, 1031)]
LEVELS = ["paper", "full", "dense", Levels(False, (0, 3))]
SCHEDULE = {0: 0.5, 1: 0.75, 2: 1.0}


def random(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05).to(dtype)


# ---- grid, partition, frozen weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("levels", LEVELS, ids=str)
@pytest.mark.parametrize("exponent", ["max", "mse"])
def test_a_grid_fits_rounds_and_codes_as_on_the_cpu(exponent: str, levels: Any, dtype: torch.dtype) -> None:
    for bits in (2, 3, 5):
        for seed in range(4):
            w = random((64, 37), dtype, seed)
            if isinstance(levels, Levels) and levels.bits > bits:
                continue
            cpu, gpu = (
                PowerOfTwoGrid.from_weights(x, bits, exponent=exponent, family=levels)  # type: ignore[arg-type]
                for x in (w, w.cuda())
            )
            assert cpu == gpu
            assert same_bits(cpu.quantize(w), gpu.quantize(w.cuda()).cpu())
            codes = gpu.encode(w.cuda())
            assert torch.equal(cpu.encode(w), codes.cpu())
            assert same_bits(cpu.decode(cpu.encode(w), dtype), gpu.decode(codes, dtype).cpu())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("partition", ["magnitude", "random"])
def test_the_same_weights_are_chosen_ties_included(partition: str, dtype: torch.dtype) -> None:
    for seed, shape in enumerate([(50,), (64, 37), (300, 700)]):
        w = random(shape, dtype, seed).mul(8).round().div(8) if seed % 2 else random(shape, dtype, seed)
        free = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.7
        order = scores(w, partition, "w", 3)  # type: ignore[arg-type]
        assert same_bits(order, scores(w.cuda(), partition, "w", 3).cpu())  # type: ignore[arg-type]
        for share in (0.0, 0.1, 0.5, 1.0):
            count = round(share * int(free.sum()))
            assert torch.equal(select(order, free, count), select(order.cuda(), free.cuda(), count).cpu())


def frozen_values(shape: tuple[int, ...], seed: int) -> Tensor:
    """As FrozenWeight keeps them: +0.0 is free, -0.0 frozen at zero."""
    values = PowerOfTwoGrid(0, 4).quantize(random(shape, seed=seed) * 20).to(torch.bfloat16)
    free = torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1)) < 0.5
    return torch.where(free, 0.0, torch.where(values == 0, -0.0, values))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("action", ["mask", "restore"])
def test_one_launch_does_what_the_reference_does_to_each_tensor(action: str, dtype: torch.dtype) -> None:
    from inq_lightning.kernels.cuda import Launch

    launch = Launch(action)
    for seed in range(3):  # new addresses each time
        values = [frozen_values(shape, seed) for shape in SHAPES]
        special = torch.tensor([torch.inf, -0.0, 0.0, 1e-40, *([torch.nan] if action == "mask" else [])])
        here = [random(shape, dtype, seed + 2) for shape in SHAPES]
        for tensor in here:
            pick = torch.randint(0, 4 * len(special), tensor.shape, generator=torch.Generator().manual_seed(seed))
            tensor.copy_(torch.where(pick < len(special), special[pick % len(special)].to(dtype), tensor))
        there = [tensor.cuda() for tensor in here]
        held = [v.cuda() for v in values]
        launch(list(zip(there, held, strict=True)))
        for tensor, v, moved in zip(here, values, there, strict=True):
            reference = ReferenceKernel(v)
            reference.mask_gradient(tensor) if action == "mask" else reference.restore(tensor)
            assert same_bits(tensor, moved.cpu())


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("levels", LEVELS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_freezing_in_phases_equals_the_cpu(dtype: torch.dtype, levels: Any, channels_last: bool) -> None:
    w = random((32, 16, 3, 3), dtype)
    g = w.cuda()
    if channels_last:
        g = g.to(memory_format=torch.channels_last)
    cpu, gpu = FrozenWeight("w", w, 3, levels=levels), FrozenWeight("w", g, 3, levels=levels)
    for phase, portion in enumerate((0.3, 0.7, 1.0)):
        here, there = cpu.freeze(portion), gpu.freeze(portion)
        assert tuple(there) == pytest.approx(tuple(here), rel=1e-9)
        for side, weight in ((cpu, w), (gpu, g)):
            weight.add_(random((32, 16, 3, 3), dtype, phase).to(weight.device))  # an optimizer's step
            side.restore()
        assert same_bits(w, g.cpu())
        assert torch.equal(cpu.mask, gpu.mask.cpu())
        assert gpu.drifted() == 0
    assert cpu.grid == gpu.grid


def test_a_step_never_waits_for_the_gpu() -> None:
    weights = [random(shape).cuda() for shape in [(64, 64), (10, 3, 3, 3)]]
    layers = {str(i): FrozenWeight(str(i), w) for i, w in enumerate(weights)}
    for layer in layers.values():
        layer.parameter.grad = torch.ones_like(layer.parameter)
        layer.freeze(0.5)
    together = Together(layers)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        together.mask_gradients()
        together.restore()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_runs_in_a_cuda_graph() -> None:
    w = random((64, 64)).cuda()
    layer = FrozenWeight("w", w, 3)
    layer.freeze(0.5)
    want = w.clone()
    w.grad = torch.ones_like(w)
    together = Together({"w": layer})
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        together.mask_gradients()
        together.restore()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        together.mask_gradients()
        w.sub_(w.grad, alpha=0.1)
        together.restore()
    w.grad.fill_(1.0)
    w.copy_(want)
    graph.replay()
    torch.cuda.synchronize()
    mask = layer.mask
    assert same_bits(w[mask], want[mask])
    assert torch.equal(w[~mask], want[~mask] - 0.1)
    assert not w.grad[mask].any()


# ---- the callback in a Trainer ---------------------------------------------------------------------------------------


class Module(LightningModule):
    def __init__(self, optimizer: str = "sgd", compiled: bool = False, channels_last: bool = False, **options: Any):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2), nn.ReLU(),
            nn.Flatten(), nn.Linear(16 * 9, 10),
        )  # fmt: skip
        if channels_last:
            self.net = self.net.to(memory_format=torch.channels_last)
        self.forward_net = torch.compile(self.net) if compiled else self.net
        self.kind, self.options = optimizer, options

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.forward_net(batch[0]).float(), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]).float(), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.kind == "sgd":
            return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9, weight_decay=1e-3, **self.options)
        return torch.optim.AdamW(self.parameters(), 1e-3, **self.options)


def data(count: int = 64) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(count, 3, 8, 8, generator=generator)
    y = torch.randint(10, (count,), generator=generator)
    return DataLoader([(x[i : i + 16], y[i : i + 16]) for i in range(0, count, 16)], batch_size=None)  # type: ignore[arg-type]


def gpu_trainer(*callbacks: Any, **options: Any) -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    defaults = {"accelerator": "gpu", "devices": 1, "max_epochs": 3}
    return Trainer(**quiet | defaults | options, callbacks=list(callbacks))


def check_on_grid(module: Module, callback: INQCallback) -> None:
    assert callback.quantized_fraction == 1.0
    parameters = dict(module.named_parameters())
    for layer in callback.layers:
        weight = parameters[layer.name].detach().cpu()
        assert layer.grid is not None
        assert same_bits(layer.grid.quantize(weight), weight), layer.name


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])
@pytest.mark.parametrize(
    "module",
    [
        {},
        {"foreach": True},
        {"fused": True},
        {"optimizer": "adamw", "fused": True},
        {"optimizer": "adamw", "capturable": True},
        {"channels_last": True},
    ],
    ids=str,
)
def test_everything_ends_on_its_grid(module: dict[str, Any], precision: Any) -> None:
    net, callback = Module(**module), INQCallback(bits=3, schedule=SCHEDULE)
    clip = (
        {} if module.get("fused") and "mixed" in precision else {"gradient_clip_val": 1.0}
    )  # Lightning clips no gradients that a fused step unscales
    gpu_trainer(callback, precision=precision, **clip).fit(net, data())
    check_on_grid(net, callback)


@pytest.mark.parametrize("levels", ["paper", "dense"])
def test_frozen_weights_stay_where_they_were_frozen(levels: Any) -> None:
    class Watch(INQCallback):
        frozen: ClassVar[list[tuple[str, Tensor, Tensor]]] = []

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            super().on_train_epoch_start(trainer, pl_module)
            parameters = dict(pl_module.named_parameters())
            for layer in self.layers:
                mask = self.frozen_mask(layer.name)
                self.frozen.append((layer.name, mask, parameters[layer.name].detach()[mask].clone()))

    net, callback = Module(), Watch(bits=2, levels=levels, schedule=SCHEDULE)
    gpu_trainer(callback).fit(net, data())
    parameters = dict(net.cpu().named_parameters())
    for name, mask, values in callback.frozen:
        assert same_bits(parameters[name].detach()[mask.cpu()], values.cpu())


@pytest.mark.parametrize("compiled", ["net", "step"])
def test_torch_compile(compiled: str) -> None:
    net, callback = Module(compiled=compiled == "net"), INQCallback(bits=4, schedule=SCHEDULE)
    if compiled == "step":
        optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
        optimizer.step = torch.compile(optimizer.step)  # type: ignore[method-assign]
        net.configure_optimizers = lambda: optimizer  # type: ignore[method-assign]
    gpu_trainer(callback).fit(net, data())
    check_on_grid(net, callback)


class SaveAt(Callback):
    """Saves a checkpoint after a step, and keeps the weights of that moment."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path
        self.weights: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            self.weights = {name: p.detach().cpu().clone() for name, p in pl_module.named_parameters()}


@pytest.mark.parametrize(("first", "second"), [("cpu", "gpu"), ("gpu", "cpu"), ("gpu", "gpu")])
def test_a_run_resumes_on_the_other_device(first: str, second: str, tmp_path: Path) -> None:
    save = SaveAt(7, tmp_path / "a.ckpt")
    gpu_trainer(INQCallback(bits=3, schedule=SCHEDULE), save, accelerator=first).fit(Module(), data())
    state = torch.load(save.path, weights_only=False)["callbacks"]
    (masks,) = [s["layers"] for key, s in state.items() if "INQCallback" in key]
    callback, resumed = INQCallback(bits=3, schedule=SCHEDULE), Module()
    gpu_trainer(callback, accelerator=second).fit(resumed, data(), ckpt_path=save.path)
    check_on_grid(resumed, callback)
    for name, layer in masks.items():
        mask = unpack_mask(layer["mask"], save.weights[name].shape)
        assert 0 < int(mask.sum()) < mask.numel()
        assert same_bits(dict(resumed.named_parameters())[name].detach().cpu()[mask], save.weights[name][mask])


def test_a_resumed_run_ends_as_the_uninterrupted_one(tmp_path: Path) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        save, whole = SaveAt(8, tmp_path / "a.ckpt"), Module()
        gpu_trainer(INQCallback(bits=3, schedule=SCHEDULE), save).fit(whole, data())
        resumed = Module()
        gpu_trainer(INQCallback(bits=3, schedule=SCHEDULE)).fit(resumed, data(), ckpt_path=save.path)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert same_bits(a.detach().cpu(), b.detach().cpu())


def test_monitor_metrics_and_loggers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from pytorch_lightning.loggers import TensorBoardLogger

    net, callback = Module(), INQCallback(bits=3, schedule=SCHEDULE)
    trainer = gpu_trainer(callback, INQMonitor(), logger=TensorBoardLogger(tmp_path), log_every_n_steps=1)
    trainer.fit(net, data(), data())
    assert trainer.callback_metrics["inq/quantized_fraction"] == 1.0
    assert any(tmp_path.rglob("events*"))


def test_files_hold_what_the_gpu_has(tmp_path: Path) -> None:
    net, callback = Module(), INQCallback(bits=3, schedule=SCHEDULE)
    gpu_trainer(callback).fit(net, data())
    module = net.net.cuda()
    save_packed(module, tmp_path / "net.safetensors")
    back = load_packed(tmp_path / "net.safetensors", copy.deepcopy(module).cpu())
    for (name, a), b in zip(module.state_dict().items(), back.state_dict().values(), strict=True):
        assert same_bits(a.cpu(), b.cpu()), name


def test_an_onnx_file_of_a_network_on_the_gpu(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    net, callback = Module(), INQCallback(bits=4, levels="paper", schedule=SCHEDULE)
    gpu_trainer(callback).fit(net, data())
    module = net.net.cuda().eval()
    x = torch.randn(2, 3, 8, 8)
    export_onnx(module, tmp_path / "net.onnx", x.cuda())
    session = runtime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        assert np.allclose(got, module.cpu()(x).numpy(), atol=1e-4)


def test_packed_modules_compute_on_the_gpu() -> None:
    net, callback = Module(), INQCallback(bits=4, levels="paper", schedule=SCHEDULE)
    gpu_trainer(callback).fit(net, data())
    module = net.net.eval()
    packed = to_packed(module).cuda()
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad(), warnings.catch_warnings():
        assert torch.allclose(packed(x.cuda()).cpu(), module.cpu()(x), atol=1e-3)


def test_a_network_on_the_gpu_is_quantized_without_training() -> None:
    net = Module().net.cuda().eval()
    result = quantize(net, [torch.randn(64, 3, 8, 8).cuda()], bits=3)
    assert all(p.is_cuda for p in result.model.parameters())
    for layer in result.layers:
        weight = dict(result.model.named_parameters())[layer.name].detach()
        assert layer.grid is not None
        assert same_bits(layer.grid.quantize(weight), weight)


# ---- data ------------------------------------------------------------------------------------------------------------


def test_images_on_the_card_make_the_same_batches(tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    rng = np.random.default_rng(0)
    path = tmp_path / "images.npz"
    images, labels = rng.integers(0, 256, (80, 16, 16, 3), dtype=np.uint8), rng.integers(0, 10, 80)
    np.savez(path, x_train=images, y_train=labels, x_test=images, y_test=labels)

    class Seen(Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(768, 10))
            self.forward_net = self.net
            self.batches: list[tuple[Tensor, ...]] = []

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            self.batches.append(tuple(tensor.cpu() for tensor in batch))
            return super().training_step(batch, batch_idx)

    seen = {}
    for accelerator in ("cpu", "gpu"):
        module = seen[accelerator] = Seen()
        gpu_trainer(accelerator=accelerator, max_epochs=2).fit(
            module, NpzDataModule(str(path), image_size=16, batch_size=32)
        )
    for here, there in zip(seen["cpu"].batches, seen["gpu"].batches, strict=True):
        assert all(same_bits(a, b) for a, b in zip(here, there, strict=True))
