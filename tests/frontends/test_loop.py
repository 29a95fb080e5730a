from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import SCHEDULE, TinyModule, assert_quantized, assert_same_state, same_bits, trainer, weights
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, OneCycleLR

from inq_lightning import INQ, INQCallback, Schedule

BATCHES = 4  # of an epoch


class Loop:
    """A plain loop over what TinyModule trains on, with everything that a checkpoint of it holds."""

    def __init__(
        self,
        module: TinyModule | None = None,
        optimizer: Callable[..., Optimizer] = lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
        scheduler: Callable[[Optimizer], Any] = lambda o: ExponentialLR(o, 0.7),
        clip: float | None = None,
        interval: str = "epoch",
        **inq: Any,
    ) -> None:
        self.module = module or TinyModule()
        self.optimizer = optimizer(self.module.parameters())
        self.scheduler = scheduler(self.optimizer)
        self.clip = clip
        self.every = BATCHES if interval == "epoch" else 1  # steps between two of the scheduler
        defaults = {"schedule": SCHEDULE, "epochs": 4, "steps_per_epoch": BATCHES, "schedulers": [self.scheduler]}
        self.arguments = defaults | inq
        self.inq = INQ(self.module, self.optimizer, **self.arguments)
        self.step = 0
        self.rates: list[float] = []  # of each step

    @property
    def epoch(self) -> int:
        return self.step // BATCHES

    def train(self, steps: int = 4 * BATCHES, in_steps: bool = False) -> Loop:
        """Train up to so many steps, and make sure that frozen weights do not move."""
        while self.step < steps:
            if in_steps:
                self.inq.advance(self.step)
            elif self.step % BATCHES == 0:
                self.inq.advance(self.epoch)
            held = {layer.name: self.inq.frozen_mask(layer.name) for layer in self.inq.layers}
            before = weights(self.module, self.inq)  # type: ignore[arg-type]
            self.optimizer.zero_grad()
            self.module.loss(self.module.batches[self.epoch_step]).backward()
            if self.clip:
                nn.utils.clip_grad_norm_(self.module.parameters(), self.clip)
            self.optimizer.step()
            self.rates.append(self.optimizer.param_groups[0]["lr"])
            after = weights(self.module, self.inq)  # type: ignore[arg-type]
            for name, mask in held.items():
                assert same_bits(before[name][mask], after[name][mask]), name
            self.step += 1
            if self.step % self.every == 0:
                self.scheduler.step()
        return self

    @property
    def epoch_step(self) -> int:
        return self.step % BATCHES

    def save(self) -> io.BytesIO:
        parts = (self.module, self.optimizer, self.scheduler, self.inq)
        file = io.BytesIO()
        torch.save([self.step, *(part.state_dict() for part in parts)], file)
        file.seek(0)
        return file

    def load(self, file: io.BytesIO, inq_first: bool = False) -> Loop:
        self.step, *states = torch.load(file, weights_only=True)
        parts = list(zip((self.module, self.optimizer, self.scheduler, self.inq), states, strict=True))
        for part, state in reversed(parts) if inq_first else parts:
            part.load_state_dict(state)
        return self


@pytest.mark.parametrize("clip", [None, 0.05], ids=["unclipped", "clipped"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"partition": "random", "seed": 3},
        {"reset_optimizer": True},
        {"restart_lr": False},
        {"layer_bits": {"*3": 3}},
    ],
    ids=["defaults", "random", "reset", "no-restart", "mixed-bits"],
)
def test_a_plain_loop_ends_with_the_weights_of_a_trainer(options: dict[str, Any], clip: float | None) -> None:
    """Gradients of frozen weights do not count in clipping, though the loop says nothing of them."""
    loop = Loop(clip=clip, **options).train()
    loop.inq.finish()
    assert_quantized(loop.module, loop.inq)  # type: ignore[arg-type]
    callback = INQCallback(schedule=SCHEDULE, **options)
    module = TinyModule(scheduler=lambda o: ExponentialLR(o, 0.7))
    trainer(callback, gradient_clip_val=clip).fit(module)
    assert_same_state(loop.module, module)
    assert [layer.grid for layer in loop.inq.layers] == [layer.grid for layer in callback.layers]


