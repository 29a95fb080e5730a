"""Small modules and Trainers that tests share, and where the repository is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from inq_lightning import INQCallback, PowerOfTwoGrid
from inq_lightning.core.layer import Layer

ROOT = Path(__file__).parents[1]  # of the repository
TESTS = ROOT / "tests"
SCHEDULE = {0: 0.5, 1: 0.75, 2: 0.875, 3: 1.0}


class TinyModule(LightningModule):
    """Two linear layers around a batch normalization; 4 batches an epoch, 168 weights to quantize."""

    def __init__(
        self,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
        scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
        seed: int = 0,
        samples: int = 32,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = nn.Sequential(nn.Linear(8, 14), nn.BatchNorm1d(14), nn.ReLU(), nn.Linear(14, 4))
        self.make_optimizer = optimizer or (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2))
        self.make_scheduler = scheduler
        self.samples = samples
        self.batches = list(loader(samples))

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x.to(self.net[0].weight.dtype)).float(), y)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        # A plain DataLoader begins anew when a run resumes in mid-epoch; here a step's data depend on the step only.
        return self.loss(self.batches[self.global_step % len(self.batches)])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        if self.make_scheduler is None:
            return optimizer
        scheduler = self.make_scheduler(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(self.samples)

    def val_dataloader(self) -> DataLoader[Any]:
        return loader(8)

    test_dataloader = val_dataloader


class Holds(torch.optim.lr_scheduler.LRScheduler):
    """Leaves the work to a scheduler that is an attribute of it."""

    def __init__(self, optimizer: torch.optim.Optimizer, inner: torch.optim.lr_scheduler.LRScheduler) -> None:
        self.inner = inner
        super().__init__(optimizer)

    def get_lr(self) -> Any:
        return self.inner.get_last_lr()

    def step(self, epoch: int | None = None) -> None:
        self.last_epoch += 1
        if self.last_epoch:
            self.inner.step()
        self._last_lr = self.inner.get_last_lr()


def loader(samples: int) -> DataLoader[Any]:
    """The same batches of 8 in the same order every time."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(samples, 8, generator=generator)
    return DataLoader(TensorDataset(x, (x[:, :4] + x[:, 4:]).argmax(1)), batch_size=8)


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    """A quiet Trainer of four epochs on the CPU."""
    quiet = {
        "max_epochs": 4,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
    }
    return Trainer(callbacks=list(callbacks), **(quiet | options))


def weights(module: LightningModule, callback: INQCallback) -> dict[str, Tensor]:
    """Copies of the selected weights."""
    parameters = {name.replace("_orig_mod.", ""): p for name, p in module.named_parameters(remove_duplicate=False)}
    return {layer.name: parameters[layer.name].detach().clone() for layer in callback.layers}


def record(name: str, bits: int, n1: int | None) -> Layer:
    """What `INQCallback.layers` says of a weight."""
    return Layer(name, (), bits, PowerOfTwoGrid(n1, bits))


def bits_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(bits_of(a), bits_of(b))


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    """Every tensor of the two state_dicts is the same, bit for bit."""
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not same_bits(ours[name].float(), theirs[name].float())]
    assert not different


def assert_quantized(module: LightningModule, callback: INQCallback) -> None:
    """The callback says that everything is quantized, and the weights themselves agree."""
    assert callback.quantized_fraction == 1.0
    for layer in callback.layers:
        assert layer.frozen == layer.numel
        w = weights(module, callback)[layer.name]
        grid = layer.grid or PowerOfTwoGrid(None, layer.bits)  # without one, all was zero
        assert grid.bits == layer.bits
        assert set(w.double().unique().tolist()) <= set(grid.levels.tolist()), layer.name


class Witness(Callback):
    """Checks after every batch and at every other chance that frozen weights never change and counts are exact."""

    def __init__(self, callback: INQCallback) -> None:
        self.callback = callback
        self.frozen: dict[str, tuple[Tensor, Tensor]] = {}
        self.fractions: list[float] = []
        self.checks = 0

    def look(self, module: LightningModule) -> None:
        now = weights(module, self.callback)
        for layer in self.callback.layers:
            mask = self.callback.frozen_mask(layer.name)
            assert int(mask.sum()) == layer.frozen
            if layer.name in self.frozen:
                old_mask, old = self.frozen[layer.name]
                assert bool((mask | ~old_mask).all()), f"{layer.name} was unfrozen"
                assert same_bits(now[layer.name][old_mask], old[old_mask]), f"{layer.name} moved"
            self.frozen[layer.name] = (mask.clone(), now[layer.name])
        self.fractions.append(self.callback.quantized_fraction)
        self.checks += 1

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.look(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.look(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.look(pl_module)
        assert self.fractions == sorted(self.fractions)
