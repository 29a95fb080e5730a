from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch
from processes import run_program
from support import TinyModule, trainer
from torch import nn

import inq_lightning
from inq_lightning import INQCallback, load_packed
from inq_lightning.cli.export import main
from inq_lightning.cli.inspect import main as inspect
from inq_lightning.formats.accelerator import NUMBER_FORMATS, read_accelerator
from inq_lightning.formats.checkpoint import read_checkpoint
from inq_lightning.formats.packed import read_packed
from inq_lightning.formats.registry import ACCELERATORS, FORMATS, read_file

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
    module, callback = TinyModule(), INQCallback(4, levels="paper", schedule={0: 0.5, 1: 1.0})
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
    main([str(tmp_path / "net.pt"), str(tmp_path / "half.safetensors"), "--entropy-coded", "--float-dtype", "float16"])
    assert "largest error of other tensors in float16: " in capsys.readouterr().out
    assert torch.equal(read_packed(tmp_path / "half.safetensors").state_dict["0.weight"], module.net[0].weight)


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
    main([str(checkpoint), "net.onnx", *model, "--input-shape", "2,8"])
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
    command = ["net.pt", "net.onnx", "--model", "my_tokens:tokens", "--input-shape", "2,3"]
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
    ("out", "options", "message"),
    [
        ("net.safetensors", ["--format", "fp8", "--input-dtype", "int64"], "no meaning for --format fp8"),
        ("net.safetensors", ["--fixed-batch"], "--fixed-batch has no meaning for --format packed"),
        ("net.safetensors", ["--activations", "int8"], "--activations has no meaning for --format packed"),
        (
            "net.safetensors",
            ["--format", "fp8", "--input-shape", "1,8"],
            "--input-shape has no meaning",
        ),
        ("net.onnx", ["--entropy-coded"], "--entropy-coded has no meaning for --format onnx"),
        ("net.safetensors", ["--format", "fp8"], "no run of inq-train around the checkpoint"),
        ("net.safetensors", ["--format", "fp8", "--model", "my_other_networks"], "give MODULE:FACTORY"),
        ("net.onnx", ["--model", "torch.nn:Identity"], "say --input-shape|does not fit the network"),
        ("net.onnx", ["--format", "packed"], "a file of --format packed must end in .safetensors"),
        ("net.safetensors", ["--format", "onnx"], "a file of --format onnx must end in .onnx"),
        ("net.bin", [], "a file without --format must end in .safetensors or .onnx"),
        (
            "net.safetensors",
            ["--exclude", "net.9"],
            "'net.9' matches no quantized layer; there are net.0.weight",
        ),
    ],
)
def test_options_that_cannot_work_are_refused(
    run: tuple[TinyModule, Path],
    tmp_path: Path,
    out: str,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(run[1]), str(tmp_path / out), *options])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("inq-export: ")
    assert any(part in error for part in message.split("|"))
    assert list(tmp_path.iterdir()) == []


def test_named_layers_stay_in_floating_point_whatever_their_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("my_mixed.py").write_text(NETWORK)
    module, callback = TinyModule(), INQCallback(4, levels="paper", layer_bits={"net.3": 8}, schedule={0: 1.0})
    fit = trainer(callback, max_epochs=1)
    fit.fit(module)
    fit.save_checkpoint("mixed.ckpt")
    command = ["mixed.ckpt", "net.safetensors", "--format", "mxfp4", "--model", "my_mixed:build"]
    with pytest.raises(SystemExit):
        main(command)
    assert "3.weight has 8; use" in (error := capsys.readouterr().err)
    assert "--exclude NAME" in error
    main([*command, "--exclude", "3"])
    contents = read_file("net.safetensors")
    assert [(layer.name, layer.bits) for layer in contents.layers or []] == [("0.weight", 4)]
    assert torch.equal(contents.state_dict["3.weight"], module.net[3].weight)
    torch.save(module.net.state_dict(), "plain.pt")  # tells nothing of its layers
    main(["plain.pt", "half.safetensors", "--exclude", "3.*"])
    assert "not quantized: 3.weight" in capsys.readouterr().out
    assert torch.equal(read_packed("half.safetensors").state_dict["3.weight"], module.net[3].weight)


def test_every_format_can_be_inspected_and_has_the_users_permissions(
    run: tuple[TinyModule, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("my_net.py").write_text(NETWORK)
    before = os.umask(0o027)
    try:
        for target in FORMATS.values():
            if target.write:
                path = Path(f"{target.name}{target.suffixes[0]}")
                network = [] if target.of_tensors else ["--model", "my_net:build"]
                network += ["--input-shape", "2,8"] if "inputs" in target.options else []
                main([str(run[1]), str(path), "--format", target.name, *network])
                assert path.stat().st_mode & 0o777 == 0o640, target.name
                inspect([str(path)])
                told = capsys.readouterr().out
                assert re.search(rf"^kind +{target.name}", told, re.MULTILINE)
                assert re.search(r"^fully quantized +yes", told, re.MULTILINE), told
    finally:
        os.umask(before)


def test_the_table_of_formats_says_what_they_are() -> None:
    assert {name: target.bits_per_weight for name, target in NUMBER_FORMATS.items()} == ACCELERATORS


@pytest.mark.parametrize("command", ["export", "inspect"])
def test_help_and_version_come_without_torch(command: str, tmp_path: Path) -> None:
    for option, expected in (("--help", "examples:"), ("--version", f"inq-{command} {inq_lightning.__version__}")):
        code = (
            f"import sys; sys.argv[1:] = [{option!r}]\n"
            f"from inq_lightning.cli.{command} import main\n"
            "try: main()\n"
            "finally: assert 'torch' not in sys.modules"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout


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
            main([str(tmp_path / name), str(tmp_path / "out.safetensors")])
        assert message in capsys.readouterr().err
    main([str(tmp_path / "float.pt"), str(tmp_path / "out.safetensors"), "--allow-partial"])
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
    told = run_program("inq-export", "run/quantized.ckpt", "net.onnx", cwd=tmp_path)
    assert "largest difference of an output to torch" in told
    assert (tmp_path / "net.onnx").is_file()
