from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support import Holds, same_bits
from torch import Tensor, nn, optim
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from inq_lightning.core.restart import Kept, OptimizerState, Restart

Options = list[dict[str, Any]]


def sgd(lr: Any = 0.1, groups: int = 1) -> optim.SGD:
    return optim.SGD([{"params": [nn.Parameter(torch.ones(2))], "lr": lr} for _ in range(groups)], lr=lr, momentum=0.9)


def options(optimizer: optim.Optimizer) -> Options:
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


SCHEDULERS: dict[str, Callable[[optim.Optimizer], Any]] = {
    "step": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "multistep": lambda o: lr_scheduler.MultiStepLR(o, [1, 3, 3], 0.1),
    "constant": lambda o: lr_scheduler.ConstantLR(o, 0.1, 3),
    "linear": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=3),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.5**step),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, 5, 2.0),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 3, 0.01),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2, 2),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3, mode="exp_range", gamma=0.9),
    "onecycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=12),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.CosineAnnealingLR(o, 5)], [2]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.5)]
    ),
    "nested": lambda o: lr_scheduler.SequentialLR(
        o,
        [
            lr_scheduler.ChainedScheduler([lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.9)]),
            lr_scheduler.StepLR(o, 1),
        ],
        [4],
    ),
}


def steps(scheduler: Any, count: int) -> list[Options]:
    seen = [options(scheduler.optimizer)]
    for _ in range(count):
        scheduler.optimizer.step()
        scheduler.step()
        seen.append(options(scheduler.optimizer))
    return seen


@pytest.mark.parametrize("make", [sgd, lambda: optim.AdamW([nn.Parameter(torch.ones(2))], 0.1)], ids=["sgd", "adamw"])
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("begun", [0, 1, 4])
def test_every_scheduler_gives_the_same_values_again(name: str, make: Callable[[], Any], begun: int) -> None:
    """Wherever it stood when it was remembered: at its start, or in the middle of a run."""
    optimizer = make()
    scheduler = SCHEDULERS[name](optimizer)
    steps(scheduler, begun)
    restart = Restart([optimizer], [scheduler])
    state = repr(scheduler.state_dict())
    first = steps(scheduler, 6)
    restart()
    assert repr(scheduler.state_dict()) == state
    assert steps(scheduler, 6) == first
    restart()
    assert steps(scheduler, 6) == first
    assert not restart.foreign(scheduler)


def test_plateaus_forget_their_metrics() -> None:
    optimizer = sgd()
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    restart = Restart([optimizer], [scheduler])
    for metric in (1.0, 2.0, 3.0):
        scheduler.step(metric)
    assert options(optimizer)[0]["lr"] == 0.025
    restart()
    scheduler.step(3.0)  # worse than ever, were the best one remembered
    assert options(optimizer)[0]["lr"] == 0.1


def test_a_scheduler_within_a_scheduler_begins_anew_and_stays_the_same_object() -> None:
    optimizer = sgd()
    inner = lr_scheduler.ExponentialLR(optimizer, 0.5)
    scheduler = Holds(optimizer, inner)
    restart = Restart([optimizer], [scheduler])
    for _ in range(3):
        assert [group[0]["lr"] for group in steps(scheduler, 2)] == [0.1, 0.05, 0.025]
        restart()
    assert scheduler.inner is inner
    assert inner.optimizer is scheduler.optimizer is optimizer


@pytest.mark.parametrize(
    "container", [list, tuple, lambda parts: dict(enumerate(parts))], ids=["list", "tuple", "dict"]
)
def test_schedulers_in_containers_begin_anew(container: Any) -> None:
    class Several(Holds):
        def __init__(self, optimizer: optim.Optimizer, parts: Any) -> None:
            self.parts = parts
            super().__init__(optimizer, parts[0])

        def step(self, epoch: int | None = None) -> None:
            super().step()
            if self.last_epoch == 2:
                self.inner = self.parts[1]
                if isinstance(self.parts, list):
                    self.parts.pop(0)

    optimizer = sgd()
    parts = container([lr_scheduler.ExponentialLR(optimizer, 0.5), lr_scheduler.ExponentialLR(optimizer, 0.1)])
    scheduler = Several(optimizer, parts)
    restart = Restart([optimizer], [scheduler])
    first = steps(scheduler, 4)
    assert [round(group[0]["lr"], 9) for group in first] == [0.1, 0.05, 0.025, 0.0025, 0.00025]
    restart()
    assert scheduler.parts is parts
    assert steps(scheduler, 4) == first


class Table(LRScheduler):
    """Reads its rates from whatever it is given, and counts in an object of its own."""

    def __init__(self, optimizer: optim.Optimizer, **attributes: Any) -> None:
        self.counter = SimpleNamespace(steps=-1)
        vars(self).update(attributes)
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        self.counter.steps += 1
        return [1 / (1 + self.counter.steps)] * len(self.optimizer.param_groups)


def test_objects_and_data_of_a_scheduler_are_put_back() -> None:
    optimizer = sgd()
    scheduler = Table(optimizer, array=np.arange(3.0), tensor=torch.arange(3), nested={"a": [1, {2}]})
    counter = scheduler.counter
    restart = Restart([optimizer], [scheduler])
    steps(scheduler, 3)
    scheduler.array += 1
    scheduler.tensor += 1
    scheduler.nested["a"].append(3)
    scheduler.new = 1
    restart()
    assert scheduler.counter is counter
    assert counter.steps == 0
    assert scheduler.array.tolist() == scheduler.tensor.tolist() == [0, 1, 2]
    assert scheduler.nested == {"a": [1, {2}]}
    assert not hasattr(scheduler, "new")
    assert not restart.foreign(scheduler)


