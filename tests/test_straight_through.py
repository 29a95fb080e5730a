"""straight_through=True: training steps see the network that will be, the optimizer moves the one that is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from support import SCHEDULE, TinyModule, assert_quantized, assert_same_state, trainer, weights
from torch import Tensor
from torch.distributed import HashStore, destroy_process_group, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from inq_lightning import INQCallback
from inq_lightning.frozen import FrozenWeight
from inq_lightning.guards import refuse_sharded


def inq() -> INQCallback:
    return INQCallback(3, SCHEDULE, straight_through=True)


class Watched(TinyModule):
    """Keeps the weights that each training step computes with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[Tensor]] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.seen.append([self.net[i].weight.detach().clone() for i in (0, 3)])
        return super().training_step(batch, batch_idx)


def test_every_step_computes_with_weights_on_the_grid_and_moves_the_unrounded_ones() -> None:
    module, callback = Watched(), inq()
    trainer(callback).fit(module)
    assert_quantized(module, callback)

    # The same, written down as a plain loop.
    plain = TinyModule()
    layers = [FrozenWeight(name, plain.get_parameter(name), 3) for name in ("net.0.weight", "net.3.weight")]
    optimizer = plain.configure_optimizers()
    step, off_grid = 0, 0
    for portion in SCHEDULE.values():
        optimizer = plain.configure_optimizers() if step == 0 else optimizer
        for layer in layers:
            layer.freeze(portion)
        for batch in plain.batches:
            free = [layer.parameter.detach().clone() for layer in layers]
            for layer, seen in zip(layers, module.seen[step], strict=True):
                layer.round_free()
                assert torch.equal(layer.parameter, seen)
                assert torch.equal(layer.grid.round(seen), seen)  # type: ignore[union-attr]
            off_grid += sum(int((now != layer.parameter).sum()) for now, layer in zip(free, layers, strict=True))
            optimizer.zero_grad()
            plain.loss(batch).backward()
            for layer in layers:
                layer.unround_free()
                layer.mask_gradient()
            assert all(torch.equal(layer.parameter, now) for now, layer in zip(free, layers, strict=True))
            optimizer.step()
            for layer in layers:
                layer.restore()
            step += 1
    assert off_grid > 0
    assert_same_state(plain, module)


def test_batches_whose_gradients_accumulate_leave_the_free_weights_alone() -> None:
    module, callback, before = Watched(), inq(), TinyModule()
    trainer(callback, max_epochs=4, accumulate_grad_batches=2, limit_train_batches=2).fit(module)
    assert_quantized(module, callback)
    assert all(torch.equal(a, b) for a, b in zip(module.seen[0], module.seen[1], strict=True))
    assert not torch.equal(module.net[0].weight, before.net[0].weight)


@pytest.mark.parametrize("step", [2, 4, 7])
def test_resuming_ends_bit_identical(tmp_path: Path, step: int) -> None:
    whole, callback = TinyModule(), inq()
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(callback, keep, enable_checkpointing=True).fit(whole)
    resumed = TinyModule(seed=1)
    trainer(inq()).fit(resumed, ckpt_path=tmp_path / f"step={step}.ckpt")
    assert_same_state(resumed, whole)


class Interrupted(TinyModule):
    """Fails in the middle of a step, with the weights rounded."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if self.global_step == 5:
            raise RuntimeError("interrupted")
        return super().training_step(batch, batch_idx)


def test_an_interruption_leaves_the_unrounded_weights() -> None:
    module, callback = Interrupted(), inq()
    with pytest.raises(RuntimeError, match="interrupted"):
        trainer(callback).fit(module)
    for name, weight in weights(module, callback).items():
        free = weight[~callback.frozen_mask(name)]
        assert free.abs().log2().frac().count_nonzero() == len(free), f"{name} was left rounded"


class Raw(TinyModule):
    """Manual optimization that Lightning does not see."""

    def __init__(self, manual_backward: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.by_lightning = manual_backward

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        loss = self.loss(batch)
        if self.by_lightning:
            self.manual_backward(loss)
        else:
            loss.backward()
        optimizer.step()


def test_a_backward_pass_that_lightning_does_not_see_is_refused_with_the_remedy() -> None:
    with pytest.raises(RuntimeError, match=r"call self.manual_backward\(loss\) in place of loss.backward\(\)"):
        trainer(inq()).fit(Raw(manual_backward=False))
    module, callback = Raw(manual_backward=True), inq()
    trainer(callback).fit(module)
    assert_quantized(module, callback)


class Validated(TinyModule):
    """Asks in each validation whether the weights are rounded."""

    def __init__(self) -> None:
        super().__init__()
        self.rounded: list[bool] = []

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.rounded.append(on_powers_of_two(self.net[0].weight))


def on_powers_of_two(weight: Tensor) -> bool:
    weight = weight.detach()[weight != 0]
    return bool((weight.abs().log2().frac() == 0).all())


class Hasty(Callback):
    """Saves a checkpoint before the validation has ended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(self.folder / f"epoch={trainer.current_epoch}.ckpt")


@pytest.mark.parametrize("hasty", [False, True])
def test_validation_sees_the_rounded_weights_and_checkpoints_keep_the_others(tmp_path: Path, hasty: bool) -> None:
    plain, validated, resumed = TinyModule(), Validated(), TinyModule(seed=1)
    trainer(inq()).fit(plain)
    saves = Hasty(tmp_path) if hasty else ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    trainer(inq(), saves, limit_val_batches=1, enable_checkpointing=not hasty).fit(validated)
    assert validated.rounded == [True] * 4
    assert_same_state(validated, plain)
    path = tmp_path / "epoch=1.ckpt"
    assert not on_powers_of_two(torch.load(path, weights_only=False)["state_dict"]["net.0.weight"])
    if not hasty:  # the other one's checkpoints lie inside of an epoch's end, where Lightning does not resume
        trainer(inq()).fit(resumed, ckpt_path=path)
        assert_same_state(resumed, plain)


def test_an_interrupted_validation_leaves_the_unrounded_weights() -> None:
    class Interrupting(Validated):
        def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            raise RuntimeError("interrupted")

    module = Interrupting()
    with pytest.raises(RuntimeError, match="interrupted"):
        trainer(inq(), limit_val_batches=1).fit(module)
    assert module.rounded == [True]
    assert not on_powers_of_two(module.net[0].weight)


def test_validation_outside_of_training_takes_the_weights_as_they_are() -> None:
    class Partly(Interrupted, Validated):
        """Left with three quarters quantized."""

    module, callback = Partly(), inq()
    with pytest.raises(RuntimeError, match="interrupted"):
        trainer(callback).fit(module)
    assert callback.quantized_fraction == 0.75
    trainer(callback, limit_val_batches=1).validate(module, verbose=False)
    assert module.rounded == [False]


def test_sharded_parameters_are_refused_by_name() -> None:
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        weight = distribute_tensor(torch.randn(4, 4), init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match=r"sharded parameters, such as net\.w;"):
            refuse_sharded([FrozenWeight("net.v", torch.randn(4)), FrozenWeight("net.w", weight)])
    finally:
        destroy_process_group()
