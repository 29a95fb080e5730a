"""What must be refused, and with which words: arguments, checkpoints, weights, disks."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import kill_worker
import pytest
import torch
from processes import run_program
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from support import SCHEDULE, TinyModule, assert_quantized, assert_same_state, loader, same_bits, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from inq_lightning import INQCallback, Schedule

NAN, INF = float("nan"), float("inf")
FLAGS = ("embeddings", "keep_zeros", "restart_lr", "reset_optimizer", "log_per_layer")

# ---- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        *[("bits", v, "bits must be an integer from 2 to 8") for v in (0, 1, 9, -5, 4.0, "5", None, True, [5], NAN)],
        *[("partition", v, "must be one of magnitude, random") for v in ("largest", "", None, 0, ["magnitude"])],
        *[("underflow", v, "must be one of nearest, truncate") for v in ("floor", "Nearest", None, 1, ["nearest"])],
        *[("exponent", v, "exponent must be one of auto, max, mse") for v in ("least", "MAX", None, 1, ["mse"])],
        ("schedule", {}, "at least one portion"),
        ("schedule", {"a": 1.0}, "a start must be a whole number, got 'a'"),
        ("schedule", {0.5: 1.0}, "a start must be a whole number, got 0.5"),
        ("schedule", {True: 1.0}, "a start must be a whole number, got True"),
        ("schedule", {-1: 1.0}, "starts must be increasing and not negative"),
        ("schedule", {0: "half", 1: 1.0}, "a portion must be a number, got 'half'"),
        ("schedule", {0: None}, "a portion must be a number, got None"),
        ("schedule", {0: 0.5, 1: 0.5, 2: 1.0}, "each must be larger than the one before"),
        ("schedule", {0: 0.7, 1: 0.5, 2: 1.0}, "each must be larger than the one before"),
        ("schedule", {0: 0.5, 1: 0.9}, "last portion must be 1.0"),
        *[("schedule", {0: v}, r"portions must lie in \(0, 1\]") for v in (0, -0.5, 1.5, 50, NAN, INF)],
        *[("schedule", v, "schedule must be a Schedule, a mapping") for v in ([0.5, 1.0], 1.0, True, Schedule, b"x")],
        ("schedule", "resnet", "unknown schedule 'resnet'.*did you mean resnet"),
        ("include", "net.0", r"include must be a list of patterns as text, got 'net.0'; write \['net.0'\]"),
        ("exclude", "net.0", r"exclude must be a list of patterns as text, got 'net.0'; write \['net.0'\]"),
        *[
            (argument, v, f"{argument} must be a list of patterns as text")
            for argument in ("include", "exclude")
            for v in ([1], [None], ["net.0", 3], 3, b"net", True, {"net"}, iter(["net"]))
        ],
        *[("layer_bits", {"net.0": v}, r"layer_bits\['net.0'\]: bits must be") for v in (1, 9, 4.0, "4", None, True)],
        *[
            ("layer_bits", v, "layer_bits must be a mapping pattern → bits")
            for v in ({1: 4}, {None: 4}, [4], [("net.0", 4)], "net.0", 4, True)
        ],
        *[(f, v, f"{f} must be True or False, got") for f in FLAGS for v in (0, 1, "yes", "false", None, [])],
        *[("seed", v, "seed must be a whole number from 0 to") for v in (-1, 1 << 31, 1.0, "1", None, True, NAN)],
    ],
    ids=lambda v: re.sub(r" at 0x\w+", "", repr(v))[:30],  # the same in every worker of pytest-xdist
)
def test_bad_arguments_are_refused_by_name_and_with_what_is_allowed(argument: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        INQCallback(**{argument: value})


# ---- checkpoints that do not fit -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints after every step of four epochs of four."""
    folder = tmp_path_factory.mktemp("saved")
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(INQCallback(schedule=SCHEDULE), saver, enable_checkpointing=True).fit(TinyModule())
    return folder


class Steps(Callback):
    """Counts batches."""

    def __init__(self) -> None:
        self.count = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.count += 1


