from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from support import SCHEDULE, TinyModule, Witness, assert_quantized, assert_same_state, same_bits, trainer, weights
from torch import Tensor, nn
from torch.utils.data import DataLoader

from inq_lightning import INQCallback, Schedule

BOUND = 0.2  # below the weights' largest level
BETWEEN = "were changed between training steps"
WITHIN = "were changed within a training step"


@torch.no_grad()
def clamp(weight: nn.Parameter) -> None:
    weight.clamp_(-BOUND, BOUND)


def clamp_data(weight: nn.Parameter) -> None:
    weight.data.clamp_(-BOUND, BOUND)


def replace_data(weight: nn.Parameter) -> None:
    weight.data = weight.data.clamp(-BOUND, BOUND)


def renormalize(weight: nn.Parameter) -> None:
    weight.data = torch.renorm(weight.data, p=2, dim=0, maxnorm=2 * BOUND)


CONSTRAINTS: list[Callable[[nn.Parameter], None]] = [clamp, clamp_data, replace_data, renormalize]


class Constrained(TinyModule):
    """Constrains its first layer's weights in one of its hooks."""

    def __init__(self, constraint: Callable[[nn.Parameter], None], hook: str, only: Any = lambda module: True) -> None:
        super().__init__()
        self.constraint, self.only = constraint, only
        setattr(self, hook, self.apply_constraint)
        self.moved_in_steps: list[dict[str, int]] = []

    def apply_constraint(self, *args: Any) -> None:
        if self.only(self):
            self.constraint(self.net[0].weight)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.moved_in_steps.append(inq(self.trainer).quantizer.moved())
        return super().training_step(batch, batch_idx)


class Meddler(Callback):
    """Runs something in one of its hooks."""

    def __init__(self, hook: str, action: Callable[[Trainer, LightningModule], None]) -> None:
        setattr(self, hook, lambda trainer, module, *args: action(trainer, module))


def inq(trainer: Trainer) -> INQCallback:
    return next(callback for callback in trainer.callbacks if isinstance(callback, INQCallback))


def add_to_one(trainer: Trainer, module: LightningModule) -> None:
    with torch.no_grad():
        module.net[0].weight[0, 0] += 0.01


def saver(folder: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **options)


def saved(folder: Path) -> list[dict[str, Any]]:
    paths = sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    return [torch.load(path, weights_only=True) for path in paths]


def moved_in(checkpoint: dict[str, Any], module: TinyModule) -> dict[str, int]:
    """How many weights that a checkpoint calls frozen are on no power of two; by its own state."""
    from inq_lightning.core.frozen import FrozenWeight

    off = {}
    for name, layer in checkpoint["callbacks"]["INQCallback"]["layers"].items():
        weight = FrozenWeight(name, nn.Parameter(checkpoint["state_dict"][name].clone()), layer["bits"])
        try:
            weight.load_state_dict(layer)
        except ValueError as error:
            off[name] = int(str(error).split(": ")[1].split()[0])
    return off


# ---- between the steps -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_batch_start", "on_train_epoch_end"])
def test_a_constraint_in_a_hook_of_the_module_does_not_move_frozen_weights(
    constraint: Callable[[nn.Parameter], None], hook: str, tmp_path: Path
) -> None:
    module, callback = Constrained(constraint, hook), INQCallback(schedule=SCHEDULE)
    fitted = trainer(callback, saver(tmp_path), enable_checkpointing=True, limit_val_batches=1)
    with pytest.warns(UserWarning, match=r"net\.0\.weight: \d+ of \d+ frozen weights were changed (between|within)"):
        fitted.fit(module)
    assert_quantized(module, callback)
    if hook != "on_train_batch_start":
        assert not any(module.moved_in_steps)  # no step has seen them moved
    last = saved(tmp_path)[-1]
    assert last["inq"]["fully_quantized"]
    assert not moved_in(last, module)


@pytest.mark.parametrize("first", [False, True], ids=["meddler-last", "meddler-first"])
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_before_zero_grad", "on_train_epoch_start"])
def test_other_callbacks_do_not_move_frozen_weights_either(hook: str, first: bool) -> None:
    module, callback = TinyModule(), INQCallback(schedule=SCHEDULE)
    meddler = Meddler(hook, lambda _, module: clamp_data(module.net[0].weight))
    fitted = trainer(*([meddler, callback] if first else [callback, meddler]))
    with pytest.warns(UserWarning, match=r"net\.0\.weight: \d+ of \d+ frozen weights"):
        fitted.fit(module)
    assert_quantized(module, callback)


