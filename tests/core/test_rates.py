from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn, optim
from torch.optim import lr_scheduler as s

from inq_lightning.core.rates import LearningRates, fitted, is_whole, pace, position

Make = Callable[[optim.Optimizer], Any]
RUN, PHASE = 40, 10  # steps of the run and of each of its four phases


def sgd(lr: float = 0.1) -> optim.SGD:
    return optim.SGD([nn.Parameter(torch.ones(2))], lr=lr, momentum=0.9)


def curve(make: Make, steps: int = RUN) -> list[float]:
    optimizer = sgd()
    scheduler = make(optimizer)
    rates = [optimizer.param_groups[0]["lr"]]
    for _ in range(steps):
        try:
            scheduler.step()
        except ValueError:
            break
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def warm_up(optimizer: optim.Optimizer, steps: int, rest: s.LRScheduler) -> s.LRScheduler:
    return s.SequentialLR(optimizer, [s.LinearLR(optimizer, 0.01, total_iters=steps), rest], [steps])


def to_zero(warm: int, end: int) -> Callable[[int], float]:
    """Up from zero and down to it, as the schedules of `transformers` are."""
    return lambda step: step / warm if step < warm else max(0.0, (end - step) / (end - warm))


def cosine_to_zero(warm: int, end: int) -> Callable[[int], float]:
    """The same along a cosine, which would rise again after the end."""
    return lambda step: step / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / (end - warm)))


def noam(step: int) -> float:
    return min((step + 1) ** -0.5, (step + 1) * 6**-1.5)