@pytest.mark.parametrize("optimizer", [SGD, AdamW])
def test_a_schedule_in_steps_ends_with_the_weights_of_a_trainer(optimizer: type[Optimizer]) -> None:
    schedule = Schedule([0.3, 0.8, 1.0], starts=[1, 6, 11], unit="step")
    loop = Loop(optimizer=lambda p: optimizer(p, lr=0.01), schedule=schedule)
    loop.train(in_steps=True).inq.finish()
    module = TinyModule(lambda p: optimizer(p, lr=0.01), lambda o: ExponentialLR(o, 0.7))
    trainer(INQCallback(schedule=schedule)).fit(module)
    assert_same_state(loop.module, module)


def one_cycle(optimizer: Optimizer) -> Any:
    return OneCycleLR(optimizer, 0.1, total_steps=16)  # of the whole run


def test_a_schedule_made_for_the_whole_loop_is_run_whole_in_each_phase_as_in_a_trainer() -> None:
    schedule = {0: 0.5, 2: 1.0}
    loop = Loop(scheduler=one_cycle, interval="step", schedule=schedule).train()
    loop.inq.finish()
    assert loop.rates[:8] == loop.rates[8:]
    assert min(loop.rates[:8]) == pytest.approx(0.1 / 25 / 1e4)  # OneCycleLR's last one
    module = TinyModule(scheduler=lambda o: {"scheduler": one_cycle(o), "interval": "step"})
    trainer(INQCallback(schedule=schedule)).fit(module)
    assert_same_state(loop.module, module)


@pytest.mark.parametrize("step", [3, 8, 14])
def test_a_schedule_that_is_fitted_to_the_phases_resumes_bit_identical(step: int) -> None:
    options: dict[str, Any] = {"scheduler": one_cycle, "interval": "step", "schedule": {0: 0.5, 2: 1.0}}
    whole = Loop(**options).train()
    part = Loop(TinyModule(seed=5), **options).load(Loop(**options).train(step).save())
    if part.epoch_step:
        part.inq.advance(part.epoch)
    part.train()
    part.inq.finish()
    assert_same_state(part.module, whole.module)
    assert part.rates == whole.rates[step:]


def test_a_schedule_of_unknown_pace_is_named_with_what_would_tell_it() -> None:
    loop = Loop(scheduler=one_cycle, interval="step", steps_per_epoch=float("inf"))
    with pytest.warns(UserWarning, match=r"OneCycleLR cannot be fitted to the phases.*INQ\(steps_per_epoch=\.\.\.\)"):
        loop.inq.advance(0)


@pytest.mark.parametrize("inq_first", [False, True], ids=["inq-last", "inq-first"])
@pytest.mark.parametrize("step", [0, 3, 4, 6, 8, 13, 16])
def test_a_loop_resumed_at_any_step_ends_bit_identical(step: int, inq_first: bool) -> None:
    whole = Loop().train()
    part = Loop(TinyModule(seed=5)).load(Loop().train(step).save(), inq_first)
    if part.epoch_step:
        part.inq.advance(part.epoch)  # what a loop over epochs calls first
    part.train()
    part.inq.finish()
    assert_same_state(part.module, whole.module)
    assert part.rates == whole.rates[step:]
    assert part.inq.quantized_fraction == 1.0


@pytest.mark.parametrize("inq_late", [False, True], ids=["inq-made-first", "inq-made-last"])
def test_a_state_that_an_optimizer_begins_with_is_put_back_after_resuming(inq_late: bool) -> None:
    """INQ knows from its checkpoint what it was, even where the optimizer has loaded another one already."""
    options: dict[str, Any] = {"optimizer": lambda p: Adagrad(p, 0.05), "reset_optimizer": True}
    whole = Loop(**options).train()
    file = Loop(**options).train(6).save()
    part = Loop(TinyModule(seed=5), **options)
    if inq_late:
        part.load(file)
        part.inq.release()
        part.inq = INQ(part.module, part.optimizer, **part.arguments)
        file.seek(0)
    part.load(file)
    part.inq.advance(part.epoch)
    part.train()
    assert_same_state(part.module, whole.module)


def test_a_state_in_steps_resumes_in_the_middle_of_a_phase() -> None:
    options: dict[str, Any] = {"schedule": "alexnet", "epochs": float("inf"), "steps": 16}  # spread over the steps
    whole = Loop(**options).train(in_steps=True)
    part = Loop(TinyModule(seed=5), **options).load(Loop(**options).train(6, in_steps=True).save())
    part.train(in_steps=True)
    assert_same_state(part.module, whole.module)