def test_a_constraint_still_holds_for_free_weights() -> None:
    module, callback = Constrained(clamp, "on_train_batch_end"), INQCallback(schedule={0: 0.25, 4: 1.0})
    with pytest.warns(UserWarning, match=BETWEEN):
        trainer(callback, max_epochs=5, limit_train_batches=4).fit(module)
    mask = callback.frozen_mask("net.0.weight")
    assert mask.all()
    assert module.net[0].weight.abs().max() > BOUND
    assert (module.net[0].weight.abs() <= 0.25).sum() > 60  # what was free until the end was clamped, then rounded


def test_what_moves_weights_again_and_again_is_said_once() -> None:
    module = Constrained(clamp_data, "on_train_batch_end")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer(INQCallback(schedule=SCHEDULE), limit_val_batches=1).fit(module)
    assert len([w for w in said if BETWEEN in str(w.message)]) == 1


def test_a_step_schedule_is_held_as_well() -> None:
    module = Constrained(clamp_data, "on_train_batch_end")
    callback = INQCallback(schedule=Schedule([0.25, 0.5, 1.0], [2, 6, 9], "step"))
    with pytest.warns(UserWarning, match=BETWEEN):
        trainer(callback).fit(module)
    assert_quantized(module, callback)
    assert not any(module.moved_in_steps)


@pytest.mark.parametrize("constraint", [clamp, clamp_data])
@pytest.mark.parametrize("step", [2, 4, 7, 13])
def test_a_resumed_run_under_a_constraint_ends_bit_identical(
    constraint: Callable[[nn.Parameter], None], step: int, tmp_path: Path
) -> None:
    whole = Constrained(constraint, "on_train_batch_end")
    with pytest.warns(UserWarning, match=BETWEEN):
        trainer(INQCallback(schedule=SCHEDULE), saver(tmp_path, every_n_train_steps=1), enable_checkpointing=True).fit(
            whole
        )
    resumed, callback = Constrained(constraint, "on_train_batch_end"), INQCallback(schedule=SCHEDULE)
    with pytest.warns(UserWarning, match=BETWEEN):
        trainer(callback).fit(resumed, ckpt_path=tmp_path / f"step={step}.ckpt")
    assert_quantized(resumed, callback)
    assert_same_state(whole, resumed)


class Diary(Callback):
    """In which epoch each warning was given."""

    def __init__(self, text: str, record: list[warnings.WarningMessage]) -> None:
        self.text, self.record, self.epoch = text, record, -1

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.epoch < 0 and any(self.text in str(w.message) for w in self.record):
            self.epoch = trainer.current_epoch


@pytest.mark.parametrize("where", ["hook", "forward"])
@pytest.mark.parametrize(("epoch", "batch"), [(0, 3), (1, 0), (1, 1), (1, 2), (2, 3)])
def test_what_begins_to_move_them_is_found_by_the_end_of_that_epoch(where: str, epoch: int, batch: int) -> None:
    def begun(module: LightningModule) -> bool:
        return module.global_step >= 4 * epoch + batch + (where == "hook")

    module = Constrained(clamp_data, "on_train_batch_end" if where == "hook" else "unused", begun)
    if where == "forward":
        module.net[0].register_forward_pre_hook(lambda layer, inputs: module.apply_constraint())
    callback = INQCallback(schedule={0: 0.5, 3: 1.0})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        diary = Diary(BETWEEN if where == "hook" else WITHIN, said)
        trainer(callback, diary).fit(module)
    assert diary.epoch == epoch
    assert_quantized(module, callback)


# ---- in the forward pass ---------------------------------------------------------------------------------------------


