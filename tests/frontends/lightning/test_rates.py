"""Learning rates in whole runs of a Trainer: what becomes of schedules, and what a restart puts back."""

from __future__ import annotations

import csv
import itertools
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import (
    BaseFinetuning,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from pytorch_lightning.loggers import CSVLogger
from support import Holds, TinyModule, assert_quantized, assert_same_state, loader, trainer
from torch import optim
from torch.optim import lr_scheduler as s
from torch.utils.data import DataLoader, IterableDataset

from inq_lightning import INQCallback, Schedule, phase_length
from inq_lightning.core.rates import position

BATCHES = 4  # an epoch of TinyModule
Rates = list[float]


class Scheduled(TinyModule):
    """TinyModule with a scheduler made from its Trainer; notes the learning rate of each optimizer step."""

    def __init__(self, make: Callable[[Any, optim.Optimizer], Any], interval: str = "epoch", **options: Any) -> None:
        super().__init__()
        self.make, self.options = make, {"interval": interval} | options
        self.rates: Rates = []
        self.momenta: list[Any] = []

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.make(self.trainer, optimizer), **self.options},
        }

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        group = optimizer.param_groups[0]
        self.rates.append(float(group["lr"]))
        self.momenta.append(group["betas"] if "betas" in group else group["momentum"])
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)


def one_cycle(trainer: Trainer, optimizer: optim.Optimizer) -> Any:
    return s.OneCycleLR(optimizer, 0.1, total_steps=trainer.estimated_stepping_batches)


def cosine(trainer: Trainer, optimizer: optim.Optimizer) -> Any:
    return s.CosineAnnealingLR(optimizer, trainer.max_epochs)


def warm_up(trainer: Trainer, optimizer: optim.Optimizer) -> Any:
    rest = s.CosineAnnealingLR(optimizer, trainer.max_epochs - 2)
    return s.SequentialLR(optimizer, [s.LinearLR(optimizer, 0.1, total_iters=2), rest], [2])


def linear_with_warm_up(trainer: Trainer, optimizer: optim.Optimizer) -> Any:
    end = trainer.estimated_stepping_batches
    return s.LambdaLR(optimizer, lambda step: step / 6 if step < 6 else max(0.0, (end - step) / (end - 6)))


def rates_without_inq(module: Scheduled, **options: Any) -> Rates:
    trainer(**options).fit(module)
    return module.rates


def in_phases(rates: Rates, phases: int) -> list[Rates]:
    length = len(rates) // phases
    assert length * phases == len(rates)
    return [rates[i * length : (i + 1) * length] for i in range(phases)]


def squeezed(run: Rates, steps: int) -> Rates:
    """The values of a whole run within fewer steps."""
    return [run[position(step, steps, len(run))] for step in range(steps)]


