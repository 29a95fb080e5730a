from __future__ import annotations

import csv
import io
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from support import SCHEDULE, TinyModule, Witness, assert_quantized, same_bits, trainer, weights
from torch import nn, optim
from torch.optim import lr_scheduler

from inq_lightning import INQCallback, PowerOfTwoGrid, Schedule
from inq_lightning.core.schedule import PRESETS


def fit(module: LightningModule, callback: INQCallback, *others: Callback, **options: Any) -> Trainer:
    run = trainer(callback, *others, **options)
    run.fit(module)
    return run


OPTIMIZERS: dict[str, Callable[..., optim.Optimizer]] = {
    "sgd": lambda p, **k: optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2, **k),
    "nesterov": lambda p, **k: optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-2, **k),
    "adam": lambda p, **k: optim.Adam(p, lr=1e-2, weight_decay=1e-2, **k),
    "adamw": lambda p, **k: optim.AdamW(p, lr=1e-2, weight_decay=0.1, **k),
    "rmsprop": lambda p, **k: optim.RMSprop(p, lr=1e-3, momentum=0.9, weight_decay=1e-2, **k),
    "adagrad": lambda p, **k: optim.Adagrad(p, lr=1e-2, weight_decay=1e-2, **k),
}
SLOW = {"foreach": True}  # test_frozen.py has it under each optimizer in the default run
VARIANTS = [
    pytest.param(name, variant, marks=[pytest.mark.slow] * (variant == SLOW))
    for name in OPTIMIZERS
    for variant in ({}, SLOW, {"fused": True})
    if not (name == "rmsprop" and variant.get("fused"))  # torch has no fused RMSprop
]


@pytest.mark.parametrize(
    ("name", "variant"), VARIANTS, ids=lambda v: v if isinstance(v, str) else "-".join(v) or "loop"
)
def test_frozen_weights_stay_bit_identical_through_hundreds_of_steps(name: str, variant: dict[str, bool]) -> None:
    module = TinyModule(lambda p: OPTIMIZERS[name](p, **variant))
    callback = INQCallback(schedule={0: 0.5, 10: 0.75, 20: 0.875, 40: 1.0})
    witness = Witness(callback)
    fit(module, callback, witness, max_epochs=60)
    assert witness.checks > 240
    assert_quantized(module, callback)


def test_free_weights_train_as_they_would_without_the_callback() -> None:
    plain, watched = TinyModule(), TinyModule()
    trainer(max_epochs=2).fit(plain)
    fit(watched, INQCallback(schedule={2: 1.0}), max_epochs=3, limit_train_batches=4)
    again = TinyModule()
    callback = INQCallback(schedule={2: 1.0})
    stop = StopAfter(8)
    fit(again, callback, stop, max_epochs=3)
    assert same_bits(stop.weights["net.0.weight"], plain.net[0].weight.detach())
    assert same_bits(stop.weights["net.3.weight"], plain.net[3].weight.detach())