def test_modules_parameters_and_functions_that_a_scheduler_holds_stay_as_they_are() -> None:
    optimizer, module = sgd(), nn.Linear(2, 2)
    scheduler = Table(
        optimizer, module=module, weights=list(module.parameters()), groups=optimizer.param_groups, f=module.forward
    )
    restart = Restart([optimizer], [scheduler])
    with torch.no_grad():
        module.weight.fill_(3.0)
    optimizer.param_groups[0]["own"] = 5
    restart()
    assert module.weight.eq(3).all()
    assert scheduler.weights[0] is module.weight
    assert scheduler.groups is optimizer.param_groups
    assert optimizer.param_groups[0]["own"] == 5
    assert not restart.foreign(scheduler)


def test_what_cannot_be_put_back_is_named_and_left_alone() -> None:
    class Owner:
        def __init__(self) -> None:
            self.count, self.other = 0, SimpleNamespace(owner=self)

    optimizer, owner = sgd(), Owner()
    scheduler = Table(optimizer, generator=iter([1, 2]), lock=threading.Lock(), owner=owner)
    restart = Restart([optimizer], [scheduler])
    owner.count = 7
    restart()
    assert restart.foreign(scheduler) == ["generator (list_iterator)", "lock (lock)", "owner (Owner)"]
    assert owner.count == 7
    assert next(scheduler.generator) == 1


def test_what_an_optimizer_keeps_in_its_groups_is_left_to_it() -> None:
    """An adaptive step size, as Prodigy's `d`, must not fall back to where it began."""
    optimizer = sgd(groups=2)
    for group in optimizer.param_groups:
        group |= {"d": 1e-6, "d_max": 1e-6, "k": 0}
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 4)
    restart = Restart([optimizer], [scheduler])
    steps(scheduler, 2)
    for group in optimizer.param_groups:
        group |= {"d": 0.5, "d_max": 0.5, "k": 100, "weight_decay": 0.3}
    restart()
    for group in options(optimizer):
        assert group["lr"] == group["initial_lr"] == 0.1
        assert (group["d"], group["d_max"], group["k"], group["weight_decay"]) == (0.5, 0.5, 100, 0.3)


def test_groups_added_later_go_back_to_what_they_were_added_with() -> None:
    optimizer = sgd()
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    restart = Restart([optimizer], [scheduler])
    steps(scheduler, 1)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.03})
    restart.notice_groups()
    steps(scheduler, 1)
    assert [group["lr"] for group in options(optimizer)] == [0.025, 0.015]
    resumed = Restart([optimizer], [scheduler])  # of which the later group is one of those that were configured
    resumed.load_state_dict(restart.state_dict())
    for again in (restart, resumed):
        optimizer.param_groups[1]["lr"] = 0.015
        again()
        assert options(optimizer)[1]["lr"] == 0.03
    assert options(optimizer)[0]["lr"] == 0.025  # where the second one began
    assert resumed.state_dict() == restart.state_dict()


def test_rates_that_are_tensors_stay_the_same_tensors() -> None:
    rate = torch.tensor(0.1)
    optimizer = optim.Adam([nn.Parameter(torch.ones(1))], lr=rate, capturable=False, foreach=False)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    restart = Restart([optimizer], [scheduler])
    known = optimizer.param_groups[0]["lr"]
    scheduler.step()
    assert known.item() == pytest.approx(0.05)
    restart()
    assert optimizer.param_groups[0]["lr"] is known
    assert same_bits(known, torch.tensor(0.1))
    scheduler.step()
    assert known.item() == pytest.approx(0.05)


def test_one_scheduler_can_be_put_back_without_the_others() -> None:
    first, second = sgd(), sgd()
    schedulers = [lr_scheduler.ExponentialLR(first, 0.5), lr_scheduler.ExponentialLR(second, 0.5)]
    restart = Restart([first, second], schedulers)
    for scheduler in schedulers:
        steps(scheduler, 2)
    restart(schedulers[0])
    assert options(first)[0]["lr"] == 0.1
    assert options(second)[0]["lr"] == 0.025
    assert [scheduler.last_epoch for scheduler in schedulers] == [0, 2]


def test_an_object_that_holds_itself_is_kept() -> None:
    thing = SimpleNamespace(count=1, step=None, optimizer=None)
    thing.itself = [thing]
    kept = Kept(thing)
    thing.count = 2
    kept.put_back()
    assert thing.count == 1
    assert thing.itself[0] is thing


@pytest.mark.parametrize(
    "make", [lambda p: optim.Adagrad([p], 0.1, initial_accumulator_value=0.5), lambda p: optim.Adam([p], 0.1)]
)
def test_an_optimizers_state_is_what_it_began_with(make: Callable[[nn.Parameter], optim.Optimizer]) -> None:
    def two_steps(parameter: nn.Parameter, optimizer: optim.Optimizer) -> Tensor:
        with torch.no_grad():
            parameter.copy_(torch.tensor([1.0, -2.0]))
        for _ in range(2):
            parameter.grad = parameter.detach().clone()
            optimizer.step()
        return parameter.detach().clone()

    parameter = nn.Parameter(torch.zeros(2))
    optimizer = make(parameter)
    state = OptimizerState([optimizer])
    first = two_steps(parameter, optimizer)
    optimizer.load_state_dict(optimizer.state_dict())  # as a resumed run does, after the state was remembered
    assert not same_bits(two_steps(parameter, optimizer), first)
    for _ in range(2):
        state()
        assert same_bits(two_steps(parameter, optimizer), first)
