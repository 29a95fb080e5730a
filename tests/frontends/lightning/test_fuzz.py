"""Random runs, interrupted and resumed at random, against the same runs left alone."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import shutil
import signal
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from support import Witness, assert_quantized, same_bits, trainer
from torch import Tensor, nn, optim
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from inq_lightning import INQCallback, Schedule
from inq_lightning.core.frozen import unpack_mask
from inq_lightning.core.schedule import PRESETS, default_preset

OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: optim.SGD(p, lr=0.1),
    "momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2, foreach=True),
    "adam": lambda p: optim.Adam(p, lr=1e-2, weight_decay=1e-2, amsgrad=True),
    "adamw": lambda p: optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: optim.RMSprop(p, lr=1e-3, momentum=0.9, weight_decay=1e-2),
    "adagrad": lambda p: optim.Adagrad(p, lr=1e-2, weight_decay=1e-2),
}
SCHEDULERS: dict[str, Any] = {
    "none": None,
    "exponential": lambda o: {"scheduler": lr_scheduler.ExponentialLR(o, 0.8), "interval": "epoch"},
    "cosine": lambda o: {"scheduler": lr_scheduler.CosineAnnealingLR(o, 3), "interval": "step"},
    "onecycle": lambda o: {
        "scheduler": lr_scheduler.OneCycleLR(o, 0.1, total_steps=500, cycle_momentum=False),
        "interval": "step",
    },
}
FAILURES = (
    "on_train_epoch_start",
    "on_train_batch_start",
    "training_step",
    "on_after_backward",
    "on_before_optimizer_step",
    "after the update",
    "on_train_batch_end",
    "validation_step",
    "on_validation_epoch_end",
)


@dataclass(frozen=True)
class Config:
    """One run."""

    network: str
    width: int
    seed: int
    zeros: float
    batches: int
    epochs: int
    accumulate: int
    validate_every: int  # batches; 0: never
    clip: float | None
    optimizer: str
    scheduler: str
    schedule: Any
    portions: tuple[float, ...]
    starts: tuple[int, ...]
    unit: str
    arguments: dict[str, Any]


@st.composite
def configs(draw: st.DrawFn) -> Config:
    network = draw(st.sampled_from(["linear", "norm", "conv", "embedding", "tied", "recurrent"]))
    bits = draw(st.integers(2, 8))
    batches, accumulate = draw(st.integers(1, 4)), draw(st.integers(1, 2))
    epochs = draw(st.integers(1, 5))
    steps = math.ceil(batches / accumulate)
    kind = draw(st.sampled_from(["mapping", "steps", "preset", "default", "open", "open steps"]))
    unit = "step" if "steps" in kind else "epoch"
    if kind == "preset":
        schedule: Any = draw(st.sampled_from(["alexnet", "vgg16", "googlenet", "4bit"]))
        portions = PRESETS[schedule]
    elif kind == "default":
        schedule, portions = None, PRESETS[default_preset(bits)]
    else:
        inner = draw(st.lists(st.integers(1, 31), unique=True, max_size=min(4, epochs - 1)))
        portions = (*(p / 32 for p in sorted(inner)), 1.0)
    epochs = max(epochs, len(portions))
    total = epochs * steps if unit == "step" else epochs
    starts = tuple(i * total // len(portions) for i in range(len(portions)))
    if kind in ("mapping", "steps"):
        starts = tuple(sorted(draw(st.sets(st.integers(0, total - 1), min_size=len(portions), max_size=len(portions)))))
        schedule = Schedule(portions, starts, unit) if unit == "step" else dict(zip(starts, portions, strict=True))
    elif kind.startswith("open"):
        schedule = Schedule(portions, unit=unit)
    keep_zeros = draw(st.booleans())
    underflow = draw(st.sampled_from(["nearest", "truncate"]))
    dense = ["dense"] if bits <= 6 and not keep_zeros and underflow == "nearest" else []
    return Config(
        network=network,
        width=draw(st.integers(1, 8)),
        seed=draw(st.integers(0, 99)),
        zeros=draw(st.sampled_from([0.3, 0.0, 0.6])) if keep_zeros else 0.0,
        batches=batches,
        epochs=epochs,
        accumulate=accumulate,
        validate_every=draw(st.integers(0, batches)),
        clip=draw(st.sampled_from([None, 0.5])),
        optimizer=draw(st.sampled_from(sorted(OPTIMIZERS))),
        scheduler=draw(st.sampled_from(sorted(SCHEDULERS))),
        schedule=schedule,
        portions=portions,
        starts=starts,
        unit=unit,
        arguments={
            "bits": bits,
            "partition": draw(st.sampled_from(["magnitude", "random"])),
            "underflow": underflow,
            "exponent": draw(st.sampled_from(["max", "mse"])),
            "layer_bits": draw(st.sampled_from([None, {"first*": 3, "last": 8}])),
            "levels": draw(st.sampled_from(["auto", "paper", "full", *dense])),
            "layer_levels": {"first*": "auto", "last": "auto"},  # some have 8 bits, more than dense can have
            "embeddings": True,
            "keep_zeros": keep_zeros,
            "restart_lr": draw(st.booleans()),
            "reset_optimizer": draw(st.booleans()),
            "seed": draw(st.integers(0, 3)),
        },
    )


class Net(nn.Module):
    """Six inputs, three outputs, and between them what the configuration says."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.width
        middle: nn.Module = nn.ReLU()
        self.first: nn.Module = nn.Linear(6, width)
        if config.network == "norm":
            middle = nn.Sequential(nn.BatchNorm1d(width), nn.ReLU())
        elif config.network == "conv":
            self.first = nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, width, 3, stride=3))
            middle = nn.Sequential(nn.BatchNorm1d(width), nn.ReLU(), nn.Flatten(), nn.Linear(2 * width, width))
        elif config.network == "embedding":
            self.first = nn.EmbeddingBag(9, width)
        elif config.network == "tied":
            hidden = nn.Linear(width, width)
            again = nn.Linear(width, width)
            again.weight = hidden.weight
            middle = nn.Sequential(hidden, nn.Tanh(), again)
        elif config.network == "recurrent":
            middle = nn.GRU(width, width)
        self.middle = middle
        self.last = nn.Linear(width, 3)
        self.integers = config.network == "embedding"

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.middle(self.first((4 * x.abs()).long().clamp(max=8) if self.integers else x))
        return self.last(hidden[0] if isinstance(hidden, tuple) else hidden)