def assert_refused(path: Path, callback: INQCallback, *messages: str, **options: Any) -> None:
    """``fit`` refuses the checkpoint before any weight changes, and leaves it usable for reading its weights."""
    module, steps = TinyModule(), Steps()
    with pytest.raises(ValueError, match="the checkpoint's INQ state") as error:
        trainer(callback, steps, **options).fit(module, ckpt_path=path)
    for message in messages:
        assert message in str(error.value)
    assert steps.count == 0
    there = torch.load(path)["state_dict"]
    assert all(same_bits(t.float(), there[name].float()) for name, t in module.state_dict().items())
    for callbacks in ([callback], []):
        for run in ("test", "validate"):
            other = TinyModule(seed=1)
            evaluate = getattr(trainer(*callbacks, limit_test_batches=1, limit_val_batches=1), run)
            evaluate(other, ckpt_path=path, verbose=False)
            assert all(same_bits(t.float(), there[name].float()) for name, t in other.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (
            {"bits": 4},
            ["net.0.weight: bits 5 in the checkpoint, 4 here", "net.3.weight: bits 5 in the checkpoint, 4 here"],
        ),
        ({"layer_bits": {"net.3": 8}}, ["net.3.weight: bits 5 in the checkpoint, 8 here"]),
        ({"exclude": ["net.3"]}, ["net.3.weight: quantized in the checkpoint, not selected here"]),
        ({"underflow": "truncate"}, ["net.0.weight: underflow nearest in the checkpoint, truncate here"]),
        (
            {"schedule": {0: 0.5, 2: 1.0}},
            [
                "schedule portions: (0.5, 0.75, 0.875, 1.0) in the checkpoint, (0.5, 1.0) here",
                "schedule starts: (0, 1, 2, 3) in the checkpoint, (0, 2) here",
            ],
        ),
        ({"schedule": Schedule([0.5, 0.75, 0.875, 1.0], [0, 1, 2, 3], "step")}, ["unit: epoch in the checkpoint"]),
        ({"partition": "random"}, ["partition: 'magnitude' in the checkpoint, 'random' here"]),
        ({"partition": "random", "seed": 5}, ["partition: ", "seed: 0 in the checkpoint, 5 here"]),
        ({"exponent": "mse"}, ["exponent: 'auto' in the checkpoint, 'mse' here"]),
        ({"levels": "full"}, ["levels: 'auto' in the checkpoint, 'full' here"]),
        ({"layer_levels": {"net.3": "dense"}}, ["layer_levels: None in the checkpoint, {'net.3': 'dense'} here"]),
        ({"include": ["net.*"]}, ["include: None in the checkpoint, ['net.*'] here"]),
        ({"embeddings": True}, ["embeddings: False in the checkpoint, True here"]),
        ({"keep_zeros": True}, ["keep_zeros: False in the checkpoint, True here"]),
        ({"restart_lr": False}, ["restart_lr: True in the checkpoint, False here"]),
        ({"reset_optimizer": True}, ["reset_optimizer: False in the checkpoint, True here"]),
        (
            {"bits": 3, "underflow": "truncate", "exclude": ["net.0"], "schedule": {0: 1.0}},
            ["schedule portions", "net.0.weight: quantized", "net.3.weight: bits", "net.3.weight: underflow"],
        ),
    ],
    ids=lambda v: str(list(v)) if isinstance(v, dict) else "",
)
def test_a_checkpoint_of_other_settings_is_refused_and_every_difference_named(
    saved: Path, arguments: dict[str, Any], messages: list[str]
) -> None:
    assert_refused(saved / "step=6.ckpt", INQCallback(**({"schedule": SCHEDULE} | arguments)), *messages)


def test_what_is_logged_may_differ_in_a_resumed_run(saved: Path) -> None:
    callback = INQCallback(schedule=SCHEDULE, log_per_layer=True)
    trainer(callback).fit(TinyModule(), ckpt_path=saved / "step=6.ckpt")
    assert callback.quantized_fraction == 1.0