FOR_THE_RUN: dict[str, Make] = {
    "one cycle": lambda o: s.OneCycleLR(o, 0.1, total_steps=RUN),
    "one cycle of three parts": lambda o: s.OneCycleLR(o, 0.1, total_steps=RUN, three_phase=True),
    "one cycle, linear": lambda o: s.OneCycleLR(o, 0.1, total_steps=RUN, anneal_strategy="linear"),
    "cosine": lambda o: s.CosineAnnealingLR(o, RUN),
    "half a cosine": lambda o: s.CosineAnnealingLR(o, 2 * RUN),
    "cosine down and up": lambda o: s.CosineAnnealingLR(o, RUN // 2),
    "polynomial": lambda o: s.PolynomialLR(o, RUN, 0.9),
    "polynomial of 30": lambda o: s.PolynomialLR(o, 30),
    "linear": lambda o: s.LinearLR(o, 1.0, 0.01, RUN),
    "long warm-up": lambda o: s.LinearLR(o, 0.01, total_iters=15),
    "constant at first": lambda o: s.ConstantLR(o, 0.1, PHASE),
    "milestones": lambda o: s.MultiStepLR(o, [20, 30]),
    "a milestone at a phase's end": lambda o: s.MultiStepLR(o, [PHASE]),
    "stairs longer than a phase": lambda o: s.StepLR(o, 12),
    "stairs as long as a phase": lambda o: s.StepLR(o, PHASE),
    "warm-up, cosine": lambda o: warm_up(o, 4, s.CosineAnnealingLR(o, RUN - 4)),
    "warm-up, exponential": lambda o: warm_up(o, 4, s.ExponentialLR(o, 0.9)),
    "linear with warm-up": lambda o: s.LambdaLR(o, to_zero(5, RUN)),
    "cosine with warm-up": lambda o: s.LambdaLR(o, cosine_to_zero(5, RUN)),
    "warm-up as long as a phase": lambda o: s.LambdaLR(o, to_zero(PHASE, RUN)),
    "inverse square root": lambda o: s.LambdaLR(o, noam),
    "warm restarts that grow": lambda o: s.CosineAnnealingWarmRestarts(o, 5, 2),
}
FOR_A_PHASE: dict[str, Make] = {
    "one cycle": lambda o: s.OneCycleLR(o, 0.1, total_steps=PHASE),
    "one cycle, linear": lambda o: s.OneCycleLR(o, 0.1, total_steps=PHASE, anneal_strategy="linear"),
    "cosine": lambda o: s.CosineAnnealingLR(o, PHASE),
    "shorter cosine": lambda o: s.CosineAnnealingLR(o, 7),
    "polynomial": lambda o: s.PolynomialLR(o, PHASE),
    "linear": lambda o: s.LinearLR(o, 1.0, 0.01, PHASE),
    "warm-up": lambda o: s.LinearLR(o, 0.01, total_iters=5),
    "milestones": lambda o: s.MultiStepLR(o, [5, 8]),
    "exponential": lambda o: s.ExponentialLR(o, 0.95),
    "exponential down to nothing": lambda o: s.ExponentialLR(o, 1e-10),
    "multiplicative": lambda o: s.MultiplicativeLR(o, lambda step: 0.95),
    "a power": lambda o: s.LambdaLR(o, lambda step: 0.95**step),
    "stairs": lambda o: s.StepLR(o, 3),
    "cyclic": lambda o: s.CyclicLR(o, 0.01, 0.1, 3, mode="triangular2"),
    "warm restarts": lambda o: s.CosineAnnealingWarmRestarts(o, 5),
    "warm-up, cosine": lambda o: warm_up(o, 2, s.CosineAnnealingLR(o, PHASE - 2)),
    "linear with warm-up": lambda o: s.LambdaLR(o, to_zero(2, PHASE)),
    "cosine with warm-up": lambda o: s.LambdaLR(o, cosine_to_zero(2, PHASE)),
}


@pytest.mark.parametrize("name", FOR_THE_RUN)
def test_a_schedule_made_for_the_run_is_told_by_its_curve(name: str) -> None:
    assert fitted(curve(FOR_THE_RUN[name]), [0, PHASE, PHASE, PHASE, PHASE]) == [0, RUN, RUN, RUN, RUN]


@pytest.mark.parametrize("name", FOR_A_PHASE)
def test_a_schedule_made_for_a_phase_is_told_by_its_curve(name: str) -> None:
    assert fitted(curve(FOR_A_PHASE[name]), [0, PHASE, PHASE, PHASE, PHASE]) == [0, PHASE, PHASE, PHASE, PHASE]


@pytest.mark.parametrize(
    ("make", "phases", "spans"),
    [
        (lambda o: s.CosineAnnealingLR(o, 20), [5, 15, 20], [20, 20, 20]),  # made for the longest phase
        (lambda o: s.CosineAnnealingLR(o, 5), [5, 15, 20], [5, 15, 20]),  # for the shortest: it rises again, as told
        (lambda o: s.OneCycleLR(o, 0.1, total_steps=5), [5, 15, 20], [5, 5, 5]),  # which would fail after its end
        (lambda o: s.OneCycleLR(o, 0.1, total_steps=25), [5, 15, 20], [25, 25, 25]),
        (lambda o: s.OneCycleLR(o, 0.1, total_steps=RUN), [30, 10], [RUN, RUN]),
        (lambda o: s.CosineAnnealingLR(o, RUN), [0, RUN], [0, RUN]),
        (lambda o: s.ExponentialLR(o, 0.9), [1, 39], [39, 39]),
    ],
)
def test_phases_that_differ_each_have_a_whole_schedule(make: Make, phases: list[int], spans: list[int]) -> None:
    assert fitted(curve(make), phases) == spans


def test_a_flat_beginning_is_no_schedule() -> None:
    assert not is_whole([1.0, 1.0, 0.1, 0.1, 0.1], 2)
    assert is_whole([1.0, 1.0, 0.1, 0.1, 0.1], 3)


@pytest.mark.parametrize(
    ("make", "steps"),
    [
        (lambda o: s.ExponentialLR(o, 0.5), 1),
        (lambda o: s.StepLR(o, 4), 4),
        (lambda o: s.StepLR(o, 30), None),  # once is no pace
        (lambda o: s.MultiStepLR(o, [10, 30]), None),
        (lambda o: s.CosineAnnealingLR(o, RUN), None),
        (lambda o: s.ConstantLR(o, 1.0), None),
    ],
)
def test_the_pace_of_a_decay_without_an_end(make: Make, steps: int | None) -> None:
    assert pace(curve(make)) == steps


@given(st.integers(1, 300), st.integers(1, 300))
def test_a_phase_has_the_first_and_the_last_step_of_a_schedule_and_none_backwards(total: int, steps: int) -> None:
    seen = [position(done, total, steps) for done in range(total)]
    assert seen[0] == 0
    assert seen == sorted(seen)
    if total > 1:
        assert seen[-1] == steps - 1
    if steps <= total:
        assert sorted(set(seen)) == list(range(steps))
        lengths = [seen.count(step) for step in range(steps)]
        assert max(lengths) - min(lengths) <= 1
    else:
        assert max((b - a for a, b in itertools.pairwise(seen)), default=0) <= math.ceil(steps / max(total - 1, 1))
    if steps == total:
        assert seen == list(range(steps))
    assert position(total + 5, total, steps) == steps - 1


# ---- driving ---------------------------------------------------------------------------------------------------------


def fit(scheduler: Any, *others: Any, phases: int = 4, **steps: int) -> tuple[LearningRates, list[str]]:
    optimizers = list({id(x.optimizer): x.optimizer for x in (scheduler, *others)}.values())
    rates = LearningRates(optimizers, [scheduler, *others])
    counts = {id(x): steps or {"step": RUN} for x in (scheduler, *others)}
    return rates, [fit.text for fit in rates.fit(counts, [0] + [RUN / phases] * phases)]


def train(rates: LearningRates, scheduler: Any, steps: int = PHASE, phases: int = 4) -> list[list[float]]:
    """The rates before each optimizer step of each phase, with a loop that steps the scheduler too."""
    seen: list[list[float]] = []
    for phase in range(1, phases + 1):
        rates.begin_phase()
        seen.append([])
        for done in range(steps):
            rates.follow(phase, done, steps, [scheduler])
            seen[-1].append(scheduler.optimizer.param_groups[0]["lr"])
            scheduler.optimizer.step()
            scheduler.step()
    return seen


@pytest.mark.parametrize("name", FOR_THE_RUN)
def test_each_phase_has_the_whole_curve(name: str) -> None:
    scheduler = FOR_THE_RUN[name](sgd())
    rates, texts = fit(scheduler)
    assert texts == [
        f"{type(scheduler).__name__} spans the whole run of 40 steps: its whole curve is run in each of the 4 phases."
    ]
    phases = train(rates, scheduler)
    run = curve(FOR_THE_RUN[name])
    assert phases[0] == [run[position(done, PHASE, RUN)] for done in range(PHASE)]
    assert phases[0] == phases[1] == phases[2] == phases[3]
    assert phases[0][-1] == run[RUN - 1]


@pytest.mark.parametrize("name", FOR_A_PHASE)
def test_a_schedule_made_for_a_phase_is_stepped_as_ever(name: str) -> None:
    scheduler = FOR_A_PHASE[name](sgd())
    kind = type(scheduler)
    rates, texts = fit(scheduler)
    assert len(texts) == 1
    assert texts[0].endswith("it begins anew with each of the 4 phases.")
    assert type(scheduler) is kind
    phases = train(rates, scheduler)
    assert phases == [curve(FOR_A_PHASE[name])[:PHASE]] * 4


def test_an_epoch_scheduler_takes_its_steps_within_the_epochs_of_a_phase() -> None:
    """8 epochs of 5 steps, 4 phases: the eight values last 1.25 steps each rather than 5."""
    scheduler = s.CosineAnnealingLR(sgd(), 8)
    rates, texts = fit(scheduler, epoch=8)
    assert "spans the whole run of 8 epochs" in texts[0]
    run = curve(lambda o: s.CosineAnnealingLR(o, 8))
    assert train(rates, scheduler)[3] == [run[i] for i in (0, 0, 1, 2, 3, 4, 4, 5, 6, 7)]


def test_fitting_leaves_everything_where_it_was() -> None:
    """At the start, and where a checkpoint has put it."""
    for begun in (0, 7):
        optimizer = sgd()
        scheduler = s.OneCycleLR(optimizer, 0.1, total_steps=RUN)
        rates = LearningRates([optimizer], [scheduler])
        for _ in range(begun):
            scheduler.step()
        optimizer.param_groups[0]["d"] = 0.5
        state, group = copy.deepcopy(scheduler.state_dict()), {**optimizer.param_groups[0]}
        rates.fit({id(scheduler): {"step": RUN}}, [0, 20, 20])
        assert scheduler.state_dict() == state
        assert optimizer.param_groups[0] == group
        rates.release()
        assert type(scheduler) is s.OneCycleLR
        scheduler.step()
        assert scheduler.last_epoch == begun + 1


def test_what_a_scheduler_of_ones_own_moves_begins_anew_too() -> None:
    class Decay(s.LRScheduler):
        def get_lr(self) -> list[float]:
            for group in self.optimizer.param_groups:
                group["weight_decay"] = 1e-3 * (1 + self.last_epoch)
            return [0.1 * 0.99**self.last_epoch for _ in self.optimizer.param_groups]

    optimizer = sgd()
    scheduler = Decay(optimizer)
    rates, _ = fit(scheduler)
    group = optimizer.param_groups[0]
    for _ in range(3):
        scheduler.step()
    group["d"] = 0.5
    assert group["weight_decay"] == 4e-3
    rates.begin_phase()
    assert group["weight_decay"] == 1e-3
    assert group["d"] == 0.5


def test_a_checkpoint_continues_where_the_scheduler_stands() -> None:
    def start() -> tuple[Any, LearningRates]:
        scheduler = s.OneCycleLR(sgd(), 0.1, total_steps=RUN)
        return scheduler, LearningRates([scheduler.optimizer], [scheduler])

    scheduler, rates = start()
    rates.fit({id(scheduler): {"step": RUN}}, [0, 10, 30])
    rates.begin_phase()
    rates.follow(1, 4, 10, [scheduler])
    saved = [copy.deepcopy(x.state_dict()) for x in (scheduler, scheduler.optimizer, rates)]
    scheduler, rates = start()
    scheduler.optimizer.load_state_dict(saved[1])
    scheduler.load_state_dict(saved[0])
    rates.load_state_dict(saved[2])
    rates.fit({id(scheduler): {"step": RUN}}, [0, 10, 30])
    rates.follow(1, 5, 10, [scheduler])
    expected = curve(lambda o: s.OneCycleLR(o, 0.1, total_steps=RUN))[position(5, 10, RUN)]
    assert scheduler.optimizer.param_groups[0]["lr"] == expected
    assert scheduler.last_epoch == position(5, 10, RUN)


@pytest.mark.parametrize("saved", [None, [0, 30, 30]], ids=["a run without INQ", "a shorter run"])
def test_a_position_that_is_not_this_runs_is_found_anew(saved: list[int] | None) -> None:
    scheduler = s.CosineAnnealingLR(sgd(), RUN)
    rates = LearningRates([scheduler.optimizer], [scheduler])
    for _ in range(30):
        scheduler.step()
    if saved:
        rates.load_state_dict({"positions": {0: {"position": 20, "spans": saved}}, "groups": [{}]})
    rates.fit({id(scheduler): {"step": RUN}}, [0, 10, 30])
    rates.follow(2, 15, 30, [scheduler])
    assert scheduler.last_epoch == 20
    assert scheduler.optimizer.param_groups[0]["lr"] == curve(lambda o: s.CosineAnnealingLR(o, RUN))[20]


def test_a_scheduler_that_another_has_replaced_is_let_be() -> None:
    scheduler = s.CosineAnnealingLR(sgd(), RUN)
    rates, _ = fit(scheduler)
    rates.begin_phase()
    rates.follow(1, 5, 10, [])
    assert scheduler.last_epoch == 0


def test_where_it_could_be_epochs_or_batches_the_curve_tells() -> None:
    """Under manual optimization the module steps its schedulers, once an epoch or once a batch."""
    both = {"epoch": 8, "step": RUN}
    for make, unit in (
        (lambda o: s.CosineAnnealingLR(o, 8), "8 epochs"),
        (lambda o: s.PolynomialLR(o, 9), "8 epochs"),
        (lambda o: s.LambdaLR(o, lambda epoch: 1 - max(0, epoch + 1 - 4) / 5), "8 epochs"),  # below zero after the end
        (lambda o: s.StepLR(o, 2), "8 epochs"),
        (lambda o: s.LinearLR(o, 0.1, total_iters=12), "40 steps"),
        (lambda o: s.CosineAnnealingLR(o, RUN), "40 steps"),
        (lambda o: s.OneCycleLR(o, 0.1, total_steps=RUN), "40 steps"),
    ):
        _, texts = fit(make(sgd()), **both)
        assert f"spans the whole run of {unit}" in texts[0]


def test_several_optimizers_are_named_and_driven_apart() -> None:
    first = s.CosineAnnealingLR(sgd(0.1), RUN)
    second = s.OneCycleLR(sgd(0.2), 0.2, total_steps=RUN)
    third = s.ExponentialLR(sgd(0.3), 0.9)
    rates, texts = fit(first, second, third)
    assert [text.split(":")[0] for text in texts] == [
        "CosineAnnealingLR of optimizer 0 spans the whole run of 40 steps",
        "OneCycleLR of optimizer 1 spans the whole run of 40 steps",
        "ExponentialLR of optimizer 2 changes the rate by the same factor each step",
    ]
    rates.begin_phase()
    rates.follow(1, 9, 10, [first, second, third])
    assert (first.last_epoch, second.last_epoch, third.last_epoch) == (39, 39, 0)


class Endless(s.LRScheduler):
    def __init__(self, optimizer: optim.Optimizer, rates: Any) -> None:
        self.rates = rates
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        return [next(self.rates)]


class Told:
    """A scheduler that has to be told the epoch."""

    def __init__(self, optimizer: optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self, epoch: int) -> None:
        self.optimizer.param_groups[0]["lr"] = 0.9**epoch


def replaced(optimizer: optim.Optimizer) -> Any:
    scheduler: Any = s.ExponentialLR(optimizer, 0.9)
    scheduler.step = lambda: None
    return scheduler


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda o: Endless(o, iter([0.1, 0.2])), r"it keeps rates \(list_iterator\), which cannot be put back"),
        (Told, "its step fails .TypeError: .*missing 1 required positional argument: 'epoch'"),
        (replaced, "its step has been replaced"),
    ],
)
def test_what_cannot_be_fitted_is_named_with_the_reason(make: Make, reason: str) -> None:
    optimizer = sgd()
    scheduler = make(optimizer)
    rates = LearningRates([optimizer], [scheduler])
    (found,) = rates.fit({id(scheduler): {"step": RUN}}, [0, 20, 20])
    assert not found.fits
    with pytest.raises(AssertionError, match=rf"{type(scheduler).__name__} cannot be fitted to the phases: {reason}"):
        raise AssertionError(found.text)
    assert "inq_lightning.phase_length" in found.text
    assert "restart_lr=False" in found.text