class Module(LightningModule):
    """A network whose data depend on the step only, and which fails where it is told to."""

    def __init__(self, config: Config, fail: str = "", at: int = 0, error: BaseException | None = None) -> None:
        super().__init__()
        self.config, self.fail, self.at, self.error = config, fail, at, error
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            net = Net(config)
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter[torch.rand(parameter.shape) < config.zeros] = 0.0
            x = torch.randn(config.batches * 4, 6)
        self.data = TensorDataset(x, x[:, ::2].argmax(1))
        for name, child in net.named_children():
            self.add_module(name, child)
        self.forward = net.forward
        self.workers = 0

    def maybe_fail(self, where: str) -> None:
        if where == self.fail:
            self.at -= 1
            if self.at < 0 and self.error is not None:
                error, self.error = self.error, None
                raise error

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.forward(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        first = self.global_step % self.config.batches * 4
        loss = self.loss(*self.data[first : first + 4])
        self.maybe_fail("training_step")
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(*batch))
        self.maybe_fail("validation_step")

    def on_train_epoch_start(self) -> None:
        self.maybe_fail("on_train_epoch_start")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.maybe_fail("on_train_batch_start")

    def on_after_backward(self) -> None:
        self.maybe_fail("on_after_backward")

    def on_before_optimizer_step(self, optimizer: optim.Optimizer) -> None:
        self.maybe_fail("on_before_optimizer_step")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.maybe_fail("on_train_batch_end")

    def on_validation_epoch_end(self) -> None:
        self.maybe_fail("on_validation_epoch_end")

    def configure_optimizers(self) -> Any:
        optimizer = OPTIMIZERS[self.config.optimizer](self.parameters())
        optimizer.register_step_post_hook(lambda *_: self.maybe_fail("after the update"))  # before the callback's own
        make = SCHEDULERS[self.config.scheduler]
        return optimizer if make is None else ([optimizer], [make(optimizer)])

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.data, batch_size=4, num_workers=self.workers)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.data, batch_size=4)