class StopAfter(Callback):
    """Copies the weights after so many steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.weights: dict[str, torch.Tensor] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step == self.steps:
            self.weights = {n: p.detach().clone() for n, p in pl_module.named_parameters()}


def test_every_phase_freezes_the_largest_free_weights_in_exact_numbers() -> None:
    module = TinyModule()
    before = module.net[0].weight.detach().clone()
    callback = INQCallback(schedule={0: 0.3, 1: 1.0})

    class Look(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.current_epoch == 0:
                mask = callback.frozen_mask("net.0.weight")
                largest = before.abs().flatten().topk(round(0.3 * before.numel())).indices.sort().values
                assert torch.equal(mask.flatten().nonzero().squeeze(1), largest)
                grid = PowerOfTwoGrid.from_weights(before)
                assert same_bits(pl_module.net[0].weight.detach()[mask], grid.quantize(before)[mask])
                assert same_bits(pl_module.net[0].weight.detach()[~mask], before[~mask])

    fit(module, callback, Look(), max_epochs=2)


def test_norms_and_biases_go_on_training_after_the_last_phase() -> None:
    module, callback = TinyModule(), INQCallback(schedule={0: 1.0})
    quantized = PowerOfTwoGrid.from_weights(module.net[0].weight.detach()).quantize(module.net[0].weight.detach())
    bias, gamma = module.net[3].bias.detach().clone(), module.net[1].weight.detach().clone()
    fit(module, callback, max_epochs=3)
    assert same_bits(module.net[0].weight.detach(), quantized)
    assert not torch.equal(module.net[3].bias, bias)
    assert not torch.equal(module.net[1].weight, gamma)


def test_parameters_keys_and_forward_stay_untouched() -> None:
    module = TinyModule()
    names, keys = [n for n, _ in module.named_parameters()], list(module.state_dict())
    identities = [id(p) for p in module.parameters()]
    fit(module, INQCallback(schedule=SCHEDULE))
    assert [n for n, _ in module.named_parameters()] == names
    assert list(module.state_dict()) == keys
    assert [id(p) for p in module.parameters()] == identities
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in module.modules())


def test_per_layer_bits_and_patterns_reach_the_layers() -> None:
    module, callback = TinyModule(), INQCallback(3, SCHEDULE, layer_bits={"net.3": 8})
    fit(module, callback)
    assert [(layer.name, layer.bits) for layer in callback.layers] == [("net.0.weight", 3), ("net.3.weight", 8)]
    assert_quantized(module, callback)
    callback = INQCallback(schedule=SCHEDULE, exclude=["net.0"])
    fit(TinyModule(), callback)
    assert [layer.name for layer in callback.layers] == ["net.3.weight"]


# ---- schedule and length of the run ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_without_a_schedule_the_papers_portions_are_spread_over_the_epochs(bits: int) -> None:
    portions = PRESETS["resnet18" if bits >= 5 else f"{bits}bit"]
    module, callback = TinyModule(), INQCallback(bits)
    seen = Fractions(callback)
    fit(module, callback, seen, max_epochs=2 * len(portions), limit_train_batches=1)
    numels = [112, 56]
    expected = [sum(round(p * n) for n in numels) / sum(numels) for p in portions for _ in range(2)]
    assert seen.fractions == expected


class Fractions(Callback):
    """Notes the quantized fraction in every epoch."""

    def __init__(self, callback: INQCallback) -> None:
        self.callback = callback
        self.fractions: list[float] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.fractions.append(self.callback.quantized_fraction)


def test_a_schedule_in_steps_raises_the_portion_at_those_steps() -> None:
    module = TinyModule()
    callback = INQCallback(schedule=Schedule([0.25, 0.5, 1.0], [1, 5, 6], unit="step"))
    witness = Witness(callback)
    fit(module, callback, witness, max_epochs=2)
    assert witness.fractions[:8] == [0.0, 0.25, 0.25, 0.25, 0.25, 0.5, 1.0, 1.0]


def test_a_trainer_limited_by_steps_spreads_the_default_schedule_over_them() -> None:
    module, callback = TinyModule(), INQCallback()
    witness = Witness(callback)
    fit(module, callback, witness, max_epochs=-1, max_steps=8)
    assert witness.fractions[:8] == [0.5, 0.5, 0.75, 0.75, 0.875, 0.875, 1.0, 1.0]


@pytest.mark.parametrize(
    ("schedule", "options", "message"),
    [
        ({0: 0.5, 4: 1.0}, {"max_epochs": 4}, "epoch 4 .* runs only 4 epochs"),
        ({7: 1.0}, {"max_epochs": 4}, "epoch 7 .* runs only 4 epochs"),
        (None, {"max_epochs": 3}, "at least 4 epochs"),
        ("2bit", {"max_epochs": 9}, "at least 10 epochs"),
        ({0: 0.5, 2: 1.0}, {"max_steps": 8}, "runs only 2 epochs"),
        (Schedule([0.5, 1.0], [0, 16], "step"), {"max_epochs": 4}, "step 16 .* runs only 16 steps"),
        (Schedule([0.5, 1.0], [0, 8], "step"), {"accumulate_grad_batches": 2}, "step 8 .* runs only 8 steps"),
        (None, {"max_epochs": -1}, "set max_epochs or max_steps"),
    ],
)
def test_a_run_that_cannot_reach_portion_1_is_refused_before_training(
    schedule: Any, options: dict[str, int], message: str
) -> None:
    module = TinyModule()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        fit(module, INQCallback(schedule=schedule), **options)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


@pytest.mark.parametrize("schedule", [None, {0: 0.5, 4: 1.0}, {3: 1.0}])
def test_fast_dev_run_is_exempt(schedule: Any) -> None:
    callback = INQCallback(schedule=schedule)
    with pytest.warns(UserWarning, match="of the selected weights quantized"):
        Trainer(callbacks=[callback], fast_dev_run=True, accelerator="cpu", enable_model_summary=False).fit(
            TinyModule()
        )
    assert callback.quantized_fraction < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 1}, "bits must be an integer from 2 to 8, got 1"),
        ({"bits": 4.0}, "bits must be an integer from 2 to 8, got 4.0"),
        ({"bits": True}, "got True"),
        ({"partition": "largest"}, "partition must be one of magnitude, random, got 'largest'"),
        ({"underflow": "floor"}, "underflow must be one of nearest, truncate, got 'floor'"),
        ({"schedule": "resnet19"}, "unknown schedule 'resnet19'.*did you mean resnet18"),
        ({"schedule": {0: 0.5, 1: 0.4}}, "larger than the one before"),
        ({"schedule": {0: 0.5, 1: 0.9}}, "last portion must be 1.0"),
        ({"schedule": {0: 1.5}}, r"portions must lie in \(0, 1\], got 1.5"),
        ({"schedule": 0.5}, "schedule"),
        ({"layer_bits": {"net.0": 9}}, "got 9"),
        ({"seed": -1}, "seed must be a whole number"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        INQCallback(**arguments)


# ---- learning rate and optimizer state -------------------------------------------------------------------------------

SCHEDULERS: dict[str, Callable[[optim.Optimizer], Any]] = {
    "step": lambda o: lr_scheduler.StepLR(o, 1, 0.5),
    "multistep": lambda o: lr_scheduler.MultiStepLR(o, [1], 0.1),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 2),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.5**epoch),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, 3),
    "linear": lambda o: lr_scheduler.LinearLR(o, total_iters=3),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 1), lr_scheduler.ExponentialLR(o, 0.5)], [1]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 1), lr_scheduler.ExponentialLR(o, 0.5)]
    ),
    "plateau": lambda o: {
        "scheduler": lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5, threshold=1e9),
        "monitor": "loss",
    },
    "onecycle": lambda o: {"scheduler": lr_scheduler.OneCycleLR(o, 0.1, total_steps=8), "interval": "step"},
    "cyclic": lambda o: {"scheduler": lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3), "interval": "step"},
}


class Rates(Callback):
    """Notes the options of the first parameter group before every batch."""

    def __init__(self) -> None:
        self.rates: list[tuple[float, float]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        group = trainer.optimizers[0].param_groups[0]
        self.rates.append((group["lr"], group["momentum"]))


class LoggingModule(TinyModule):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.log("loss", torch.tensor(1.0), on_epoch=True, on_step=False)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_learning_rate_schedule_restarts_at_each_phase(name: str) -> None:
    def rates(restart_lr: bool) -> list[tuple[float, float]]:
        seen = Rates()
        callback = INQCallback(schedule={0: 0.5, 2: 0.75, 4: 1.0}, restart_lr=restart_lr)
        fit(LoggingModule(scheduler=SCHEDULERS[name]), callback, seen, max_epochs=6 if restart_lr else 2 + 3)
        return seen.rates

    restarted = rates(True)
    assert len(set(restarted)) > 1
    assert restarted[:8] == restarted[8:16] == restarted[16:]


def test_without_restart_the_schedule_goes_on() -> None:
    seen = Rates()
    module = TinyModule(scheduler=lambda o: lr_scheduler.StepLR(o, 1, 0.5))
    fit(module, INQCallback(schedule=SCHEDULE, restart_lr=False), seen)
    assert [rate for rate, _ in seen.rates[::4]] == [0.1, 0.05, 0.025, 0.0125]


@pytest.mark.parametrize("reset", [False, True])
def test_optimizer_state_is_reset_on_request(reset: bool) -> None:
    class Look(Callback):
        def __init__(self) -> None:
            self.states: list[int] = []

        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.states.append(len(trainer.optimizers[0].state))

    look = Look()
    fit(TinyModule(), INQCallback(schedule={0: 0.5, 2: 1.0}, reset_optimizer=reset), look, max_epochs=3)
    assert look.states == [0, 6, 0 if reset else 6]


# ---- logging ---------------------------------------------------------------------------------------------------------


def logged(folder: Path, column: str) -> list[float]:
    rows = list(csv.DictReader(io.StringIO((folder / "metrics.csv").read_text())))
    return [float(row[column]) for row in rows if row.get(column)]


def test_fraction_phase_and_noise_are_logged_every_epoch(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    callback = INQCallback(schedule={0: 0.5, 2: 1.0}, log_per_layer=True)
    run = fit(TinyModule(), callback, logger=logger, max_epochs=3)
    assert logged(tmp_path, "inq/quantized_fraction") == [0.5, 0.5, 1.0]
    assert logged(tmp_path, "inq/phase") == [1, 1, 2]
    first, same, last = logged(tmp_path, "inq/sqnr_db")
    assert first == same != last
    assert 5 < first < 40
    assert 5 < last < 40
    state = callback.state_dict()
    assert last == pytest.approx(10 * math.log10(state["rounding"][0] / state["rounding"][1]))
    assert logged(tmp_path, "inq/quantized_fraction_per_layer/net.3.weight") == [0.5, 0.5, 1.0]
    assert run.callback_metrics["inq/quantized_fraction"] == 1.0


def test_the_noise_of_the_whole_network_hardly_moves_as_small_weights_freeze_and_is_kept_on_resuming(
    tmp_path: Path,
) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    module = TinyModule(lambda p: torch.optim.SGD(p, lr=0.0))  # the weights that are rounded are those of the beginning
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    callback = INQCallback(schedule=SCHEDULE)
    middle = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer(callback, middle, logger=logger, enable_checkpointing=True).fit(module)
    ratios = logged(tmp_path, "inq/sqnr_db")
    noise = sum(float((before[x.name] - module.get_parameter(x.name)).square().sum()) for x in callback.layers)
    signal = sum(float(before[x.name].square().sum()) for x in callback.layers)
    assert ratios[-1] == pytest.approx(10 * math.log10(signal / noise), abs=1e-3)
    assert min(ratios) > ratios[0] - 3

    (folder := tmp_path / "resumed").mkdir()
    again = CSVLogger(folder, name="", version="")
    resumed = TinyModule(lambda p: torch.optim.SGD(p, lr=0.0))
    trainer(INQCallback(schedule=SCHEDULE), logger=again).fit(resumed, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert logged(folder, "inq/sqnr_db") == ratios[2:]


def test_the_progress_bar_shows_the_fraction_of_the_running_epoch() -> None:
    class Look(Callback):
        def __init__(self) -> None:
            self.shown: list[float] = []

        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            self.shown.append(float(trainer.progress_bar_metrics.get("inq/quantized_fraction", -1)))

    look = Look()
    fit(TinyModule(), INQCallback(schedule={0: 0.5, 1: 1.0}), look, max_epochs=2)
    assert look.shown[1:4] == [0.5] * 3
    assert look.shown[5:] == [1.0] * 3


def test_step_schedules_are_logged_by_step(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    callback = INQCallback(schedule=Schedule([0.5, 1.0], [0, 3], "step"))
    fit(TinyModule(), callback, logger=logger, max_epochs=2, log_every_n_steps=1)
    assert logged(tmp_path, "inq/quantized_fraction") == [0.5] * 3 + [1.0] * 5


# ---- the end ---------------------------------------------------------------------------------------------------------


def test_weights_moved_behind_the_callbacks_back_fail_loudly(tmp_path: Path) -> None:
    class Meddler(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            with torch.no_grad():
                pl_module.net[0].weight[0, 0] += 0.01

    with pytest.raises(RuntimeError, match=r"net\.0\.weight: 1 of 112 frozen weights"):
        fit(TinyModule(), INQCallback(schedule=SCHEDULE), Meddler(), default_root_dir=tmp_path)


def test_ending_early_is_said() -> None:
    class Stop(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            raise KeyboardInterrupt

    callback = INQCallback(schedule=SCHEDULE)
    with pytest.raises(SystemExit):
        fit(TinyModule(), callback, Stop())
    assert callback.quantized_fraction == 0.5


def test_unknown_names_are_refused_with_near_ones() -> None:
    callback = INQCallback(schedule=SCHEDULE)
    fit(TinyModule(), callback)
    with pytest.raises(KeyError, match=r"net\.0\.weight"):
        callback.frozen_mask("net.0.wieght")


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def test_the_callback_can_be_pickled_and_used_again() -> None:
    callback = INQCallback(schedule=SCHEDULE)
    first, second = TinyModule(), TinyModule()
    again = pickle.loads(pickle.dumps(callback))
    fit(first, callback)
    fit(second, again)
    assert_quantized(second, again)
    assert same_bits(first.net[0].weight.detach(), second.net[0].weight.detach())
    third = TinyModule()
    fit(third, callback)
    assert same_bits(first.net[0].weight.detach(), third.net[0].weight.detach())


@pytest.mark.parametrize("partition", ["magnitude", "random"])
@pytest.mark.parametrize("step", range(1, 16))
def test_resuming_from_any_step_ends_bit_identical(tmp_path: Path, step: int, partition: Any) -> None:
    def module() -> TinyModule:
        return TinyModule(scheduler=lambda o: lr_scheduler.ExponentialLR(o, 0.7))

    whole = module()
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(whole, INQCallback(schedule=SCHEDULE, partition=partition), saver, enable_checkpointing=True)
    resumed, callback = module(), INQCallback(schedule=SCHEDULE, partition=partition)
    trainer(callback).fit(resumed, ckpt_path=tmp_path / f"step={step}.ckpt")
    assert_quantized(resumed, callback)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_a_checkpoint_grows_by_little_more_than_a_bit_a_weight(tmp_path: Path) -> None:
    class Wide(TinyModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 500), nn.BatchNorm1d(500), nn.Linear(500, 500), nn.Linear(500, 4))

    sizes = []
    for callbacks in ([], [INQCallback(schedule=SCHEDULE)]):
        run = trainer(*callbacks)
        run.fit(Wide())
        run.save_checkpoint(tmp_path / "c.ckpt", weights_only=False)
        sizes.append((tmp_path / "c.ckpt").stat().st_size)
    assert sizes[1] - sizes[0] < 4 * 256_000 / 24


def test_weights_of_any_trainer_test_without_the_callback(tmp_path: Path) -> None:
    module, callback = TinyModule(), INQCallback(schedule=SCHEDULE)
    fit(module, callback).save_checkpoint(tmp_path / "c.ckpt", weights_only=False)
    plain = TinyModule(seed=1)
    trainer(limit_test_batches=1).test(plain, ckpt_path=tmp_path / "c.ckpt", verbose=False)
    for name, w in weights(module, callback).items():
        assert same_bits(w, dict(plain.named_parameters())[name].detach())


# ---- batches that the module takes itself ----------------------------------------------------------------------------


class TakesTheIterator(TinyModule):
    def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
        batch, _, _ = next(dataloader_iter)
        return self.loss(batch)


@pytest.mark.parametrize("schedule", [SCHEDULE, Schedule([0.25, 0.5, 1.0], [1, 5, 6], "step")])
@pytest.mark.parametrize("per_layer", [False, True])
def test_a_training_step_that_takes_the_iterator_trains_as_one_that_takes_batches(
    schedule: Any, per_layer: bool, tmp_path: Path
) -> None:
    def rates(optimizer: optim.Optimizer) -> Any:
        return lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=16)

    plain, module = TinyModule(scheduler=rates), TakesTheIterator(scheduler=rates)
    fit(plain, INQCallback(schedule=schedule))
    callback = INQCallback(schedule=schedule, log_per_layer=per_layer)
    fit(module, callback, logger=CSVLogger(tmp_path, name="", version=""), log_every_n_steps=1)
    assert_quantized(module, callback)
    assert same_bits(plain.net[0].weight.detach(), module.net[0].weight.detach())
    assert logged(tmp_path, "inq/quantized_fraction")[-1] == 1.0