def middle(scheduler: Any = lambda o: CosineAnnealingLR(o, 8)) -> Loop:
    """A loop whose INQ begins in its third epoch of six, with rates that have moved by then."""
    loop = Loop(scheduler=scheduler, restart_lr=False)
    loop.inq.release()
    for _ in range(2):
        for batch in loop.module.batches:
            loop.optimizer.zero_grad()
            loop.module.loss(batch).backward()
            loop.optimizer.step()
        loop.scheduler.step()
    loop.step = 2 * BATCHES
    return loop


def test_inq_that_begins_in_the_middle_of_a_loop_counts_and_restarts_from_there() -> None:
    loop = middle()
    rate = loop.optimizer.param_groups[0]["lr"]
    assert rate < 0.1
    loop.inq = INQ(loop.module, loop.optimizer, schedulers=[loop.scheduler], bits=4, schedule="alexnet", epochs=6)
    loop.train(6 * BATCHES)
    loop.inq.finish()
    assert_quantized(loop.module, loop.inq)  # type: ignore[arg-type]
    assert loop.rates == [rate] * 4 * BATCHES  # each epoch is a phase, and each begins anew


def test_inq_that_began_in_the_middle_of_a_loop_resumes_bit_identical() -> None:
    """The rate that phases restart at is that of the first run, which no fresh optimizer tells."""
    options: dict[str, Any] = {"schedule": {0: 0.5, 2: 1.0}, "epochs": 6, "steps_per_epoch": BATCHES}
    loops = [middle() for _ in range(2)]
    for loop in loops:
        loop.inq = INQ(loop.module, loop.optimizer, schedulers=[loop.scheduler], **options)
    whole, begun = loops
    whole.train(6 * BATCHES)
    begun.train(3 * BATCHES + 2)
    part = Loop(scheduler=lambda o: CosineAnnealingLR(o, 8), **options).load(begun.save())
    part.inq.advance(part.epoch)
    part.train(6 * BATCHES)
    part.inq.finish()
    assert_same_state(part.module, whole.module)
    assert part.rates == whole.rates[BATCHES + 2 :]  # it began at the third epoch


def test_a_phase_freezes_all_layers_or_none() -> None:
    loop = Loop().train(BATCHES)
    fractions = loop.inq.quantized_fraction
    loop.module.net[3].weight.data[0, 0] = torch.nan
    before = loop.module.net[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"net\.3\.weight.*nan"):
        loop.inq.advance(1)
    assert loop.inq.quantized_fraction == fractions
    assert loop.inq.phase == 1
    assert same_bits(loop.module.net[0].weight.detach(), before)


def test_layers_unfrozen_during_the_loop_are_taken_in_and_fully_quantized() -> None:
    module = TinyModule()
    module.net[0].weight.requires_grad = False
    loop = Loop(module)
    loop.train(2 * BATCHES)
    assert [layer.name for layer in loop.inq.layers] == ["net.3.weight"]
    module.net[0].weight.requires_grad = True
    loop.train(2 * BATCHES + 2)  # within an epoch nothing is looked at
    assert len(loop.inq.layers) == 2
    assert loop.inq.layers[1].frozen == round(0.875 * 112)
    masked = loop.inq.frozen_mask("net.0.weight")
    loop.module.loss(module.batches[0]).backward()
    assert not module.net[0].weight.grad[masked].any()
    resumed = TinyModule(seed=5)
    resumed.net[0].weight.requires_grad = False
    part = Loop(resumed).load(loop.save())
    part.inq.advance(2)
    resumed.net[0].weight.requires_grad = True
    for run in (loop, part):
        run.train()
        run.inq.finish()
        assert_quantized(run.module, run.inq)  # type: ignore[arg-type]


def test_zeros_of_a_pruned_network_stay_zero() -> None:
    module = TinyModule()
    module.net[0].weight.data[:, ::2] = 0
    loop = Loop(module, keep_zeros=True).train()
    loop.inq.finish()
    assert not module.net[0].weight[:, ::2].any()


def test_several_optimizers_are_held_and_restarted() -> None:
    module = TinyModule()
    optimizers = [SGD(module.net[0].parameters(), lr=0.1, momentum=0.9), AdamW(module.net[3].parameters(), lr=0.01)]
    schedulers = [ExponentialLR(optimizer, 0.5) for optimizer in optimizers]
    inq = INQ(module, optimizers, schedulers=schedulers, epochs=4, reset_optimizer=True)
    for epoch in range(4):
        assert inq.advance(epoch)
        assert [optimizer.param_groups[0]["lr"] for optimizer in optimizers] == [0.1, 0.01]
        assert not any(optimizer.state for optimizer in optimizers)
        for batch in module.batches:
            module.loss(batch).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        for scheduler in schedulers:
            scheduler.step()
    inq.finish()
    assert_quantized(module, inq)  # type: ignore[arg-type]