@pytest.mark.parametrize(
    ("make", "interval", "counted"),
    [
        (one_cycle, "step", "32 steps"),
        (linear_with_warm_up, "step", "32 steps"),
        (cosine, "epoch", "8 epochs"),
        (warm_up, "epoch", "8 epochs"),
        (lambda t, o: s.MultiStepLR(o, [4, 6]), "epoch", "8 epochs"),
        (lambda t, o: s.PolynomialLR(o, t.max_epochs), "epoch", "8 epochs"),
        (lambda t, o: s.ChainedScheduler([s.LinearLR(o, 0.1), s.CosineAnnealingLR(o, 8)]), "epoch", "8 epochs"),
    ],
    ids=["onecycle", "warm-up-linear", "cosine", "warm-up-cosine", "milestones", "polynomial", "chained"],
)
def test_a_schedule_made_for_the_run_is_run_whole_in_each_phase(
    make: Callable[..., Any], interval: str, counted: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = rates_without_inq(Scheduled(make, interval), max_epochs=8)
    module, callback = Scheduled(make, interval), INQCallback()
    with caplog.at_level(logging.INFO):
        trainer(callback, max_epochs=8).fit(module)
    values = run if interval == "step" else run[::BATCHES]
    assert in_phases(module.rates, 4) == [squeezed(values, 8)] * 4
    said = [record.message for record in caplog.records if record.message.startswith("Learning rate")]
    name = type(make(trainer(max_epochs=8), module.optimizers().optimizer) if interval == "epoch" else 0).__name__
    assert len(said) == 1
    assert f"spans the whole run of {counted}: its whole curve is run in each of the 4 phases." in said[0]
    assert interval == "step" or said[0].startswith(f"Learning rate: {name} ")
    assert_quantized(module, callback)


def test_one_cycle_ends_where_it_should() -> None:
    module = Scheduled(one_cycle, "step")
    trainer(INQCallback(), max_epochs=8).fit(module)
    for phase in in_phases(module.rates, 4):
        assert phase[0] == pytest.approx(0.004)
        assert max(phase) > 0.09
        assert phase[-1] == pytest.approx(4e-7)


@pytest.mark.parametrize(
    ("optimizer", "low", "high"),
    [
        (lambda p: optim.SGD(p, 0.1, momentum=0.9), 0.85, 0.95),
        (lambda p: optim.AdamW(p, 0.1), (0.85, 0.999), (0.95, 0.999)),
    ],
    ids=["momentum", "betas"],
)
def test_momentum_goes_with_the_rate(optimizer: Any, low: Any, high: Any) -> None:
    module = Scheduled(one_cycle, "step")
    module.make_optimizer = optimizer
    trainer(INQCallback(), max_epochs=16).fit(module)
    phases = [module.momenta[i : i + 16] for i in range(0, 64, 16)]
    assert phases[0] == phases[1] == phases[2] == phases[3]
    assert phases[0][0] == phases[0][-1] == high
    assert min(phases[0]) == pytest.approx(low, abs=0.005)


@pytest.mark.parametrize("reported", [None, "its whole curve", "begins anew"])
def test_it_is_said_once_and_before_training(reported: str | None, caplog: pytest.LogCaptureFixture) -> None:
    class Listens(Callback):
        said: list[str] | None = None

        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if self.said is None:
                self.said = [record.message for record in caplog.records if "Learning rate" in record.message]

    listens = Listens()
    make = {None: None, "its whole curve": cosine, "begins anew": lambda t, o: s.ExponentialLR(o, 0.5)}[reported]
    module = TinyModule() if make is None else Scheduled(make)
    with caplog.at_level(logging.INFO):
        trainer(INQCallback(), listens, max_epochs=8).fit(module)
    assert listens.said is not None
    assert [reported in text for text in listens.said] == ([] if reported is None else [True])
    assert [r.message for r in caplog.records if "Learning rate" in r.message] == listens.said


@pytest.mark.parametrize(
    ("make", "interval", "expected"),
    [
        (lambda t, o: s.CosineAnnealingLR(o, 2), "epoch", [0.1] * 4 + [0.05] * 4),
        (lambda t, o: s.ExponentialLR(o, 0.5), "epoch", [0.1] * 4 + [0.05] * 4),
        (lambda t, o: s.StepLR(o, 1, 0.5), "epoch", [0.1] * 4 + [0.05] * 4),
        (lambda t, o: s.ExponentialLR(o, 0.5), "step", [0.1 * 0.5**i for i in range(8)]),
        (
            lambda t, o: s.LambdaLR(o, lambda step: max(0.0, 1 - step / 8)),
            "step",
            [0.1 * (1 - i / 8) for i in range(8)],
        ),
    ],
    ids=["cosine", "exponential", "stairs", "exponential-step", "linear-step"],
)
def test_a_schedule_made_for_a_phase_goes_on_as_it_does(
    make: Callable[..., Any], interval: str, expected: Rates
) -> None:
    module = Scheduled(make, interval)
    trainer(INQCallback(), max_epochs=8).fit(module)
    assert module.rates == expected * 4


def test_a_schedule_of_the_length_of_a_phase_gives_the_values_of_a_run_of_that_length() -> None:
    def cycle(trainer: Trainer, optimizer: optim.Optimizer) -> Any:
        return s.OneCycleLR(optimizer, 0.1, total_steps=phase_length(trainer))

    module = Scheduled(cycle, "step")
    trainer(INQCallback(), max_epochs=8).fit(module)
    assert in_phases(module.rates, 4) == [rates_without_inq(Scheduled(one_cycle, "step"), max_epochs=2)] * 4


def test_phases_that_differ_have_the_whole_curve_each() -> None:
    """Also where OneCycleLR would fail, since it has fewer steps than the longest phase."""
    for total in (8, 12, 32):
        module = Scheduled(lambda t, o, total=total: s.OneCycleLR(o, 0.1, total_steps=total), "step")
        trainer(INQCallback(schedule={0: 0.5, 2: 0.75, 5: 1.0}), max_epochs=8).fit(module)
        for begin, end in ((0, 8), (8, 20), (20, 32)):
            phase = module.rates[begin:end]
            assert phase[0] == pytest.approx(0.004)
            assert phase[-1] == pytest.approx(4e-7)


def test_training_before_the_first_phase_has_the_whole_curve_too() -> None:
    module = Scheduled(cosine)
    trainer(INQCallback(schedule={4: 0.5, 6: 1.0}), max_epochs=8).fit(module)
    run = [0.05 * (1 + math.cos(math.pi * epoch / 8)) for epoch in range(8)]
    assert module.rates[:16] == pytest.approx(squeezed(run, 16))
    assert module.rates[16:] == pytest.approx(squeezed(run, 8) * 2)


def test_a_scheduler_that_holds_another_begins_anew_with_it() -> None:
    module = Scheduled(lambda t, o: Holds(o, s.ExponentialLR(o, 0.5)))
    trainer(INQCallback(schedule={0: 0.5, 3: 1.0}), max_epochs=6).fit(module)
    assert module.rates[::BATCHES] == [0.1, 0.05, 0.025, 0.1, 0.05, 0.025]
    module = Scheduled(lambda t, o: Holds(o, s.CosineAnnealingLR(o, 6)))
    trainer(INQCallback(schedule={0: 0.5, 3: 1.0}), max_epochs=6).fit(module)
    assert (
        in_phases(module.rates, 2)
        == [squeezed(rates_without_inq(Scheduled(lambda t, o: s.CosineAnnealingLR(o, 6)), max_epochs=6)[::BATCHES], 12)]
        * 2
    )


# ---- how runs are counted --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"max_steps": 16, "max_epochs": -1}, {"max_steps": 16}, {"max_epochs": 4}])
@pytest.mark.parametrize("schedule", [None, Schedule([0.5, 1.0], [0, 8], "step")], ids=["spread", "steps"])
def test_runs_and_phases_in_steps(options: dict[str, int], schedule: Any) -> None:
    module = Scheduled(one_cycle, "step")
    trainer(INQCallback(schedule=schedule), **options).fit(module)
    phases = 4 if schedule is None else 2
    run = rates_without_inq(Scheduled(one_cycle, "step"), max_epochs=4)
    assert in_phases(module.rates, phases) == [squeezed(run, 16 // phases)] * phases


def test_a_run_that_ends_within_an_epoch_ends_with_the_curve() -> None:
    module = Scheduled(one_cycle, "step")
    trainer(INQCallback(schedule={0: 0.5, 2: 1.0}), max_steps=14, max_epochs=4).fit(module)
    assert [module.rates[0], module.rates[7], module.rates[8], module.rates[13]] == pytest.approx(
        [0.004, 4e-7, 0.004, 4e-7]
    )


def test_accumulated_gradients_count_in_optimizer_steps() -> None:
    module = Scheduled(one_cycle, "step")
    trainer(INQCallback(), max_epochs=8, accumulate_grad_batches=3).fit(module)  # batches 3 and 4 make steps
    run = rates_without_inq(Scheduled(one_cycle, "step"), max_epochs=8, accumulate_grad_batches=3)
    assert len(run) == 16
    assert in_phases(module.rates, 4) == [squeezed(run, 4)] * 4


def test_a_changing_accumulation_ends_with_the_curve_all_the_same() -> None:
    module = Scheduled(cosine)
    trainer(INQCallback(), GradientAccumulationScheduler({0: 1, 4: 2}), max_epochs=8).fit(module)
    run = [0.05 * (1 + math.cos(math.pi * epoch / 8)) for epoch in range(8)]
    assert module.rates == pytest.approx(squeezed(run, 8) * 2 + squeezed(run, 4) * 2)


@pytest.mark.parametrize(("interval", "frequency", "total"), [("step", 2, 16), ("epoch", 2, 4)])
def test_a_scheduler_that_is_stepped_every_other_time(interval: str, frequency: int, total: int) -> None:
    def make(trainer: Trainer, optimizer: optim.Optimizer) -> Any:
        return s.CosineAnnealingLR(optimizer, total)

    run = [0.05 * (1 + math.cos(math.pi * step / total)) for step in range(total)]
    module = Scheduled(make, interval, frequency=frequency)
    trainer(INQCallback(), max_epochs=8).fit(module)
    assert module.rates == pytest.approx(squeezed(run, 8) * 4)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from loader(32).dataset


@pytest.mark.parametrize(
    ("make", "options", "reason"),
    [
        (cosine, {"max_epochs": 8}, "it lasts longer than a phase, and nothing says how many batches an epoch has"),
        (
            lambda t, o: s.CosineAnnealingLR(o, 9),
            {"max_epochs": -1, "max_time": {"seconds": 1}},
            "nothing says how long",
        ),
    ],
)
def test_what_cannot_be_fitted_is_named_before_training(make: Any, options: dict[str, Any], reason: str) -> None:
    class Streaming(Scheduled):
        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(Stream(), batch_size=8)

        def on_train_epoch_start(self) -> None:
            seen.append([str(warning.message) for warning in caught])

    seen: list[list[str]] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(INQCallback(schedule={0: 0.5, 2: 1.0}), **options).fit(Streaming(make))
    (text,) = [text for text in seen[0] if "Learning rate" in text]
    assert f"CosineAnnealingLR cannot be fitted to the phases: {reason}" in text


def test_a_stream_of_known_steps_is_fitted() -> None:
    class Streaming(Scheduled):
        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(Stream(), batch_size=8)

    module = Streaming(one_cycle, "step")
    trainer(INQCallback(), max_steps=16, max_epochs=-1).fit(module)
    run = rates_without_inq(Scheduled(one_cycle, "step"), max_epochs=4)
    assert in_phases(module.rates, 4) == [squeezed(run, 4)] * 4


def test_a_trial_run_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        trainer(INQCallback(), fast_dev_run=True).fit(Scheduled(one_cycle, "step"))
    assert not [record for record in caplog.records if "Learning rate" in record.message]


# ---- several schedulers and optimizers -------------------------------------------------------------------------------


class Manual(TinyModule):
    """A rate of its own for each layer, with schedulers stepped by the module."""

    def __init__(self, each: str, make: Callable[[Any, optim.Optimizer], Any]) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.each, self.make = each, make
        self.rates: list[Rates] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers = self.optimizers()
        self.rates.append([optimizer.param_groups[0]["lr"] for optimizer in optimizers])
        for optimizer in optimizers:
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
        if self.each == "step":
            self.step_schedulers()

    def step_schedulers(self) -> None:
        for scheduler in self.lr_schedulers():
            scheduler.step()

    def on_train_epoch_end(self) -> None:
        if self.each == "epoch":
            self.step_schedulers()

    def configure_optimizers(self) -> Any:
        optimizers = [optim.SGD(self.net[0].parameters(), 0.1), optim.SGD(self.net[3].parameters(), 0.2)]
        return optimizers, [self.make(self.trainer, optimizer) for optimizer in optimizers]


@pytest.mark.parametrize(
    ("each", "make"),
    [
        ("epoch", lambda t, o: s.CosineAnnealingLR(o, t.max_epochs)),
        ("step", lambda t, o: s.CosineAnnealingLR(o, t.max_epochs * BATCHES)),
    ],
)
def test_several_optimizers_under_manual_optimization(each: str, make: Any, caplog: pytest.LogCaptureFixture) -> None:
    alone, module = Manual(each, make), Manual(each, make)
    trainer(max_epochs=8).fit(alone)
    with caplog.at_level(logging.INFO):
        trainer(INQCallback(), max_epochs=8).fit(module)
    for index in (0, 1):
        run = [rates[index] for rates in alone.rates][:: BATCHES if each == "epoch" else 1]
        assert in_phases([rates[index] for rates in module.rates], 4) == [squeezed(run, 8)] * 4
    (text,) = [record.message for record in caplog.records if "Learning rate" in record.message]
    count = "8 epochs" if each == "epoch" else "32 steps"
    for index in (0, 1):
        assert f"CosineAnnealingLR of optimizer {index} spans the whole run of {count}" in text


def test_manual_schedules_made_for_a_phase_are_stepped_by_the_module() -> None:
    module = Manual("epoch", lambda t, o: s.CosineAnnealingLR(o, 2))
    trainer(INQCallback(), max_epochs=8).fit(module)
    assert [rates[0] for rates in module.rates] == ([0.1] * 4 + [0.05] * 4) * 4


def test_two_schedulers_of_one_optimizer() -> None:
    """A warm-up by steps, shorter than a phase, over a cosine by epochs."""

    class Two(TinyModule):
        rates: Rates

        def configure_optimizers(self) -> Any:
            optimizer = self.make_optimizer(self.parameters())
            warm = {"scheduler": s.LinearLR(optimizer, 0.5, total_iters=2), "interval": "step"}
            return [optimizer], [warm, s.CosineAnnealingLR(optimizer, 8)]

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.rates.append(self.optimizers().param_groups[0]["lr"])
            return super().training_step(batch, batch_idx)

    module = Two()
    module.rates = []
    trainer(INQCallback(), max_epochs=8).fit(module)
    cosine = [1 + math.cos(math.pi * epoch / 8) for epoch in range(8)]
    expected = [0.05 * c * w for c, w in zip(cosine, (0.5, 0.75, 1, 1, 1, 1, 1, 1), strict=True)]
    assert module.rates == pytest.approx(expected * 4)


def test_plateaus_begin_anew_and_are_not_fitted() -> None:
    class Worse(Scheduled):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("loss", float(self.current_epoch), on_epoch=True, on_step=False)
            return super().training_step(batch, batch_idx)

    module = Worse(lambda t, o: s.ReduceLROnPlateau(o, patience=0, factor=0.5), monitor="loss")
    trainer(INQCallback(schedule={0: 0.5, 3: 1.0}), max_epochs=6).fit(module)
    assert module.rates[::BATCHES] == [0.1, 0.1, 0.05] * 2


# ---- what is put back ------------------------------------------------------------------------------------------------


class Adaptive(optim.SGD):
    """Doubles a step size of its own at each step, which it keeps in its group, as Prodigy does with `d`."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, 1.0)
        for group in self.param_groups:
            group["d"] = 1e-6

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["d"] *= 2
        return super().step(closure)


@pytest.mark.parametrize("make", [None, cosine, lambda t, o: s.ExponentialLR(o, 0.5)])
def test_an_optimizer_keeps_its_adaptive_step(make: Any) -> None:
    module = TinyModule(Adaptive) if make is None else Scheduled(make)
    module.make_optimizer = Adaptive
    trainer(INQCallback(), max_epochs=8).fit(module)
    assert module.optimizers().param_groups[0]["d"] == pytest.approx(1e-6 * 2**32)


def test_a_reset_gives_back_the_state_that_an_optimizer_began_with() -> None:
    class Sums(Callback):
        def __init__(self) -> None:
            self.sums: list[float] = []

        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            state = trainer.optimizers[0].state
            self.sums.append(sum(float(value["sum"].mean()) for value in state.values()) / len(state))

    sums = Sums()
    module = TinyModule(lambda p: optim.Adagrad(p, 0.1, initial_accumulator_value=0.5))
    callback = INQCallback(reset_optimizer=True)
    trainer(callback, sums).fit(module)
    assert sums.sums[::BATCHES] == [0.5] * 4
    assert min(sums.sums[1::BATCHES]) > 0.5
    assert_quantized(module, callback)


class Unfreezes(BaseFinetuning):
    """Adds the first layer to the optimizer in the second epoch."""

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: optim.Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.03)


class Finetuned(Scheduled):
    """Its scheduler takes parameter groups that come later; not every one does."""

    def __init__(self) -> None:
        super().__init__(lambda t, o: s.MultiStepLR(o, [3, 6], 0.5))
        self.later: Rates = []

    def configure_optimizers(self) -> Any:
        self.make_optimizer = lambda _: optim.SGD(self.net[3].parameters(), 0.1, momentum=0.9)
        return super().configure_optimizers()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        groups = self.optimizers().param_groups
        self.later.append(groups[1]["lr"] if len(groups) > 1 else 0.0)


@pytest.mark.parametrize("first", [False, True], ids=["finetuning-last", "finetuning-first"])
def test_a_group_added_later_goes_back_to_what_it_was_added_with(first: bool, tmp_path: Path) -> None:
    def run(folder: Path, **options: Any) -> Finetuned:
        module, callback, saved = (
            Finetuned(),
            INQCallback(),
            ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1),
        )
        others = [Unfreezes(), callback] if first else [callback, Unfreezes()]
        fitted = trainer(*others, saved, max_epochs=8, enable_checkpointing=True)
        fitted.fit(module, **options)
        assert_quantized(module, callback)
        return module

    module = run(tmp_path / "whole")
    later = in_phases(module.later, 4)
    assert later[0][:4] == [0.0] * 4
    assert later[0][4] == 0.03
    assert later[1][0] == later[2][0] == later[3][0] == 0.03
    assert later[1] == later[2] == later[3]
    for step in (6, 11, 16, 21):
        (path,) = (tmp_path / "whole").glob(f"*step={step}.ckpt")
        resumed = run(tmp_path / f"from-{step}", ckpt_path=path)
        assert resumed.later == module.later[-len(resumed.later) :]


# ---- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "interval"),
    [(one_cycle, "step"), (linear_with_warm_up, "step"), (cosine, "epoch"), (warm_up, "epoch")],
    ids=["onecycle", "warm-up-linear", "cosine", "warm-up-cosine"],
)
@pytest.mark.parametrize("schedule", [None, {1: 0.5, 4: 1.0}], ids=["spread", "later"])
def test_a_run_resumed_within_a_phase_has_the_same_rates_and_weights(
    make: Any, interval: str, schedule: Any, tmp_path: Path
) -> None:
    def run(folder: Path, **options: Any) -> Scheduled:
        module, callback = Scheduled(make, interval), INQCallback(schedule=schedule)
        saved = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1)
        trainer(callback, saved, max_epochs=8, enable_checkpointing=True).fit(module, **options)
        assert_quantized(module, callback)
        return module

    module = run(tmp_path / "whole")
    for step in (1, 3, 8, 11, 20, 30):
        (path,) = (tmp_path / "whole").glob(f"*step={step}.ckpt")
        resumed = run(tmp_path / f"from-{step}", ckpt_path=path)
        assert resumed.rates == module.rates[step:]
        assert resumed.momenta == module.momenta[step:]
        assert_same_state(resumed, module)


@pytest.mark.parametrize("schedule", [{0: 0.5, 2: 1.0}, {2: 0.5, 4: 1.0}])
def test_a_checkpoint_of_a_run_without_inq_gives_phases_their_whole_curve(schedule: Any, tmp_path: Path) -> None:
    before = Scheduled(cosine)
    saved = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1)
    trainer(saved, max_epochs=8, enable_checkpointing=True).fit(before)
    module = Scheduled(cosine)
    trainer(INQCallback(schedule=schedule), max_epochs=8).fit(module, ckpt_path=tmp_path / "epoch=1-step=8.ckpt")
    run = before.rates[::BATCHES]
    phases = {2: (0, 8, 24), 4: (8, 16, 24)}[max(schedule)]
    for begin, end in itertools.pairwise(phases):
        assert module.rates[begin:end] == squeezed(run, end - begin)
    if min(schedule):  # what comes before the first phase lasts from the run's very start
        assert module.rates[:8] == squeezed(run, 16)[8:]


def test_a_longer_run_resumes_at_its_own_position(tmp_path: Path) -> None:
    saved = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    schedule = {0: 0.5, 2: 1.0}
    trainer(INQCallback(schedule=schedule), saved, max_epochs=4, enable_checkpointing=True).fit(Scheduled(cosine))
    module = Scheduled(cosine)
    trainer(INQCallback(schedule=schedule), max_epochs=10).fit(module, ckpt_path=tmp_path / "epoch=2-step=12.ckpt")
    run = rates_without_inq(Scheduled(cosine), max_epochs=10)[::BATCHES]
    assert module.rates == squeezed(run, 32)[4:]


# ---- beside other callbacks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [False, True], ids=["monitor-last", "monitor-first"])
@pytest.mark.parametrize(("make", "interval"), [(one_cycle, "step"), (cosine, "epoch")])
def test_the_learning_rate_monitor_shows_what_is_used(make: Any, interval: str, first: bool, tmp_path: Path) -> None:
    module, callback, monitor = Scheduled(make, interval), INQCallback(), LearningRateMonitor()
    callbacks = [monitor, callback] if first else [callback, monitor]
    logger = CSVLogger(tmp_path, "", "")
    trainer(*callbacks, max_epochs=8, logger=logger, log_every_n_steps=1).fit(module)
    logger.save()
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    shown = [float(row["lr-SGD"]) for row in rows if row.get("lr-SGD")]
    assert shown == (module.rates if interval == "step" else module.rates[::BATCHES])


def test_the_learning_rate_finders_rate_is_where_phases_begin(tmp_path: Path) -> None:
    class Tuned(Scheduled):
        def __init__(self) -> None:
            super().__init__(one_cycle_of, "step")
            self.lr = 1e-4

        def configure_optimizers(self) -> Any:
            self.make_optimizer = lambda p: optim.SGD(p, self.lr)
            return super().configure_optimizers()

    def one_cycle_of(trainer: Trainer, optimizer: optim.Optimizer) -> Any:
        return s.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / trainer.estimated_stepping_batches))

    module = Tuned()
    finder = LearningRateFinder(num_training_steps=20, early_stop_threshold=None)
    trainer(finder, INQCallback(), max_epochs=8, default_root_dir=tmp_path).fit(module)
    rates = in_phases(module.rates[-32:], 4)
    assert rates[0] == rates[1] == rates[2] == rates[3]
    assert rates[0][0] == module.lr


def test_weight_averaging_takes_the_rate_over(tmp_path: Path) -> None:
    module = Scheduled(cosine)
    averaging = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=6, annealing_epochs=1)
    callback = INQCallback(schedule={0: 0.5, 2: 1.0})
    trainer(callback, averaging, max_epochs=8).fit(module)
    assert module.rates[-4:] == pytest.approx([0.05] * 4)


# ---- leaving no trace ------------------------------------------------------------------------------------------------


def test_schedulers_are_given_back_after_the_run_and_after_an_error() -> None:
    class Fails(Scheduled):
        def on_train_epoch_end(self) -> None:
            if self.current_epoch == 5:
                assert type(self.lr_schedulers()) is not s.OneCycleLR
                assert isinstance(self.lr_schedulers(), s.OneCycleLR)
                raise RuntimeError("stop")

    done, failed = Scheduled(one_cycle, "step"), Fails(one_cycle, "step")
    trainer(INQCallback(), max_epochs=8).fit(done)
    with pytest.raises(RuntimeError, match="stop"):
        trainer(INQCallback(), max_epochs=8).fit(failed)
    for module in (done, failed):
        assert type(module.lr_schedulers()) is s.OneCycleLR
        assert set(module.lr_schedulers().state_dict()) == set(
            one_cycle(trainer_of(), done.optimizers().optimizer).state_dict()
        )


def trainer_of() -> Any:
    class Length:
        estimated_stepping_batches = 8

    return Length()


def test_without_restarts_nothing_is_touched(caplog: pytest.LogCaptureFixture) -> None:
    run = rates_without_inq(Scheduled(one_cycle, "step"), max_epochs=8)
    module = Scheduled(one_cycle, "step")
    with caplog.at_level(logging.INFO):
        trainer(INQCallback(restart_lr=False), max_epochs=8).fit(module)
    assert module.rates == run
    assert not [record for record in caplog.records if "Learning rate" in record.message]


def test_a_single_phase_has_the_schedule_as_it_is() -> None:
    module = Scheduled(one_cycle, "step")
    trainer(INQCallback(schedule={0: 1.0}), max_epochs=4).fit(module)
    assert module.rates == rates_without_inq(Scheduled(one_cycle, "step"), max_epochs=4)


# ---- the length of a phase -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("callback", "options", "steps", "epochs"),
    [
        (None, {"max_epochs": 8}, 32, 8),
        (INQCallback(restart_lr=False), {"max_epochs": 8}, 32, 8),
        (INQCallback(), {"max_epochs": 8}, 8, 2),
        (INQCallback(), {"max_epochs": 8, "accumulate_grad_batches": 3}, 4, 2),
        (INQCallback(schedule={1: 0.5, 3: 1.0}), {"max_epochs": 8}, 20, 5),
        (INQCallback(), {"max_steps": 16, "max_epochs": -1}, 4, 1),
        (INQCallback(schedule=Schedule([0.5, 1.0], [0, 6], "step")), {"max_epochs": 4}, 10, 3),
        (INQCallback(schedule={0: 0.5, 2: 1.0}), {"max_epochs": 8, "max_steps": 14}, 8, 2),
    ],
)
def test_the_length_of_a_phase_is_known_when_optimizers_are_configured(
    callback: INQCallback | None, options: dict[str, int], steps: int, epochs: int
) -> None:
    lengths: list[tuple[int, int]] = []

    class Asks(TinyModule):
        def configure_optimizers(self) -> Any:
            lengths.append((phase_length(self.trainer), phase_length(self.trainer, "epoch")))
            return super().configure_optimizers()

    trainer(*([callback] if callback else []), **options).fit(Asks())
    assert lengths == [(steps, epochs)]


def test_a_phase_without_a_known_length_is_refused() -> None:
    class Asks(TinyModule):
        def configure_optimizers(self) -> Any:
            phase_length(self.trainer)

    with pytest.raises(ValueError, match="nothing says how many steps a phase of this run has: set the Trainer's max"):
        trainer(INQCallback(schedule={0: 0.5, 1: 1.0}), max_epochs=-1).fit(Asks())
    with pytest.raises(ValueError, match=r"unit.*'epochs'"):
        phase_length(trainer(), "epochs")