class Watch(Witness):
    """Compares every batch with the schedule, and with the uninterrupted run where one is given."""

    def __init__(
        self, callback: INQCallback, config: Config, kept: dict[str, int], reference: Watch | None, stop: int | None
    ) -> None:
        super().__init__(callback)
        self.config, self.kept, self.reference, self.stop = config, kept, reference, stop
        self.states: dict[tuple[int, int], dict[str, Tensor]] = {}
        self.batches = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        now = trainer.current_epoch if self.config.unit == "epoch" else trainer.global_step
        phases = zip(self.config.starts, self.config.portions, strict=True)
        self.portion = max((portion for start, portion in phases if start <= now), default=0.0)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *args)
        for layer in self.callback.layers:
            kept = self.kept[layer.name]
            assert layer.frozen == kept + round(self.portion * (layer.numel - kept)), layer
        masks = {f"mask of {layer.name}": self.callback.frozen_mask(layer.name) for layer in self.callback.layers}
        now = trainer.current_epoch, args[-1]
        state = {k: v.clone() for k, v in (pl_module.state_dict() | masks).items()}
        if self.reference is None:
            self.states[now] = state
        else:
            assert_same(state, self.reference.states[now])
        self.batches += 1
        if self.batches == self.stop:
            trainer.should_stop = True


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    different = [
        n for n, t in ours.items() if not (torch.equal if t.dtype == torch.bool else same_floats)(t, theirs[n])
    ]
    assert not different


def same_floats(a: Tensor, b: Tensor) -> bool:
    return same_bits(a.float(), b.float())


@dataclass(frozen=True)
class Saved:
    """A checkpoint.

    Attributes:
        path: Its file.
        exact: Whether Lightning by itself resumes from it exactly where it was written.
        last_batch: Whether it was written after an epoch's last batch, but before the epoch's end. It resumes exactly
            once: the checkpoints of the resumed run count their epochs one too low (Lightning 2.6, without INQ too).
    """

    path: Path
    exact: bool
    last_batch: bool = False