def test_a_closure_sees_masked_gradients_too() -> None:
    module = TinyModule()
    optimizer = SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    inq = INQ(module, optimizer, schedule=SCHEDULE)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = module.loss(module.batches[0])
        loss.backward()
        for layer in inq.layers:
            assert not module.get_parameter(layer.name).grad[inq.frozen_mask(layer.name)].any()
        return loss

    for epoch in range(4):
        inq.advance(epoch)
        optimizer.step(closure)
    inq.finish()


def test_a_compiled_module_ends_as_an_uncompiled_one_under_the_same_names() -> None:
    """Masking comes by hooks on the parameters, which the compiler must leave where they are."""
    masks = []
    for wrap in (lambda net: net, lambda net: torch.compile(net, backend="aot_eager")):
        module = TinyModule()
        net = wrap(module.net)
        optimizer = SGD(net.parameters(), lr=0.1, momentum=0.9)
        inq = INQ(net, optimizer, schedule=SCHEDULE)
        for epoch in range(4):
            inq.advance(epoch)
            for x, y in module.batches:
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(x), y).backward()
                assert not module.net[0].weight.grad[inq.frozen_mask("0.weight")].any()
                optimizer.step()
        inq.finish()
        masks.append([module.state_dict(), [layer.name for layer in inq.layers]])
    (plain, names), (compiled, same) = masks
    assert names == same == ["0.weight", "3.weight"]
    assert all(same_bits(plain[name].float(), compiled[name].float()) for name in plain)


def test_what_data_parallel_wraps_bears_its_own_names() -> None:
    module = nn.DataParallel(TinyModule())
    inq = INQ(module, SGD(module.parameters(), lr=0.1), epochs=4)
    inq.advance(0)
    assert [layer.name for layer in inq.layers] == ["net.0.weight", "net.3.weight"]


def test_a_module_copied_during_the_loop_is_free() -> None:
    loop = Loop().train(6)
    copied = copy.deepcopy(loop.module)
    assert_same_state(copied, loop.module)
    copied.loss(copied.batches[0]).backward()
    assert all(copied.get_parameter(layer.name).grad.all() for layer in loop.inq.layers)


def test_an_interrupted_step_is_put_right_in_the_checkpoint() -> None:
    loop = Loop().train(6)
    before = weights(loop.module, loop.inq)  # type: ignore[arg-type]
    for parameter in loop.module.parameters():
        parameter.data += 1e-3  # an update whose hook never came
    mask = loop.inq.frozen_mask("net.0.weight")
    _, state, *_ = torch.load(loop.save())
    assert same_bits(state["net.0.weight"][mask], before["net.0.weight"][mask])


def test_finish_removes_the_hooks_and_names_the_layer_that_something_has_moved() -> None:
    loop = Loop().train()
    loop.inq.finish()
    loop.module.loss(loop.module.batches[0]).backward()
    assert loop.module.net[0].weight.grad.any()
    loop.optimizer.step()  # on its own again
    with pytest.raises(RuntimeError, match=r"net\.0\.weight: \d+ of 112 frozen weights, .* have been put back"):
        loop.inq.finish()


def test_what_moves_frozen_weights_between_steps_is_named_at_the_next_epoch_and_they_are_put_back() -> None:
    loop = Loop().train(BATCHES)
    before = weights(loop.module, loop.inq)["net.0.weight"]  # type: ignore[arg-type]
    mask = loop.inq.frozen_mask("net.0.weight")
    loop.module.net[0].weight.data.clamp_(-0.1, 0.1)
    with pytest.warns(UserWarning, match=r"net\.0\.weight: \d+ of 56 frozen weights were changed.*frozen_mask"):
        loop.inq.advance(1)
    assert same_bits(loop.module.net[0].weight.detach()[mask], before[mask])
    loop.train()
    loop.module.net[0].weight.data.clamp_(-0.1, 0.1)
    loop.inq.finish()  # which it was said of before
    assert_quantized(loop.module, loop.inq)  # type: ignore[arg-type]


def test_layers_of_an_unknown_type_are_named_when_inq_begins() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(4, 4))

    module = nn.Sequential(nn.Linear(4, 4), Own())
    inq = INQ(module, SGD(module.parameters()), epochs=4)
    with pytest.warns(UserWarning, match=r"1\.matrix"):
        inq.advance(0)
    assert inq.coverage.total == 32