class MaxNorm(nn.Linear):
    """A layer as EEGNet has: it renormalizes its own weight whenever it is used."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=2 * BOUND)
        return super().forward(x)


class Renormalizing(TinyModule):
    def __init__(self, automatic: bool = True) -> None:
        super().__init__()
        self.net[0] = MaxNorm(8, 14)
        self.automatic_optimization = automatic

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None


@pytest.mark.parametrize("automatic", [True, False], ids=["automatic", "manual"])
@pytest.mark.parametrize("validated", [0, 1], ids=["unvalidated", "validated"])
def test_a_layer_that_renormalizes_its_weight_in_forward_ends_on_its_grid_and_is_named(
    automatic: bool, validated: int, tmp_path: Path
) -> None:
    module, callback = Renormalizing(automatic), INQCallback(schedule=SCHEDULE)
    witness = Witness(callback)
    fitted = trainer(callback, witness, saver(tmp_path), enable_checkpointing=True, limit_val_batches=validated)
    with pytest.warns(UserWarning, match=r"net\.0\.weight: .* the network computes with other weights"):
        fitted.fit(module)
    assert_quantized(module, callback)
    for checkpoint in saved(tmp_path):
        assert not moved_in(checkpoint, module)
    assert saved(tmp_path)[-1]["inq"]["fully_quantized"]
    fitted.test(module, verbose=False)
    fitted.predict(module, DataLoader(torch.randn(2, 8), batch_size=2))
    assert_quantized(module, callback)  # evaluating has not moved them either


Renormalizing.predict_step = lambda self, batch, batch_idx: self.net(batch)


def test_evaluating_leaves_alone_what_a_user_has_put_in_after_the_run() -> None:
    module, callback = Renormalizing(), INQCallback(schedule=SCHEDULE)
    fitted = trainer(callback)
    with pytest.warns(UserWarning, match=WITHIN):
        fitted.fit(module)
    with torch.no_grad():
        module.net[3].weight.fill_(0.3)
    fitted.test(module, verbose=False)
    assert (module.net[3].weight == torch.tensor(0.3)).all()


def test_a_network_that_nothing_moves_gets_no_warning(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*frozen weights")
        trainer(INQCallback(schedule=SCHEDULE), saver(tmp_path), enable_checkpointing=True, limit_val_batches=1).fit(
            TinyModule()
        )


# ---- after the last epoch --------------------------------------------------------------------------------------------


class EndsBadly(TinyModule):
    def __init__(self, hook: str) -> None:
        super().__init__()
        setattr(self, hook, self.meddle)

    def meddle(self) -> None:
        if self.current_epoch >= 3:
            add_to_one(self.trainer, self)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_train_end", "callback", "callback-on_fit_end"])
def test_a_run_moved_at_its_very_end_is_saved_put_right_and_named(
    hook: str, checkpointing: bool, tmp_path: Path
) -> None:
    callback, module = INQCallback(schedule=SCHEDULE), TinyModule() if "callback" in hook else EndsBadly(hook)
    others: list[Callback] = [saver(tmp_path / "kept", every_n_epochs=99)] if checkpointing else []
    if "callback" in hook:
        others.insert(0, Meddler("on_fit_end" if "fit_end" in hook else "on_train_end", add_to_one))
    fitted = trainer(*others, callback, enable_checkpointing=checkpointing, default_root_dir=tmp_path)
    with pytest.raises(RuntimeError, match=r"^net\.0\.weight: 1 of 112 frozen weights were changed after") as error:
        fitted.fit(module)
    assert_quantized(module, callback)
    path = tmp_path / "kept" / "inq-end-step=16.ckpt" if checkpointing else tmp_path / "inq-end-step=16.ckpt"
    assert str(path) in str(error.value)
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["inq"]["fully_quantized"]
    assert not moved_in(checkpoint, module)
    again, resumed = INQCallback(schedule=SCHEDULE), TinyModule()
    trainer(again).fit(resumed, ckpt_path=path)
    assert_quantized(resumed, again)
    assert same_bits(resumed.net[0].weight, module.net[0].weight)


def test_a_long_list_of_moved_parameters_is_cut_short() -> None:
    class Deep(TinyModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(12)), nn.Linear(8, 4))

        def on_train_batch_end(self, *args: Any) -> None:
            for parameter in self.parameters():
                parameter.data.mul_(0.999)

    with pytest.warns(UserWarning, match=r"net\.7\.weight: .* and 5 more parameters were changed"):
        trainer(INQCallback(schedule=SCHEDULE)).fit(Deep())


# ---- swapped for an evaluation ---------------------------------------------------------------------------------------


class Averaged(TinyModule):
    """Evaluates and saves with a moving average of its weights."""

    def __init__(self, pointers: bool, swap_in: str, swap_out: str) -> None:
        super().__init__()
        self.pointers = pointers
        self.average = [p.detach().clone() for p in self.net.parameters()]
        self.kept: list[Tensor] = []
        for hook, action in ((swap_in, self.swap_in), (swap_out, self.swap_out)):
            setattr(self, hook, action)

    def on_train_batch_end(self, *args: Any) -> None:
        for mean, p in zip(self.average, self.net.parameters(), strict=True):
            mean.lerp_(p.detach(), 0.5)

    def swap_in(self) -> None:
        if self.kept or self.trainer.sanity_checking:
            return
        self.kept = [p.data if self.pointers else p.detach().clone() for p in self.net.parameters()]
        self.put(self.average)
        self.eval()

    def swap_out(self) -> None:
        self.train()
        if self.kept:
            self.put(self.kept)
        self.kept = []

    def put(self, tensors: list[Tensor]) -> None:
        for p, tensor in zip(self.net.parameters(), tensors, strict=True):
            if self.pointers:
                p.data = tensor
            else:
                p.data.copy_(tensor)


SWAPS = [
    ("on_validation_start", "on_validation_end"),
    ("on_validation_epoch_start", "on_validation_end"),
    ("on_validation_model_eval", "on_validation_model_train"),
    ("on_validation_start", "on_train_epoch_end"),
]


@pytest.mark.parametrize("pointers", [False, True], ids=["copied", "swapped"])
@pytest.mark.parametrize("hooks", SWAPS, ids="-".join)
def test_a_checkpoint_of_swapped_weights_says_what_they_are(
    hooks: tuple[str, str], pointers: bool, tmp_path: Path
) -> None:
    plain = TinyModule()
    trainer(INQCallback(schedule=SCHEDULE), limit_val_batches=1, max_epochs=5).fit(plain)
    module, callback = Averaged(pointers, *hooks), INQCallback(schedule=SCHEDULE)
    save = saver(tmp_path, save_on_train_epoch_end=False)
    fitted = trainer(callback, save, enable_checkpointing=True, limit_val_batches=1, max_epochs=5)
    with pytest.warns(UserWarning, match=r"net\.0\.weight: \d+ of \d+ frozen weights.* have other values"):
        fitted.fit(module)
    files = saved(tmp_path)
    assert len(files) == 5
    for checkpoint in files:
        off, said = moved_in(checkpoint, module), checkpoint["inq"]
        assert said.get("moved", {}) == off
        assert said["fully_quantized"] is (checkpoint["epoch"] >= 3 and not off)
        frozen = sum(layer["frozen"] for layer in checkpoint["callbacks"]["INQCallback"]["layers"].values())
        assert said["quantized_fraction"] == pytest.approx((frozen - sum(off.values())) / 168)
    assert "moved" in files[0]["inq"]
    assert_quantized(module, callback)
    if hooks[1] != "on_train_epoch_end":
        assert "moved" in files[3]["inq"]
        assert_same_state(plain, module)  # the run itself has not noticed


def test_weights_swapped_at_an_epochs_end_are_saved_with_frozen_ones_at_their_values(tmp_path: Path) -> None:
    module, callback = Averaged(False, "on_train_epoch_end", "on_train_epoch_start"), INQCallback(schedule=SCHEDULE)
    fitted = trainer(callback, saver(tmp_path), enable_checkpointing=True)
    with pytest.warns(UserWarning, match=BETWEEN):
        fitted.fit(module)
    for checkpoint in saved(tmp_path):
        assert "moved" not in checkpoint["inq"]
        assert not moved_in(checkpoint, module)
    assert_quantized(module, callback)


def test_an_average_put_into_the_checkpoint_by_the_module_is_noticed(tmp_path: Path) -> None:
    class Replacing(TinyModule):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["state_dict"] = {name: 0.99 * t for name, t in checkpoint["state_dict"].items()}

    module, callback = Replacing(), INQCallback(schedule=SCHEDULE)
    fitted = trainer(callback, saver(tmp_path), enable_checkpointing=True)
    with pytest.warns(UserWarning, match="have other values in a checkpoint"):
        fitted.fit(module)
    assert [checkpoint["inq"]["fully_quantized"] for checkpoint in saved(tmp_path)] == [False] * 4
    assert_quantized(module, callback)


def test_weights_put_in_after_the_run_are_saved_as_they_are_and_not_called_quantized(tmp_path: Path) -> None:
    module, callback = TinyModule(), INQCallback(schedule=SCHEDULE)
    fitted = trainer(callback)
    fitted.fit(module)
    other = copy.deepcopy(module.state_dict())
    other["net.3.weight"] += 0.01
    module.load_state_dict(other)
    with pytest.warns(UserWarning, match=r"net\.3\.weight: 56 of 56 frozen weights have other values"):
        fitted.save_checkpoint(tmp_path / "other.ckpt")
    checkpoint = torch.load(tmp_path / "other.ckpt", weights_only=True)
    assert not checkpoint["inq"]["fully_quantized"]
    assert torch.equal(checkpoint["state_dict"]["net.3.weight"], other["net.3.weight"])


def test_compiled_parts_are_found_in_the_checkpoint_by_their_names(tmp_path: Path) -> None:
    module, callback = TinyModule(), INQCallback(schedule=SCHEDULE)
    module.net[3] = torch.compile(module.net[3], backend="eager")
    fitted = trainer(callback)
    fitted.fit(module)
    fitted.save_checkpoint(tmp_path / "fine.ckpt")
    assert torch.load(tmp_path / "fine.ckpt", weights_only=True)["inq"]["fully_quantized"]
    with torch.no_grad():
        module.net[3].weight.add_(0.01)
    with pytest.warns(UserWarning, match=r"net\.3\.weight: 56 of 56"):
        fitted.save_checkpoint(tmp_path / "moved.ckpt")
    assert torch.load(tmp_path / "moved.ckpt", weights_only=True)["inq"]["moved"] == {"net.3.weight": 56}
    assert weights(module, callback)
