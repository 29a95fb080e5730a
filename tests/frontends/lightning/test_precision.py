from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from support import SCHEDULE, TinyModule, Witness, assert_quantized, loader, same_bits, trainer, weights
from torch import Tensor, nn, optim
from torch.optim import lr_scheduler

from inq_lightning import INQCallback, Schedule

OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    # eps: the default of 1e-8 is zero in float16, and free weights would divide by it
    "adamw-fused": lambda p: optim.AdamW(p, lr=1e-2, weight_decay=0.1, eps=1e-3, fused=True),
    "adamw-foreach": lambda p: optim.AdamW(p, lr=1e-2, weight_decay=0.1, eps=1e-3, foreach=True),
    "sgd-fused": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2, fused=True),
}
DTYPES = {
    "bf16-mixed": torch.float32,
    "16-mixed": torch.float32,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
    "64-true": torch.float64,
}


def assert_fits_exactly(module: LightningModule, *callbacks: Callback, **options: Any) -> tuple[INQCallback, Witness]:
    """In a whole run, no frozen weight moves by a bit, and all weights end on their grids."""
    callback = INQCallback(schedule=SCHEDULE)
    witness = Witness(callback)
    trainer(callback, witness, *callbacks, **options).fit(module)
    assert witness.checks >= 4
    assert_quantized(module, callback)
    return callback, witness


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("precision", DTYPES)
def test_frozen_weights_stay_exact_in_every_precision(precision: Any, optimizer: str) -> None:
    module = TinyModule(OPTIMIZERS[optimizer])
    callback, witness = assert_fits_exactly(module, precision=precision)
    assert witness.fractions[:4] == [0.5] * 4
    assert {w.dtype for w in weights(module, callback).values()} == {DTYPES[precision]}


@pytest.mark.parametrize("precision", DTYPES)
def test_resuming_is_bit_identical_in_every_precision(precision: Any, tmp_path: Path) -> None:
    def module() -> TinyModule:
        # Lightning loads a checkpoint before it makes the module double, so a float32 module would round it.
        module = TinyModule(OPTIMIZERS["adamw-foreach"])
        return module.double() if precision == "64-true" else module

    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    whole, resumed = module(), module()
    assert_fits_exactly(whole, saver, precision=precision, enable_checkpointing=True)
    callback = INQCallback(schedule=SCHEDULE)
    trainer(callback, precision=precision).fit(resumed, ckpt_path=tmp_path / "step=6.ckpt")
    assert_quantized(resumed, callback)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_a_module_made_of_half_precision_layers_is_quantized_as_it_is() -> None:
    module = TinyModule(OPTIMIZERS["sgd-fused"]).to(torch.bfloat16)
    callback, _ = assert_fits_exactly(module)
    assert {w.dtype for w in weights(module, callback).values()} == {torch.bfloat16}


# ---- accumulation and clipping ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [2, 3])
def test_accumulated_gradients_leave_frozen_weights_alone(batches: int) -> None:
    assert_fits_exactly(TinyModule(), accumulate_grad_batches=batches)


def test_accumulation_that_changes_during_the_run_leaves_frozen_weights_alone() -> None:
    assert_fits_exactly(TinyModule(), GradientAccumulationScheduler({0: 1, 1: 2, 3: 4}))


class Before(Callback):
    """Copies all parameters before the first update."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.weights = {name: p.detach().clone() for name, p in pl_module.named_parameters()}


class Gradients(Callback):
    """Copies the gradients as the clipping finds them."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.gradients = {name: p.grad.clone() for name, p in pl_module.named_parameters()}