def damaged(saved: Path, folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of a checkpoint whose INQ state has been tampered with."""
    checkpoint = torch.load(saved / "step=6.ckpt")
    state = checkpoint["callbacks"]["INQCallback"]
    replacement = change(state)
    if replacement is not None:
        checkpoint["callbacks"]["INQCallback"] = replacement
    torch.save(checkpoint, folder / "damaged.ckpt")
    return folder / "damaged.ckpt"


def layer(state: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = state["layers"]["net.3.weight"]
    return found


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a later version": (lambda s: s.update(version=3), "version 3, this release reads versions 1 to 2"),
    "no version": (lambda s: s.__delitem__("version"), "version None"),
    "no dict": (lambda s: [1, 2], "it is a list, not a dict"),
    "text": (lambda s: "INQ", "it is a str, not a dict"),
    "no layers": (lambda s: s.__delitem__("layers"), "layers is missing"),
    "no phase or origin": (lambda s: [s.pop("phase"), s.pop("origin")][:0] or None, "phase is missing"),
    "phase of another type": (lambda s: s.update(phase="2"), "phase is of type str"),
    "phase beyond the last": (lambda s: s.update(phase=7), "phase 7 of 4"),
    "negative origin": (lambda s: s.update(origin=-1), "counted from -1"),
    "no schedule": (lambda s: s.update(schedule=None), "schedule is of type NoneType"),
    "unknown schedule field": (lambda s: s["schedule"].update(length=3), "schedule: "),
    "bad portions": (lambda s: s["schedule"].update(portions=[0.5]), "schedule: "),
    "layer of another type": (lambda s: s["layers"].update({"net.3.weight": 5}), "net.3.weight is a int, not a dict"),
    "no mask": (lambda s: layer(s).__delitem__("mask"), "net.3.weight: mask is missing"),
    "mask of another type": (lambda s: layer(s).update(mask=[1]), "net.3.weight: mask is of type list"),
    "no options": (lambda s: s.__delitem__("options"), "options is missing"),
    "grid of another type": (lambda s: layer(s).update(grid="0"), "net.3.weight: grid is of type str"),
    "unknown kind of grid": (lambda s: layer(s)["grid"].update(kind="apot"), "net.3.weight: the kind of a grid must"),
    "unknown field of a grid": (lambda s: layer(s)["grid"].update(n3=0), "net.3.weight: {"),
    "exponent of another type": (lambda s: layer(s)["grid"].update(n1="0"), "net.3.weight: n1 must be a whole number"),
    "count of another type": (lambda s: layer(s).update(frozen=2.0), "net.3.weight: frozen is of type float"),
    "other shape": (lambda s: layer(s).update(shape=[14, 4]), "net.3.weight: shape [14, 4] in the checkpoint"),
    "other layer": (lambda s: s["layers"].update({"net.9.weight": layer(s)}), "net.9.weight: quantized in the"),
    "short mask": (lambda s: layer(s).update(mask=layer(s)["mask"][:-1]), "net.3.weight: a packed mask"),
    "mask of floats": (lambda s: layer(s).update(mask=layer(s)["mask"].float()), "net.3.weight: a packed mask"),
    "other mask": (
        lambda s: layer(s).update(mask=layer(s)["mask"].flip(0)),
        "7 weights that the saved state calls frozen are not on its grid",
    ),
    "other count": (lambda s: layer(s).update(frozen=3), "net.3.weight: the saved mask has 42 weights, not 3"),
    "other exponent": (lambda s: layer(s)["grid"].update(n1=-9), "net.3.weight: 42 weights that"),
    "no exponent": (lambda s: layer(s)["grid"].update(n1=None), "net.3.weight: 42 weights that"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_with_a_damaged_state_is_refused_and_the_damage_named(
    saved: Path, tmp_path: Path, damage: str
) -> None:
    change, message = DAMAGES[damage]
    assert_refused(damaged(saved, tmp_path, change), INQCallback(schedule=SCHEDULE), message)


def test_a_module_of_other_shapes_is_refused(saved: Path) -> None:
    class Wider(TinyModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 15), nn.BatchNorm1d(15), nn.ReLU(), nn.Linear(15, 4))

    with pytest.raises(RuntimeError, match=r"size mismatch for net\.0\.weight"):
        trainer(INQCallback(schedule=SCHEDULE)).fit(Wider(), ckpt_path=saved / "step=6.ckpt")


def test_another_shape_that_only_the_state_knows_is_refused(saved: Path) -> None:
    class Reshaped(TinyModule):
        strict_loading = False

        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 15), nn.BatchNorm1d(15), nn.ReLU(), nn.Linear(15, 4))

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["state_dict"] = {}
            checkpoint["optimizer_states"] = [self.configure_optimizers().state_dict()]

    with pytest.raises(ValueError, match=r"net\.0\.weight: shape \[14, 8\] in the checkpoint, \[15, 8\] here"):
        trainer(INQCallback(schedule=SCHEDULE)).fit(Reshaped(), ckpt_path=saved / "step=6.ckpt")


# ---- checkpoints that do fit -----------------------------------------------------------------------------------------


class Fractions(Callback):
    def __init__(self, callback: INQCallback) -> None:
        self.callback = callback
        self.seen: dict[int, float] = {}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seen[trainer.current_epoch] = self.callback.quantized_fraction


@pytest.mark.parametrize(
    ("schedule", "fractions"),
    [({0: 0.5, 2: 1.0}, [0.5, 0.5, 1.0, 1.0, 1.0, 1.0]), (Schedule([0.5, 1.0]), [0.5, 0.5, 0.5, 1.0, 1.0, 1.0])],
    ids=["starts", "open"],
)
def test_a_checkpoint_without_inq_state_is_quantized_from_its_epoch_on_and_this_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, schedule: Any, fractions: list[float]
) -> None:
    plain = TinyModule()
    run = trainer(max_epochs=2)
    run.fit(plain)
    run.save_checkpoint(tmp_path / "plain.ckpt", weights_only=False)
    inq = INQCallback(schedule=schedule)
    seen, module = Fractions(inq), TinyModule(seed=1)
    with caplog.at_level(logging.INFO):
        trainer(inq, seen, max_epochs=8).fit(module, ckpt_path=tmp_path / "plain.ckpt")
    assert "quantization begins on its weights, at epoch 2" in caplog.text
    assert seen.seen == dict(zip(range(2, 8), fractions, strict=True))
    assert_quantized(module, inq)


def test_a_checkpoint_without_inq_state_leaves_too_few_epochs_for_the_schedule(tmp_path: Path) -> None:
    run = trainer(max_epochs=2)
    run.fit(TinyModule())
    run.save_checkpoint(tmp_path / "plain.ckpt", weights_only=False)
    with pytest.raises(ValueError, match=r"reaches portion 1\.0 at epoch 3 .* runs only 2 epochs"):
        trainer(INQCallback(schedule=SCHEDULE), max_epochs=4).fit(TinyModule(), ckpt_path=tmp_path / "plain.ckpt")


def test_an_open_schedule_keeps_its_timetable_when_a_longer_run_resumes(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    inq = INQCallback()
    first = Fractions(inq)
    trainer(inq, first, saver, max_epochs=4, enable_checkpointing=True).fit(TinyModule())
    inq, module = INQCallback(), TinyModule()
    again = Fractions(inq)
    trainer(inq, again, max_epochs=9).fit(module, ckpt_path=tmp_path / "step=6.ckpt")
    assert [again.seen[epoch] for epoch in range(1, 4)] == [first.seen[epoch] for epoch in range(1, 4)]
    assert len(again.seen) == 8
    assert_quantized(module, inq)


@pytest.mark.parametrize("version", [1, 2])
def test_a_checkpoint_of_the_paper_s_rule_resumes_by_default_where_that_is_the_same(
    version: int, tmp_path: Path
) -> None:
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = TinyModule()
    trainer(INQCallback(schedule=SCHEDULE, exponent="max"), keep, enable_checkpointing=True).fit(whole)
    path = tmp_path / "step=6.ckpt"
    if version == 1:  # which kept no options, and of a grid n1 alone
        checkpoint = torch.load(path)
        state = checkpoint["callbacks"]["INQCallback"]
        for layer in state["layers"].values():
            layer["n1"] = layer.pop("grid")["n1"]
        checkpoint["callbacks"]["INQCallback"] = {k: v for k, v in state.items() if k != "options"} | {"version": 1}
        torch.save(checkpoint, path)
    module, inq = TinyModule(), INQCallback(schedule=SCHEDULE)
    trainer(inq).fit(module, ckpt_path=path)
    assert_quantized(module, inq)
    assert_same_state(whole, module)


def test_a_checkpoint_of_another_rule_than_the_bits_ask_for_is_refused_by_name(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    options = {"bits": 2, "schedule": SCHEDULE}
    whole = TinyModule()
    trainer(INQCallback(**options, exponent="max"), keep, enable_checkpointing=True).fit(whole)
    with pytest.raises(ValueError, match="exponent: 'max' in the checkpoint, 'auto' here"):
        trainer(INQCallback(**options)).fit(TinyModule(), ckpt_path=tmp_path / "step=6.ckpt")
    module, inq = TinyModule(), INQCallback(**options, exponent="max")
    trainer(inq).fit(module, ckpt_path=tmp_path / "step=6.ckpt")
    assert_same_state(whole, module)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["empty", "half", "all but a byte", "noise", "a byte in the middle"])
def test_a_broken_file_fails_loudly_and_the_one_before_still_resumes(saved: Path, tmp_path: Path, damage: str) -> None:
    whole = (saved / "step=6.ckpt").read_bytes()
    middle = whole.index(b"INQCallback")
    content = {
        "empty": b"",
        "half": whole[: len(whole) // 2],
        "all but a byte": whole[:-1],
        "noise": bytes(range(256)) * 40,
        "a byte in the middle": whole[:middle] + b"\xff" + whole[middle + 1 :],
    }[damage]
    (tmp_path / "broken.ckpt").write_bytes(content)
    module, steps = TinyModule(), Steps()
    before = {name: t.clone() for name, t in module.state_dict().items()}
    with pytest.raises((EOFError, OSError, RuntimeError, UnicodeDecodeError, UnpicklingError)):
        trainer(INQCallback(schedule=SCHEDULE), steps).fit(module, ckpt_path=tmp_path / "broken.ckpt")
    assert steps.count == 0
    assert all(same_bits(t.float(), before[name].float()) for name, t in module.state_dict().items())
    inq = INQCallback(schedule=SCHEDULE)
    trainer(inq).fit(module, ckpt_path=saved / "step=5.ckpt")
    assert_quantized(module, inq)


def test_a_full_disk_leaves_no_partial_file_and_the_good_ones_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    run_program(kill_worker.__file__, tmp_path, cwd=tmp_path)
    errors = json.loads((tmp_path / "errors.json").read_text())
    assert errors == {
        f"{name} at {size}": "File too large"
        for size in (0, 500, 2000)
        for name in ("new.ckpt", "good.ckpt", "new.json", "report.json")
    }
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["afterwards.ckpt", "errors.json", "good.ckpt", "report.json", "temporary"]
    assert not list(temporary.iterdir())
    assert json.loads((tmp_path / "report.json").read_text())["quantized_fraction"] == 1.0
    good, later = (torch.load(tmp_path / name)["state_dict"] for name in ("good.ckpt", "afterwards.ckpt"))
    assert good["net.1.bias"].any()
    assert not later["net.1.bias"].any()
    net = kill_worker.module()
    trainer(kill_worker.callback(), max_epochs=kill_worker.EPOCHS + 1).fit(net, ckpt_path=tmp_path / "good.ckpt")


# ---- weights that are no numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_weight_that_is_no_number_at_the_start_is_refused_by_name(value: float) -> None:
    module = TinyModule()
    with torch.no_grad():
        module.net[3].weight[1, 2] = value
    before = {name: t.clone() for name, t in module.state_dict().items()}
    with pytest.raises(ValueError, match=r"net\.3\.weight: .*nan or inf.*"):
        trainer(INQCallback(schedule=SCHEDULE)).fit(module)
    assert torch.equal(module.net[0].weight, before["net.0.weight"])


class Diverging(TinyModule):
    """Its loss is nan in step 6, in the second epoch."""

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return super().loss(batch) * (NAN if self.diverge and self.global_step == 6 else 1.0)

    diverge = True


def test_a_loss_that_becomes_nan_is_refused_at_the_next_phase_and_the_checkpoint_before_it_resumes(
    tmp_path: Path,
) -> None:
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    with pytest.raises(ValueError, match=r"net\.0\.weight: .*nan or inf.*go back to a checkpoint.*learning rate"):
        trainer(INQCallback(schedule=SCHEDULE), saver, enable_checkpointing=True).fit(Diverging())
    assert (tmp_path / "step=8.ckpt").exists()
    assert not (tmp_path / "step=9.ckpt").exists()
    inq, module, whole = INQCallback(schedule=SCHEDULE), Diverging(), Diverging()
    module.diverge = whole.diverge = False
    trainer(inq).fit(module, ckpt_path=tmp_path / "step=6.ckpt")
    assert_quantized(module, inq)
    trainer(INQCallback(schedule=SCHEDULE)).fit(whole)
    assert_same_state(module, whole)


def test_frozen_weights_survive_a_loss_of_nan() -> None:
    class Look(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            mask = inq.frozen_mask("net.0.weight")
            if trainer.global_step == 4:
                self.before = pl_module.net[0].weight.detach().clone()
            if trainer.global_step == 8:
                mask = inq.frozen_mask("net.0.weight")
                self.good = bool(pl_module.net[0].weight[mask].isfinite().all())
                self.bad = bool(pl_module.net[0].weight[~mask].isnan().all())

    inq, look = INQCallback(schedule=SCHEDULE), Look()
    with pytest.raises(ValueError, match="nan or inf"):
        trainer(inq, look).fit(Diverging())
    assert look.good
    assert look.bad


# ---- runs of a length that nobody knows ------------------------------------------------------------------------------


class Stream(IterableDataset[Any]):
    """Four batches, which it does not tell."""

    def __iter__(self) -> Iterator[Any]:
        return iter(loader(32).dataset)


class Streamed(TinyModule):
    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Stream(), batch_size=8)


class Manual(TinyModule):
    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


IN_STEPS = Schedule([0.5, 1.0], [0, 9], "step")


@pytest.mark.parametrize("kind", [Streamed])
@pytest.mark.parametrize(
    ("schedule", "options", "message"),
    [
        (None, {"max_epochs": 4, "max_steps": 8}, r"at epoch 3 .* max_steps=8 may end the run before: .*max_steps=-1"),
        ({0: 0.5, 3: 1.0}, {"max_epochs": 4, "max_steps": 8}, "at epoch 3 .* max_steps=8"),
        ({0: 0.5, 3: 1.0}, {"max_epochs": -1, "max_steps": 8}, "at epoch 3 .* max_steps=8 .* in steps"),
        (IN_STEPS, {"max_epochs": 4, "max_steps": 20}, r"at step 9 .* max_epochs=4 .*max_epochs=-1"),
        (IN_STEPS, {"max_epochs": 4}, "at step 9 .* max_epochs=4"),
    ],
)
def test_a_run_that_may_end_before_portion_1_for_all_that_is_known_is_refused(
    kind: type[TinyModule], schedule: Any, options: dict[str, int], message: str
) -> None:
    module = kind()
    before = module.net[0].weight.detach().clone()
    with pytest.raises(ValueError, match=message):
        trainer(INQCallback(schedule=schedule), **options).fit(module)
    assert torch.equal(module.net[0].weight, before)


@pytest.mark.parametrize("kind", [Streamed, Manual])
@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        (None, {"max_epochs": 4}),
        (None, {"max_epochs": -1, "max_steps": 16}),
        ({0: 1.0}, {"max_epochs": 4, "max_steps": 8}),
        (IN_STEPS, {"max_epochs": -1, "max_steps": 16}),
        (Schedule([0.5, 1.0], [0, 3], "step"), {"max_epochs": 4}),  # an epoch has one step at least
    ],
)
def test_a_run_that_reaches_portion_1_for_certain_is_not(
    kind: type[TinyModule], schedule: Any, options: dict[str, int]
) -> None:
    module, callback = kind(), INQCallback(schedule=schedule)
    trainer(callback, **options).fit(module)
    assert_quantized(module, callback)