class InterruptedRuns(RuleBasedStateMachine):
    """One configuration, run without interruption first, then in pieces."""

    @initialize(config=configs())
    def begin(self, config: Config) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.saved: list[Saved] = []
        self.config, self.sessions = config, itertools.count()
        self.callback = INQCallback(schedule=config.schedule, **config.arguments)
        initial = Module(config)
        self.kept = {
            name: int((parameter == 0).sum()) if config.arguments["keep_zeros"] else 0
            for name, parameter in initial.named_parameters()
        }
        self.reference: Watch | None = None
        self.whole = Module(config)
        self.reference = self.session(self.whole, None)
        assert self.reference is not None
        assert self.reference.checks >= config.batches * config.epochs
        assert_quantized(self.whole, self.callback)

    def session(self, module: Module, start: Saved | None, stop: int | None = None, **saving: Any) -> Watch:
        """Fit in a fresh Trainer, from a checkpoint or the beginning; note the checkpoints that it writes."""
        config = self.config
        exact = start is None or start.exact
        watch = Watch(self.callback, config, self.kept, self.reference if exact else None, stop)
        if start is not None:
            checkpoint = torch.load(start.path)
            for name, state in checkpoint["callbacks"]["INQCallback"].get("layers", {}).items():
                mask = unpack_mask(state["mask"], torch.Size(state["shape"]))
                watch.frozen[name] = mask, checkpoint["state_dict"][name]
                watch.fractions = [checkpoint["inq"]["quantized_fraction"]]
        folder = self.folder / str(next(self.sessions))
        savers = [ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **saving)] if saving else []
        run = trainer(
            self.callback,
            watch,
            *savers,
            max_epochs=config.epochs,
            accumulate_grad_batches=config.accumulate,
            gradient_clip_val=config.clip,
            limit_val_batches=1 if config.validate_every else 0,
            val_check_interval=config.validate_every or None,
            enable_checkpointing=bool(saving),
        )
        broken = False
        try:
            run.fit(module, ckpt_path=start and start.path)
        except (InterruptionError, SystemExit):
            broken = True
            watch.look(module)  # no weight that was frozen has moved, wherever the exception came
            assert watch.fractions == sorted(watch.fractions)
        # After an epoch cut short, Lightning makes fewer steps in all, and may end before a schedule in steps does.
        self.complete = exact or run.global_step > config.starts[-1] or config.unit == "epoch"
        steps = math.ceil(config.batches / config.accumulate)
        begun = start and torch.load(start.path)["global_step"]
        for path in sorted(folder.glob("*.ckpt")):
            step = torch.load(path)["global_step"]
            after_batch = "every_n_train_steps" in saving
            out_of_turn = config.validate_every and config.batches % config.validate_every
            inexact = (
                not exact
                or (start is not None and start.last_batch)
                or (broken and saving.get("save_on_exception"))  # in the middle of a batch
                # should_stop has cut the epoch short, or has brought about a validation out of turn
                or (not after_batch and step == run.global_step and (step % steps or out_of_turn))
                or (config.accumulate > 1 and (saving.get("save_on_train_epoch_end") is False or step == begun))
            )
            self.saved.append(Saved(path, not inexact, after_batch and step % steps == 0))
        return watch

    def start(self, which: int) -> Saved | None:
        """The newest checkpoint for 0, older ones for higher numbers; None (the beginning) if there is none."""
        return self.saved[-1 - which % len(self.saved)] if self.saved else None

    def fresh(self, new_callback: bool) -> None:
        if new_callback:
            self.callback = INQCallback(schedule=self.config.schedule, **self.config.arguments)

    @rule(
        which=st.sampled_from([0, 0, 0, 1, 2, 3]),
        stop=st.integers(1, 7),
        every=st.integers(1, 2),
        at=st.sampled_from(["batch", "epoch", "validation"]),
        workers=st.sampled_from([0] * 15 + [1]),
        new_callback=st.booleans(),
    )
    def train(self, which: int, stop: int, every: int, at: str, workers: int, new_callback: bool) -> None:
        self.fresh(new_callback)
        module = Module(self.config)
        module.workers = workers
        saving = {
            "batch": {"every_n_train_steps": every},
            "epoch": {"every_n_epochs": 1, "save_on_train_epoch_end": True},
            "validation": {"every_n_epochs": 1, "save_on_train_epoch_end": False},
        }
        self.session(module, self.start(which), stop, **saving[at])

    @rule(
        which=st.sampled_from([0, 0, 0, 1, 2, 3]),
        fail=st.sampled_from(FAILURES),
        at=st.integers(0, 4),
        by_hand=st.booleans(),
        save=st.booleans(),
        new_callback=st.booleans(),
    )
    def crash(self, which: int, fail: str, at: int, by_hand: bool, save: bool, new_callback: bool) -> None:
        self.fresh(new_callback)
        module = Module(self.config, fail, at, KeyboardInterrupt() if by_hand else InterruptionError())
        saving = {"save_on_exception": True, "every_n_train_steps": 1000} if save else {"every_n_train_steps": 2}
        self.session(module, self.start(which), **saving)

    @precondition(lambda self: self.saved)
    @rule(which=st.integers(0, 5))
    def validate(self, which: int) -> None:
        start = self.start(which)
        assert start is not None
        module = Module(self.config)
        trainer(self.callback, limit_val_batches=1).validate(module, ckpt_path=start.path, verbose=False)
        assert_same(dict(module.state_dict()), torch.load(start.path)["state_dict"])

    def teardown(self) -> None:
        if not hasattr(self, "whole"):
            return
        try:
            start = self.start(0)
            module = Module(self.config)
            self.fresh(True)
            self.session(module, start)
            if self.complete:
                assert_quantized(module, self.callback)
            if start is None or start.exact:
                assert_same(dict(module.state_dict()), dict(self.whole.state_dict()))
        finally:
            shutil.rmtree(self.folder)


class InterruptionError(Exception):
    """What the module raises in the middle of a run."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Lightning's messages, and with Ctrl-C working afterwards: Lightning switches it off when it comes."""
    loggers = [logging.getLogger(f"pytorch_lightning.{name}") for name in ("utilities.rank_zero", "callbacks")]
    levels, interrupt = [logger.level for logger in loggers], signal.getsignal(signal.SIGINT)
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        signal.signal(signal.SIGINT, interrupt)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def play(sequences: int) -> None:
    checks = settings(
        max_examples=sequences,
        stateful_step_count=6,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    with quiet():
        run_state_machine_as_test(InterruptedRuns, settings=checks)


def test_interrupted_runs_keep_every_promise_and_end_as_uninterrupted_ones() -> None:
    play(15)


@pytest.mark.slow
def test_a_thousand_interrupted_runs_keep_every_promise_and_end_as_uninterrupted_ones() -> None:
    play(1000)
