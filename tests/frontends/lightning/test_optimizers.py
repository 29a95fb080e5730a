from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from support import SCHEDULE, TinyModule, Witness, assert_quantized, trainer
from torch import Tensor, nn, optim

from inq_lightning import INQCallback


class Averaging(optim.SGD):
    """Keeps its own weights beside the module's and an average, as schedule-free optimizers do."""

    def train(self) -> None:
        self._swap(0.9)

    def eval(self) -> None:
        self._swap(1 - 1 / 0.9)

    @torch.no_grad()
    def _swap(self, share: float) -> None:
        for p in self.param_groups[0]["params"]:
            if "z" in self.state[p]:
                p.lerp_(self.state[p]["z"], share)


class SGDScheduleFreeClosure(optim.SGD):
    """Known by its name only."""


class AveragingHeir(SGDScheduleFreeClosure):
    pass


class LBFGSNew(optim.SGD):
    pass


class Wrapping(optim.Optimizer):
    """An optimizer around another one, which is its ``optimizer``."""

    def __init__(self, optimizer: optim.Optimizer) -> None:
        self.optimizer = optimizer
        super().__init__(optimizer.param_groups, {})
        self.param_groups = optimizer.param_groups

    def step(self, closure: Callable[[], Tensor] | None = None) -> Any:
        return self.optimizer.step(closure)


class Accelerated(Wrapping):
    """As Hugging Face's wrapper, which has the methods for whatever it wraps."""

    def train(self) -> None: ...

    def eval(self) -> None: ...


def sgd(p: Iterable[nn.Parameter]) -> optim.SGD:
    return optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Averaging, "Averaging keeps weights of its own, .* SGD or AdamW"),
        (SGDScheduleFreeClosure, "SGDScheduleFreeClosure keeps weights of its own"),
        (AveragingHeir, "AveragingHeir keeps weights of its own"),
        (lambda p, lr: Wrapping(Averaging(p, lr=lr)), "Averaging keeps weights of its own"),
        (lambda p, lr: Wrapping(AveragingHeir(p, lr=lr)), "AveragingHeir keeps weights of its own"),
        (LBFGSNew, "LBFGSNew moves the weights several times within one step"),
        (lambda p, lr: Wrapping(optim.LBFGS(p, lr=lr)), "LBFGS moves the weights several times"),
    ],
)
def test_optimizers_with_weights_of_their_own_are_refused_before_training(make: Any, message: str) -> None:
    module = TinyModule(lambda p: make(p, lr=0.1))
    before = module.net[0].weight.detach().clone()
    with pytest.raises(ValueError, match=message):
        trainer(INQCallback(schedule=SCHEDULE)).fit(module)
    assert torch.equal(module.net[0].weight, before)


class Lookahead(Wrapping):
    """Keeps slow weights, and takes the module's half-way back to them after every second step."""

    def __init__(self, optimizer: optim.Optimizer) -> None:
        super().__init__(optimizer)
        self.slow = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
        self.steps = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Any:
        loss = super().step(closure)
        self.steps += 1
        if self.steps % 2 == 0:
            for slow, p in zip(self.slow, self.param_groups[0]["params"], strict=True):
                slow.lerp_(p, 0.5)
                p.copy_(slow)
        return loss


class Uninitialized(Lookahead):
    """The same, by a class that never calls Optimizer.__init__, as some do."""

    def __init__(self, optimizer: optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.param_groups, self.defaults, self.state = optimizer.param_groups, optimizer.defaults, optimizer.state
        self.slow = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
        self.steps = 0


@pytest.mark.parametrize("wrapper", [Lookahead, Accelerated])
def test_optimizers_that_move_weights_only_within_their_steps_are_held(wrapper: type[Wrapping]) -> None:
    module, callback = TinyModule(lambda p: wrapper(sgd(p))), INQCallback(schedule=SCHEDULE, restart_lr=False)
    trainer(callback, Witness(callback), limit_val_batches=1).fit(module)
    assert_quantized(module, callback)