def one_step(callback: INQCallback, module: TinyModule, **options: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The gradients before clipping and the change of every parameter, of one step of plain SGD at rate 1."""
    before, gradients = Before(), Gradients()
    trainer(callback, before, gradients, max_epochs=2, limit_train_batches=1, max_steps=2, **options).fit(module)
    return gradients.gradients, {n: before.weights[n] - p.detach() for n, p in module.named_parameters()}


def plain_sgd() -> TinyModule:
    return TinyModule(lambda p: optim.SGD(p, lr=1.0))


def test_gradients_of_frozen_weights_do_not_count_in_the_clipped_norm() -> None:
    # At rate 1, the change is the clipped gradient. Its norm would be below the limit if frozen gradients counted.
    callback = INQCallback(schedule={1: 1.0})
    _, change = one_step(callback, plain_sgd(), gradient_clip_val=1e-3)
    frozen = {layer.name for layer in callback.layers}
    assert len(frozen) == 2
    assert all(not change[name].any() for name in frozen)
    norm = torch.cat([d.flatten() for d in change.values()]).norm().item()
    assert norm == pytest.approx(1e-3, rel=1e-3)


def test_clipping_by_value_clips_free_weights_and_leaves_frozen_ones() -> None:
    callback = INQCallback(schedule={0: 0.5, 1: 1.0}, exclude=["net.0"])
    gradients, change = one_step(callback, plain_sgd(), gradient_clip_val=0.01, gradient_clip_algorithm="value")
    assert not change["net.3.weight"].any()
    assert torch.allclose(change["net.0.weight"], gradients["net.0.weight"].clamp(-0.01, 0.01), atol=1e-6)
    assert int((change["net.0.weight"].abs() > 0.0099).sum()) > 0


@pytest.mark.parametrize("options", [{"gradient_clip_val": 0.1}, {"gradient_clip_val": 0.01}])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipped_runs_end_on_the_grid(algorithm: str, options: dict[str, float]) -> None:
    assert_fits_exactly(TinyModule(), gradient_clip_algorithm=algorithm, **options)


# ---- infinities ------------------------------------------------------------------------------------------------------


class Poisoned(TinyModule):
    """Gradients of frozen weights become ``value`` before anybody sees them."""

    def __init__(self, callback: INQCallback, value: float, **options: Any) -> None:
        super().__init__(**options)
        self.callback = [callback]
        self.value = value
        self.poisoned = 0

    def on_train_start(self) -> None:
        for layer in self.callback[0].layers:
            self.get_parameter(layer.name).register_hook(lambda grad, name=layer.name: self.poison(grad, name))

    def poison(self, grad: Tensor, name: str) -> Tensor:
        mask = self.callback[0].frozen_mask(name)
        self.poisoned += int(mask.sum())
        return torch.where(mask, self.value, grad)


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_infinite_gradients_of_frozen_weights_touch_nothing(value: float, clip: float | None) -> None:
    def run(value: float) -> Poisoned:
        callback = INQCallback(schedule=SCHEDULE)
        module = Poisoned(callback, value, optimizer=OPTIMIZERS["adamw-foreach"])
        trainer(callback, Witness(callback), gradient_clip_val=clip).fit(module)
        assert_quantized(module, callback)
        assert module.poisoned > 0
        return module

    healthy, poisoned = run(0.0), run(value)
    for name, tensor in healthy.state_dict().items():
        assert torch.equal(tensor, poisoned.state_dict()[name]), name


class Scaled(TinyModule):
    """Manual optimization with a loss scale that overflows in every third batch, whose step is then skipped."""

    def __init__(self) -> None:
        super().__init__(OPTIMIZERS["adamw-foreach"])
        self.automatic_optimization = False
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        self.skipped = 0

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss(batch) * (float("inf") if batch_idx % 3 == 1 else 1.0)
        self.manual_backward(self.scaler.scale(loss))
        before = self.net[0].bias.detach().clone()
        self.scaler.step(optimizer.optimizer)
        self.scaler.update()
        self.skipped += torch.equal(before, self.net[0].bias.detach())


def test_steps_that_a_gradient_scaler_skips_leave_frozen_weights_exact() -> None:
    module = Scaled()
    assert_fits_exactly(module)
    assert module.skipped == 4  # batch 1 of 4 in each of four epochs
    assert all(bool(torch.isfinite(p).all()) for p in module.parameters())


# ---- manual optimization ---------------------------------------------------------------------------------------------


class GAN(LightningModule):
    """A generator and a discriminator with an optimizer each, in manual optimization."""

    def __init__(self, backward: str = "manual_backward", clip: float | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(3, 9), nn.ReLU(), nn.Linear(9, 8))
        self.discriminator = nn.Sequential(nn.Linear(8, 7), nn.LeakyReLU(), nn.Linear(7, 1))
        self.backward_by, self.clip = backward, clip

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        raw = self.backward_by == "raw"
        for_generator, for_discriminator = self.optimizers(use_pl_optimizer=not raw)
        noise = torch.randn(len(batch[0]), 3)
        bce = nn.functional.binary_cross_entropy_with_logits
        judged = self.discriminator(self.generator(noise))
        self.step(for_generator, bce(judged, torch.ones_like(judged)))
        real, fake = self.discriminator(batch[0]), self.discriminator(self.generator(noise).detach())
        self.step(for_discriminator, bce(real, torch.ones_like(real)) + bce(fake, torch.zeros_like(fake)))
        if self.clip is not None:  # as Wasserstein GANs do, behind the optimizer's back
            for p in self.discriminator.parameters():
                p.data.clamp_(-self.clip, self.clip)

    def step(self, optimizer: Any, loss: Tensor) -> None:
        optimizer.zero_grad()
        if self.backward_by == "raw":
            loss.backward()
        else:
            self.manual_backward(loss)
        optimizer.step()

    def configure_optimizers(self) -> list[optim.Optimizer]:
        return [
            optim.Adam(self.generator.parameters(), lr=1e-2, weight_decay=1e-2),
            optim.SGD(self.discriminator.parameters(), lr=1e-1, momentum=0.9, weight_decay=1e-2),
        ]

    def train_dataloader(self) -> Any:
        return loader(32)


@pytest.mark.parametrize("backward", ["manual_backward", "raw"])
def test_both_networks_of_a_gan_are_quantized(backward: str) -> None:
    module = GAN(backward)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    callback, _ = assert_fits_exactly(module)
    assert len(callback.layers) == 4
    assert not any(torch.equal(p, before[name]) for name, p in module.named_parameters() if name.endswith("bias"))


def test_weights_clipped_after_the_optimizers_step_come_back_to_their_grid() -> None:
    # 0.13 lies below most levels, so that clipping moves frozen weights at every step.
    assert_fits_exactly(GAN(clip=0.13))


def test_one_network_of_a_gan_can_be_left_out() -> None:
    module = GAN()
    callback = INQCallback(schedule=SCHEDULE, include=["generator.*"])
    trainer(callback, Witness(callback)).fit(module)
    assert [layer.name for layer in callback.layers] == ["generator.0.weight", "generator.2.weight"]
    assert_quantized(module, callback)


def test_a_schedule_in_steps_counts_the_steps_of_both_optimizers() -> None:
    callback = INQCallback(schedule=Schedule([0.5, 1.0], [0, 16], "step"))
    witness = Witness(callback)
    module = GAN()
    trainer(callback, witness).fit(module)
    assert [round(f, 1) for f in witness.fractions[:9]] == [0.5] * 8 + [1.0]


# ---- unusual optimizers ----------------------------------------------------------------------------------------------


class Lookahead(optim.Optimizer):
    """Wraps an optimizer and never initializes its base class, as the widespread implementations do."""

    def __init__(self, base: optim.Optimizer, every: int = 2) -> None:
        self.base, self.every, self.steps = base, every, 0
        self.defaults, self.param_groups, self.state = base.defaults, base.param_groups, base.state
        self.slow = [[p.detach().clone() for p in group["params"]] for group in base.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = self.base.step(closure)
        self.steps += 1
        if self.steps % self.every == 0:
            for group, slow in zip(self.param_groups, self.slow, strict=False):
                for p, s in zip(group["params"], slow, strict=True):
                    s.add_(p.data - s, alpha=0.5)
                    p.data.copy_(s)
        return loss


def momentum(p: Any) -> optim.Optimizer:
    return optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2)


def test_an_optimizer_that_takes_no_hooks_is_made_up_for_at_the_end_of_the_batch() -> None:
    with pytest.raises(AttributeError):
        Lookahead(momentum(TinyModule().parameters())).register_step_post_hook(lambda *args: None)
    assert_fits_exactly(TinyModule(lambda p: Lookahead(momentum(p))))


def test_a_hookless_optimizer_beside_an_ordinary_one_is_made_up_for_too() -> None:
    class Mixed(GAN):
        def configure_optimizers(self) -> list[optim.Optimizer]:
            first, second = super().configure_optimizers()
            return [first, Lookahead(second)]

    assert_fits_exactly(Mixed())


@pytest.mark.parametrize("calls_optimizer", [False, True])
def test_an_optimizer_step_that_moves_weights_itself_leaves_frozen_ones(calls_optimizer: bool) -> None:
    class ByHand(TinyModule):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
            if calls_optimizer:
                optimizer.step(closure=closure)
            else:
                closure()
            with torch.no_grad():
                for p in self.parameters():
                    p.data.mul_(0.99).sub_(0.05 * torch.sign(p.grad))

    module = ByHand()
    before = module.net[0].bias.detach().clone()
    assert_fits_exactly(module)
    assert not torch.equal(module.net[0].bias, before)


def test_an_optimizer_exchanged_during_the_run_leaves_frozen_weights_alone() -> None:
    class Exchange(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.current_epoch == 1:
                old = trainer.optimizers[0]
                memo = {id(p): p for p in pl_module.parameters()}  # a copy of the optimizer over the same parameters
                new = copy.deepcopy(old, memo)
                assert new is not old
                assert new.param_groups[0]["params"][0] is old.param_groups[0]["params"][0]
                assert not new._optimizer_step_post_hooks
                trainer.optimizers = [new]

    assert_fits_exactly(TinyModule(), Exchange())


def test_a_configured_deep_copy_of_an_optimizer_leaves_frozen_weights_alone() -> None:
    def copied(p: Any) -> optim.Optimizer:
        old = momentum(p)
        return copy.deepcopy(old, {id(q): q for group in old.param_groups for q in group["params"]})

    module, plain = TinyModule(copied), TinyModule()
    assert_fits_exactly(module)
    assert_fits_exactly(plain)
    assert same_bits(module.net[0].bias.detach(), plain.net[0].bias.detach())


def test_lbfgs_is_refused_with_a_remedy() -> None:
    module = TinyModule(lambda p: optim.LBFGS(p))
    before = module.net[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"LBFGS moves the weights several times within one step.*SGD or AdamW"):
        trainer(INQCallback(schedule=SCHEDULE)).fit(module)
    assert same_bits(module.net[0].weight.detach(), before)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_compiled_optimizer_step_leaves_frozen_weights_alone(backend: str) -> None:
    def compiled(p: Any) -> optim.Optimizer:
        optimizer = momentum(p)
        optimizer.step = torch.compile(optimizer.step, fullgraph=False, backend=backend)
        return optimizer

    assert_fits_exactly(TinyModule(compiled))


@pytest.mark.parametrize("embeddings", [True, False])
def test_sparse_gradients_of_an_embedding_leave_frozen_weights_alone(embeddings: bool) -> None:
    class Words(TinyModule):
        def __init__(self) -> None:
            super().__init__(lambda p: optim.SGD(p, lr=0.5))
            self.words = nn.Embedding(16, 8, sparse=True)

        def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            x, y = batch
            return super().loss((x + self.words((x[:, 0] * 4).abs().long() % 16), y))

    module = Words()
    table = module.words.weight.detach().clone()
    callback = INQCallback(schedule=SCHEDULE, embeddings=embeddings)
    trainer(callback, Witness(callback)).fit(module)
    assert ("words.weight" in [layer.name for layer in callback.layers]) == embeddings
    assert not torch.equal(module.words.weight, table)
    assert_quantized(module, callback)


# ---- parameter groups added later ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduled", [False, True])
def test_parameter_groups_added_during_the_run_are_quantized_and_keep_their_rates(scheduled: bool) -> None:
    class Growing(TinyModule):
        def configure_optimizers(self) -> Any:
            optimizer = momentum(self.net[3].parameters())
            if not scheduled:
                return optimizer
            return {"optimizer": optimizer, "lr_scheduler": lr_scheduler.StepLR(optimizer, 1, 0.5)}

        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.optimizers().optimizer.add_param_group({"params": list(self.net[:2].parameters()), "lr": 0.03})

    class Rates(Callback):
        def __init__(self) -> None:
            self.rates: list[list[float]] = []

        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            if trainer.is_last_batch or trainer.global_step % 4 == 0:
                self.rates.append([round(g["lr"], 6) for g in trainer.optimizers[0].param_groups])

    module, rates = Growing(), Rates()
    before = module.net[0].bias.detach().clone()
    callback = INQCallback(schedule={0: 0.5, 2: 1.0})
    witness = Witness(callback)
    trainer(callback, witness, rates, max_epochs=4).fit(module)
    if scheduled:
        assert [r[0] for r in rates.rates] == [0.1, 0.1, 0.05, 0.05, 0.1, 0.1, 0.05, 0.05]
    else:
        assert rates.rates == [[0.1]] * 2 + [[0.1, 0.03]] * 6
    assert_quantized(module, callback)
    assert not torch.equal(module.net[0].bias, before)
