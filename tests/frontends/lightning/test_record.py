from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.io import AsyncCheckpointIO
from support import SCHEDULE, TinyModule, assert_quantized, assert_same_state, trainer

from inq_lightning import INQCallback


def fit(callback: INQCallback, *others: Any, **options: Any) -> tuple[Trainer, TinyModule]:
    module = TinyModule()
    fitted = trainer(callback, *others, **options)
    fitted.fit(module)
    return fitted, module


def said(path: str | Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)["inq"]


def test_checkpoints_of_weights_only_carry_the_record_too(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_weights_only=True)
    fitted, _ = fit(INQCallback(schedule=SCHEDULE), keep, enable_checkpointing=True)
    paths = [tmp_path / f"epoch={epoch}.ckpt" for epoch in range(4)]
    assert [said(path)["quantized_fraction"] for path in paths] == list(SCHEDULE.values())
    assert [said(path)["fully_quantized"] for path in paths] == [False, False, False, True]
    fitted.save_checkpoint(tmp_path / "after.ckpt", weights_only=True)
    whole = tmp_path / "whole.ckpt"
    fitted.save_checkpoint(whole)
    assert said(tmp_path / "after.ckpt") == said(whole)
    assert "callbacks" not in torch.load(tmp_path / "after.ckpt", weights_only=True)


class Own(TorchCheckpointIO):
    """Somebody's own way to write files."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.calls.append("save")
        super().save_checkpoint(checkpoint, path)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self.calls.append("load")
        return super().load_checkpoint(*args, **kwargs)

    def remove_checkpoint(self, path: Any) -> None:
        self.calls.append("remove")
        super().remove_checkpoint(path)

    def teardown(self) -> None:
        self.calls.append("teardown")


@pytest.mark.parametrize("plugin", [Own, AsyncCheckpointIO])
def test_a_plugin_that_writes_the_files_goes_on_doing_so(plugin: Any, tmp_path: Path) -> None:
    io = plugin()
    options = {"plugins": [io], "enable_checkpointing": True}
    _, whole = fit(INQCallback(schedule=SCHEDULE), ModelCheckpoint(tmp_path, filename="{epoch}"), **options)
    assert said(tmp_path / "epoch=3.ckpt")["fully_quantized"]
    callback, module = INQCallback(schedule=SCHEDULE), TinyModule()
    trainer(callback, plugins=[io]).fit(module, ckpt_path=tmp_path / "epoch=3.ckpt")
    assert_quantized(module, callback)
    assert_same_state(whole, module)
    if isinstance(io, Own):
        assert {"save", "load", "remove", "teardown"} == set(io.calls)


def test_a_run_after_a_run_writes_the_record_of_the_second(tmp_path: Path) -> None:
    callback = INQCallback(schedule=SCHEDULE)
    fitted, _ = fit(callback)
    fitted.fit_loop.max_epochs = 10
    callback.options = INQCallback(schedule={0: 0.5, 9: 1.0}).options
    with pytest.raises(ValueError, match="runs only"):
        fitted.fit(TinyModule())
    again = trainer(callback, max_epochs=10, max_steps=12)
    callback.options = INQCallback(schedule={0: 0.5, 2: 1.0}).options
    again.fit(TinyModule())
    again.save_checkpoint(tmp_path / "again.ckpt", weights_only=True)
    assert said(tmp_path / "again.ckpt")["fully_quantized"]


def test_a_checkpoint_of_which_nothing_is_known_says_nothing(tmp_path: Path) -> None:
    fitted = trainer(INQCallback(schedule=SCHEDULE), limit_val_batches=1)
    fitted.validate(TinyModule(), verbose=False)
    fitted.save_checkpoint(tmp_path / "validated.ckpt")
    assert "inq" not in torch.load(tmp_path / "validated.ckpt", weights_only=True)


# ---- whose checkpoint it is ------------------------------------------------------------------------------------------


class Derived(INQCallback):
    """A user's own subclass."""


@pytest.mark.parametrize(("first", "second"), [(INQCallback, Derived), (Derived, INQCallback), (Derived, Derived)])
def test_a_subclass_goes_on_with_the_checkpoint_of_its_base_and_the_other_way_round(
    first: type[INQCallback], second: type[INQCallback], tmp_path: Path
) -> None:
    _, whole = fit(
        first(schedule=SCHEDULE),
        ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=6),
        enable_checkpointing=True,
    )
    callback, module = second(schedule=SCHEDULE), TinyModule()
    trainer(callback).fit(module, ckpt_path=tmp_path / "step=12.ckpt")
    assert_quantized(module, callback)
    assert_same_state(whole, module)


@pytest.mark.parametrize("pair", [(Derived, INQCallback), (Derived, Derived), (INQCallback, Derived)])
def test_two_of_them_are_refused_whatever_their_classes(pair: tuple[type[INQCallback], type[INQCallback]]) -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback"):  # Lightning's
        trainer(pair[0](schedule=SCHEDULE), pair[1](schedule=SCHEDULE))
    run = trainer(pair[0](schedule=SCHEDULE))
    run.callbacks.append(pair[1](schedule=SCHEDULE))
    with pytest.raises(ValueError, match="a Trainer takes one INQCallback"):
        run.fit(TinyModule())


# ---- runs that have nothing to do ------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [1, 2])
def test_a_second_fit_with_nothing_left_to_do_keeps_the_state(times: int, tmp_path: Path) -> None:
    callback = INQCallback(schedule=SCHEDULE)
    fitted, module = fit(callback)
    for _ in range(times):
        fitted.fit(module)
    assert_quantized(module, callback)
    assert callback.phase == 4
    fitted.save_checkpoint(tmp_path / "again.ckpt")
    assert said(tmp_path / "again.ckpt")["fully_quantized"]
    assert torch.load(tmp_path / "again.ckpt", weights_only=True)["callbacks"]["INQCallback"]["phase"] == 4


def test_a_fit_of_another_module_with_nothing_to_do_takes_nothing_over() -> None:
    callback = INQCallback(schedule=SCHEDULE)
    fitted, _ = fit(callback)
    with pytest.warns(UserWarning, match="nothing was trained"):
        fitted.fit(TinyModule())
    assert callback.layers == []


@pytest.mark.parametrize("options", [{"limit_train_batches": 0}, {"max_epochs": 0}, {"max_steps": 0}])
def test_a_run_without_a_batch_says_that_nothing_is_quantized(options: dict[str, int]) -> None:
    (name, value), callback = next(iter(options.items())), INQCallback(schedule=SCHEDULE)
    with pytest.warns(
        UserWarning, match=f"nothing was trained, so INQCallback has quantized nothing: .*{name}={value}"
    ):
        fit(callback, **options)
    assert callback.quantized_fraction == 0.0
