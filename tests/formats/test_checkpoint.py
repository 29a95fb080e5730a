from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import TinyModule, trainer
from torch import nn

from inq_lightning import INQCallback, PowerOfTwoGrid, read_checkpoint, save_accelerator, save_packed
from inq_lightning.formats.checkpoint import holds_withheld, load_checkpoint


def quantized() -> nn.Module:
    net = nn.Linear(4, 4)
    net.weight.data = PowerOfTwoGrid(0).quantize(net.weight.data)
    return net


def test_a_checkpoint_tells_what_the_callback_does(tmp_path: Path) -> None:
    module, callback = TinyModule(), INQCallback(4, layer_bits={"net.3": 3}, schedule={0: 0.5, 3: 1.0})
    run = trainer(callback, max_epochs=4)
    run.fit(module)
    run.save_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    contents = read_checkpoint(tmp_path / "last.ckpt")
    assert contents.layers == callback.layers
    assert (contents.kind, contents.schedule, contents.phase) == ("checkpoint", callback.quantizer.timetable, 2)
    for layer in callback.layers:
        assert torch.equal(contents.masks[layer.name], callback.frozen_mask(layer.name))


def test_a_state_that_does_not_belong_to_the_weights_is_refused(tmp_path: Path) -> None:
    module, callback = TinyModule(), INQCallback(schedule={0: 0.5, 3: 1.0})
    run = trainer(callback, max_epochs=4)
    run.fit(module)
    run.save_checkpoint(tmp_path / "last.ckpt", weights_only=False)

    def refused(missing: str = "", **changes: object) -> str:
        checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
        checkpoint["callbacks"]["INQCallback"]["layers"]["net.0.weight"].update(changes)
        if missing:
            del checkpoint["state_dict"][missing]
        torch.save(checkpoint, tmp_path / "other.ckpt")
        with pytest.raises(ValueError, match=r"other\.ckpt: ") as error:
            read_checkpoint(tmp_path / "other.ckpt")
        return str(error.value)

    assert "names net.3.weight, which the file's state_dict lacks" in refused("net.3.weight")
    assert "7 frozen weights of [14, 8] in net.0.weight, the file 112 of [14, 8]" in refused(frozen=7)
    assert "[8, 14] in net.0.weight" in refused(shape=[8, 14])
    assert "the kind of a grid must be one of" in refused(grid={"kind": "unknown"})


@pytest.mark.parametrize("compiled", [False, True])
def test_old_and_new_pickles_and_safetensors_give_the_same_weights_under_plain_names(
    compiled: bool, tmp_path: Path
) -> None:
    net = quantized()
    state = (torch.compile(net) if compiled else net).state_dict()
    torch.save(state, tmp_path / "new")
    torch.save(state, tmp_path / "old", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "safe")
    for name in ("new", "old", "safe"):
        contents = read_checkpoint(tmp_path / name)
        assert (contents.kind, contents.layers, contents.schedule) == ("state_dict", None, None)
        assert contents.state_dict.keys() == {"weight", "bias"}
        assert all(torch.equal(value, net.state_dict()[key]) for key, value in contents.state_dict.items())
        assert load_checkpoint(tmp_path / name).keys() == state.keys()


def test_files_for_inference_are_no_checkpoints(tmp_path: Path) -> None:
    save_packed(quantized(), tmp_path / "packed.safetensors")
    save_accelerator(quantized(), tmp_path / "fp8.safetensors", "fp8")
    for name in ("packed", "fp8"):
        with pytest.raises(ValueError, match=rf"{name}\.safetensors cannot be read as a checkpoint or a state_dict"):
            read_checkpoint(tmp_path / f"{name}.safetensors")


class Runs:
    """What runs code where a pickle of it is loaded without care."""

    def __reduce__(self) -> Any:
        return shutil.copyfile, ("last.ckpt", "it-ran")


def test_objects_of_a_checkpoint_are_withheld_and_their_code_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hparams = {"optimizer": partial(torch.optim.SGD, lr=0.1), "activation": nn.ReLU, "runs": Runs(), "width": 8}
    torch.save({"state_dict": quantized().state_dict(), "hyper_parameters": hparams}, "last.ckpt")
    checkpoint = load_checkpoint("last.ckpt")
    assert {name: holds_withheld(value) for name, value in checkpoint["hyper_parameters"].items()} == {
        "optimizer": True,
        "activation": True,
        "runs": True,
        "width": False,
    }
    assert read_checkpoint("last.ckpt").state_dict.keys() == {"weight", "bias"}
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    with pytest.raises(Exception, match="weights_only"):  # only while such a file is loaded
        torch.load("last.ckpt", weights_only=True)
