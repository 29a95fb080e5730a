from __future__ import annotations

import sys
from pathlib import Path

import onnxruntime
import pytest
import torch
from processes import run_program
from support import TinyModule, trainer
from torch import nn

from inq_lightning import INQCallback, load_packed
from inq_lightning.cli.export import main
from inq_lightning.formats.accelerator import read_accelerator
from inq_lightning.formats.checkpoint import read_checkpoint
from inq_lightning.formats.packed import read_packed

NETWORK = """
from torch import nn
def build():
    return nn.Sequential(nn.Linear(8, 14), nn.BatchNorm1d(14), nn.ReLU(), nn.Linear(14, 4))
def wrong():
    return 5
def tokens():
    return nn.Sequential(nn.Embedding(2, 8), nn.Flatten(), nn.Unflatten(0, (2, 1)), nn.Flatten(0, 1), nn.Linear(24, 4))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyModule, Path]:
    """A quantized module and its checkpoint."""
    module, callback = TinyModule(), INQCallback(4, schedule={0: 0.5, 1: 1.0})
    fit = trainer(callback, max_epochs=2)
    fit.fit(module)
    path = tmp_path_factory.mktemp("run") / "quantized.ckpt"
    fit.save_checkpoint(path)
    return module, path


def test_a_checkpoint_becomes_an_artifact(
    run: tuple[TinyModule, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, checkpoint = run
    main([str(checkpoint), str(tmp_path / "net.safetensors")])
    told = capsys.readouterr().out
    assert "168 quantized weights" in told
    assert f"{(tmp_path / 'net.safetensors').stat().st_size:,} bytes" in told
    artifact = read_packed(tmp_path / "net.safetensors")
    assert all(torch.equal(artifact.state_dict[name], value) for name, value in module.state_dict().items())
    assert {layer.bits for layer in artifact.layers} == {4}
    assert artifact.metadata["schedule"]["portions"] == [0.5, 1.0]
    plain = TinyModule(seed=3).net
    load_packed(tmp_path / "net.safetensors", plain)
    assert torch.equal(plain[0].weight, module.net[0].weight)


def test_a_plain_state_dict_is_fitted_and_options_reach_the_file(
    run: tuple[TinyModule, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, _ = run
    torch.save(module.net.state_dict(), tmp_path / "net.pt")
    assert read_checkpoint(tmp_path / "net.pt").layers is None
    main([str(tmp_path / "net.pt"), str(tmp_path / "net.st"), "--entropy-coded", "--float-dtype", "float16"])
    assert "largest error of other tensors in float16: " in capsys.readouterr().out
    assert torch.equal(read_packed(tmp_path / "net.st").state_dict["0.weight"], module.net[0].weight)


def test_other_formats_take_the_network_from_a_factory(
    run: tuple[TinyModule, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, checkpoint = run
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("my_networks.py").write_text(NETWORK)
    model = ["--model", "my_networks:build"]
    main([str(checkpoint), "net.fp8.safetensors", "--format", "fp8", *model])
    assert torch.equal(read_accelerator("net.fp8.safetensors")["0.weight"], module.net[0].weight)
    main([str(checkpoint), "net.onnx", "--format", "onnx", *model, "--input-shape", "2,8"])
    assert "largest difference of an output to torch: " in capsys.readouterr().out
    assert Path("net.onnx").stat().st_size > 0


def test_token_ids_and_a_fixed_batch_can_be_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("my_tokens.py").write_text(NETWORK)
    state = {"0.weight": torch.ones(2, 8), "4.weight": torch.ones(4, 24) / 4, "4.bias": torch.zeros(4)}
    torch.save(state, "net.pt")
    command = ["net.pt", "net.onnx", "--format", "onnx", "--model", "my_tokens:tokens", "--input-shape", "2,3"]
    with pytest.raises(SystemExit):
        main(command)
    assert "does not run on inputs float32(2, 3)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--input-dtype", "int64"])
    assert "with a dynamic batch: " in (error := capsys.readouterr().err)
    assert "--fixed-batch" in error
    main([*command, "--input-dtype", "int64", "--fixed-batch"])
    (tokens,) = onnxruntime.InferenceSession("net.onnx").get_inputs()
    assert (tokens.type, tokens.shape) == ("tensor(int64)", [2, 3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "fp8", "--input-dtype", "int64"], "--input-dtype has no meaning for --format fp8"),
        (["--fixed-batch"], "--fixed-batch has no meaning for --format packed"),
        (["--activations", "int8"], "--activations has no meaning for --format packed"),
        (["--format", "fp8", "--input-shape", "1,8"], "--input-shape has no meaning for --format fp8"),
        (["--format", "onnx", "--entropy-coded"], "--entropy-coded has no meaning for --format onnx"),
        (["--format", "fp8"], "no run of inq-train around the checkpoint"),
        (["--format", "fp8", "--model", "my_other_networks"], "give MODULE:FACTORY"),
        (["--format", "onnx", "--model", "torch.nn:Identity"], "say --input-shape|does not fit the network"),
    ],
)
def test_options_that_cannot_work_are_refused(
    run: tuple[TinyModule, Path], tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(run[1]), str(tmp_path / "out"), *options])
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("inq-export: ")
    assert any(part in error for part in message.split("|"))
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_no_checkpoint_and_networks_off_the_grid_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(nn.Linear(3, 3).state_dict(), tmp_path / "float.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    messages = {
        "float.pt": "weight is not on a grid",
        "list.pt": "holds a list, not a checkpoint or a state_dict",
        "text.pt": "cannot be read",
        "none.pt": "none.pt",
    }
    for name, message in messages.items():
        with pytest.raises(SystemExit):
            main([str(tmp_path / name), str(tmp_path / "out")])
        assert message in capsys.readouterr().err
    main([str(tmp_path / "float.pt"), str(tmp_path / "out"), "--allow-partial"])
    assert "not quantized: weight" in capsys.readouterr().out


def test_a_run_of_inq_train_leaves_its_artifact_and_exports_to_onnx_without_further_options(tmp_path: Path) -> None:
    run_program(
        "inq-train",
        "hydra.run.dir=run",
        "logger=none",
        "pretrain.max_epochs=1",
        "inq.schedule.portions=[0.5,1.0]",
        "inq.schedule.epochs_per_phase=1",
        cwd=tmp_path,
    )
    state = read_checkpoint(tmp_path / "run" / "quantized.ckpt").state_dict
    artifact = read_packed(tmp_path / "run" / "quantized.safetensors")
    assert all(torch.equal(artifact.state_dict[name], value) for name, value in state.items())
    told = run_program("inq-export", "run/quantized.ckpt", "net.onnx", "--format", "onnx", cwd=tmp_path)
    assert "largest difference of an output to torch" in told
    assert (tmp_path / "net.onnx").is_file()