@pytest.mark.parametrize(
    ("steps", "lengths"),
    [({"step": math.inf}, [0, 20, 20]), ({"step": RUN}, [0, 20, math.inf]), ({}, [0, 20, 20])],
)
def test_a_run_of_unknown_length_is_named(steps: dict[str, float], lengths: list[float]) -> None:
    scheduler = s.CosineAnnealingLR(sgd(), RUN)
    (found,) = LearningRates([scheduler.optimizer], [scheduler]).fit({id(scheduler): steps}, lengths)
    assert not found.fits
    assert "nothing says how long the run is" in found.text


def test_what_keeps_schedules_from_being_fitted_is_named_where_it_matters() -> None:
    for make, fits in ((lambda o: s.CosineAnnealingLR(o, 8), False), (lambda o: s.CosineAnnealingLR(o, 2), True)):
        scheduler = make(sgd())
        rates = LearningRates([scheduler.optimizer], [scheduler])
        (found,) = rates.fit({id(scheduler): {"epoch": 8}}, [0, 2, 2, 2, 2], "nobody knows")
        assert found.fits == fits
        assert ("it lasts longer than a phase, and nobody knows." in found.text) != fits


def test_a_plateau_is_followed_as_ever() -> None:
    scheduler = s.ReduceLROnPlateau(sgd())
    _, texts = fit(scheduler)
    assert texts == ["ReduceLROnPlateau begins anew with each of the 4 phases, without the metrics from before it."]


def test_a_constant_rate_needs_no_word() -> None:
    assert fit(s.LambdaLR(sgd(), lambda step: 1.0))[1] == []