def test_a_loop_that_ends_early_says_so() -> None:
    loop = Loop().train(9)
    with pytest.warns(UserWarning, match=r"87\.5% of the selected weights"):
        loop.inq.finish()


def test_a_completed_loop_that_resumes_with_nothing_left_to_train_is_verified() -> None:
    part = Loop(TinyModule(seed=5)).load(Loop().train().save())
    part.inq.finish()
    assert_quantized(part.module, part.inq)  # type: ignore[arg-type]


def test_a_whole_run_raises_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Loop(clip=1.0).train().inq.finish()


def test_the_plan_says_what_the_loop_will_do() -> None:
    plan = Loop(schedule=None, epochs=8, bits=4).inq.plan()
    assert [phase.start for phase in plan.phases] == [0, 1, 2, 4, 5, 6]
    assert [layer.name for layer in plan.layers] == ["net.0.weight", "net.3.weight"]


class Bare(Optimizer):
    """A wrapper that never calls the constructor of its class, as Accelerate's."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: Any) -> None:
        self.optimizer.param_groups = groups


def refusals() -> Iterator[Any]:
    sgd = SGD
    yield pytest.param(lambda m: INQ(m, sgd(m.parameters()), epochs=3), "need at least 4 epochs", id="short")
    yield pytest.param(lambda m: INQ(m, sgd(m.parameters())), "epochs or steps", id="endless")
    yield pytest.param(lambda m: INQ(m, sgd(m.parameters()), epochs=4, bits=9), "bits", id="bits")
    yield pytest.param(lambda m: INQ(m, sgd(m.parameters()), epochs=4, exclude=["x"]), "exclude pattern", id="pattern")
    yield pytest.param(lambda m: INQ(m, torch.optim.LBFGS(m.parameters()), epochs=4), "LBFGS", id="lbfgs")
    yield pytest.param(lambda m: INQ(m, Bare(sgd(m.parameters())), epochs=4), "Bare takes no step hooks", id="hooks")

    def scheduled(module: TinyModule) -> INQ:
        optimizer = SGD(module.parameters(), lr=0.1)
        OneCycleLR(optimizer, 0.1, total_steps=16)
        return INQ(module, optimizer, epochs=4)

    yield pytest.param(scheduled, r"SGD has a learning-rate scheduler.*schedulers=\[scheduler\]", id="scheduler")


@pytest.mark.parametrize(("make", "message"), refusals())
def test_what_cannot_work_is_refused_before_training(make: Callable[[TinyModule], INQ], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(TinyModule())


def test_an_option_that_does_not_exist_is_refused() -> None:
    module = TinyModule()
    with pytest.raises(TypeError, match="bit"):
        INQ(module, SGD(module.parameters()), epochs=4, bit=4)


def test_inq_that_begins_too_late_is_refused_when_it_begins() -> None:
    loop = Loop(schedule=None)
    with pytest.raises(ValueError, match="need at least 4 epochs, one for each, but training runs 2"):
        loop.inq.advance(2)


def test_counting_anew_after_resuming_is_refused() -> None:
    part = Loop().load(Loop().train(9).save())
    with pytest.raises(ValueError, match=r"advance\(0\): phase 3 has begun, which it does at epoch 2"):
        part.inq.advance(0)


def test_a_step_before_the_loaded_state_is_taken_up_is_refused() -> None:
    part = Loop().load(Loop().train(6).save())
    part.module.loss(part.module.batches[0]).backward()
    with pytest.raises(RuntimeError, match=r"waits for advance\(\)"):
        part.optimizer.step()


def test_a_state_of_other_settings_is_refused() -> None:
    file = Loop().train(6).save()
    part = Loop(partition="random").load(file)
    with pytest.raises(ValueError, match="partition: 'magnitude' in the checkpoint, 'random' here"):
        part.inq.advance(1)
    module = TinyModule()
    state = Loop().train(6).inq.state_dict()
    with pytest.raises(ValueError, match="written with 1 schedulers, here are 0"):
        INQ(module, SGD(module.parameters()), epochs=4).load_state_dict(state)


def test_steps_given_as_epochs_are_said() -> None:
    loop = Loop()
    for step in range(4):
        loop.inq.advance(step)
    with pytest.warns(UserWarning, match=r"advance\(5\): the loop was said to have 4 epochs"):
        loop.inq.advance(5)
