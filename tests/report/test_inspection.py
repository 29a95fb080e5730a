from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_program
from pytorch_lightning import Callback, LightningModule, Trainer
from rich.console import Console
from safetensors.torch import save_file
from support import SCHEDULE, TinyModule, record, trainer
from torch import Tensor, nn

from inq_lightning import INQCallback, Levels, PowerOfTwoGrid, Schedule, select_parameters
from inq_lightning.cli.inspect import main
from inq_lightning.core.layer import Layer
from inq_lightning.formats.accelerator import NUMBER_FORMATS, save_accelerator
from inq_lightning.formats.packed import save_packed
from inq_lightning.report.inspection import Inspection, inspect_file, inspect_layer
from inq_lightning.report.tables import inspection_table

LAYERS = ("net.0.weight", "net.3.weight")


class SaveAfterEpoch(Callback):
    def __init__(self, epoch: int, path: Path) -> None:
        self.epoch, self.path = epoch, path

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path, weights_only=False)


class Files:
    """One run of the Trainer: before, after half of it, and at its end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.original, self.partial, self.quantized = (
            folder / f"{n}.ckpt" for n in ("original", "partial", "quantized")
        )
        self.module, self.callback = (
            TinyModule(),
            INQCallback(schedule=SCHEDULE, layer_bits={"net.3": 3}, levels="paper"),
        )
        self.before = {name: value.clone() for name, value in self.module.state_dict().items()}
        torch.save(self.before, self.original)
        run = trainer(self.callback, SaveAfterEpoch(1, self.partial))
        run.fit(self.module)
        run.save_checkpoint(self.quantized, weights_only=False)

    @property
    def weights(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.module.state_dict().items() if name in LAYERS}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("files"))


def assert_describes(inspection: Inspection, files: Files) -> None:
    """Every number of the two layers is the one counted from the weights themselves."""
    assert [layer.name for layer in inspection.layers] == list(LAYERS)
    for layer, known in zip(inspection.layers, files.callback.layers, strict=True):
        weight = files.weights[layer.name]
        assert Layer(layer.name, layer.shape, layer.bits or 0, layer.grid, layer.frozen) == known
        counts = Counter(weight.abs().flatten().tolist())
        assert layer.zeros == counts[0.0] / layer.numel
        assert list(layer.exponents) == list(range(layer.n2 or 0, (layer.n1 or 0) + 1))
        assert layer.exponents == {k: counts[2.0**k] / layer.numel for k in layer.exponents}
    assert inspection.fully_quantized
    assert inspection.quantized_fraction == 1.0


def test_a_checkpoint_tells_layers_schedule_and_phase(files: Files) -> None:
    inspection = inspect_file(files.quantized)
    assert inspection.kind == "checkpoint"
    assert inspection.file_bytes == files.quantized.stat().st_size
    assert (inspection.schedule, inspection.phase) == (Schedule.from_mapping(SCHEDULE), 4)
    assert_describes(inspection, files)
    assert [(x.bytes_before, x.bytes_after) for x in inspection.layers] == [(448, 112 * 5 // 8), (224, 56 * 3 // 8)]
    assert inspection.other_bytes == 4 * (14 + 4 * 14 + 4) + 8  # biases, the norm and its buffers
    assert inspection.bytes_before == inspection.other_bytes + 448 + 224
    assert inspection.bytes_after == inspection.other_bytes + 70 + 21
    assert all(layer.snr_db is None for layer in inspection.layers)


def test_a_checkpoint_of_an_unfinished_run_counts_what_is_frozen(files: Files) -> None:
    inspection = inspect_file(files.partial)
    assert not inspection.fully_quantized
    assert inspection.quantized_fraction == 0.75
    assert inspection.phase == 2
    saved = torch.load(files.partial, weights_only=True)
    for layer in inspection.layers:
        state = saved["callbacks"]["INQCallback"]["layers"][layer.name]
        assert layer.frozen == state["frozen"] == round(0.75 * layer.numel)
        assert (layer.zeros or 0) + sum(layer.exponents.values()) == pytest.approx(1)
        assert layer.bytes_after == layer.bytes_before == 4 * layer.numel


def test_the_reference_gives_the_noise_of_each_layer(files: Files) -> None:
    for path in (files.quantized, files.partial):
        inspection = inspect_file(path, files.original)
        weights = torch.load(path, weights_only=True)["state_dict"]
        for layer in inspection.layers:
            original, weight = files.before[layer.name].double(), weights[layer.name].double()
            if path == files.partial:
                grid = PowerOfTwoGrid(layer.n1, layer.bits or 5)
                mask = torch.isin(weight, grid.levels)  # a free weight is not on the grid, but by chance
                assert int(mask.sum()) == layer.frozen
                original, weight = original[mask], weight[mask]
            expected = 10 * math.log10(float(original.square().sum() / (original - weight).square().sum()))
            assert layer.snr_db == pytest.approx(expected)


def test_a_file_against_itself_has_no_noise_and_stays_json(files: Files) -> None:
    inspection = inspect_file(files.quantized, files.quantized)
    assert [layer.snr_db for layer in inspection.layers] == [math.inf] * 2
    assert [layer["snr_db"] for layer in json.loads(json.dumps(inspection.as_dict(), allow_nan=False))["layers"]] == [
        None,
        None,
    ]


def test_the_weights_of_a_state_dict_tell_by_themselves(files: Files, tmp_path: Path) -> None:
    torch.save(files.module.state_dict(), tmp_path / "weights.bin")
    inspection = inspect_file(tmp_path / "weights.bin")
    assert (inspection.kind, inspection.schedule, inspection.phase) == ("state_dict", None, None)
    assert inspection.fully_quantized
    for layer, known in zip(inspection.layers, files.callback.layers, strict=True):
        assert layer.bits is not None
        assert layer.bits <= known.bits
        assert layer.n1 is not None
        assert set(layer.exponents) >= {math.frexp(w)[1] - 1 for w in files.weights[layer.name].flatten().tolist() if w}


def test_a_full_precision_network_has_no_grids(files: Files) -> None:
    inspection = inspect_file(files.original)
    assert [(x.name, x.bits, x.frozen, x.exponents) for x in inspection.layers] == [(n, None, 0, {}) for n in LAYERS]
    assert not inspection.fully_quantized
    assert inspection.bytes_after == inspection.bytes_before


@pytest.mark.parametrize("entropy_coded", [False, True])
def test_an_artifact_is_described_as_its_checkpoint_is(files: Files, tmp_path: Path, entropy_coded: bool) -> None:
    path, schedule = tmp_path / "network", Schedule.from_mapping(SCHEDULE)
    layers = files.callback.layers
    save_packed(files.module, path, layers=layers, entropy_coded=entropy_coded, schedule=schedule)
    inspection = inspect_file(path, files.original)
    assert (inspection.kind, inspection.schedule) == ("packed", schedule)
    packed = sorted(inspection.layers, key=lambda layer: LAYERS.index(layer.name))
    assert_describes(replace(inspection, layers=tuple(packed)), files)
    assert [layer.snr_db for layer in packed] == [
        x.snr_db for x in inspect_file(files.quantized, files.original).layers
    ]
    if not entropy_coded:
        assert [layer.bytes_after for layer in packed] == [70, 21]


def test_an_unfinished_artifact_names_what_is_on_no_grid(files: Files, tmp_path: Path) -> None:
    module = TinyModule()
    module.load_state_dict(files.module.state_dict() | {"net.3.weight": files.before["net.3.weight"]})
    save_packed(module, tmp_path / "network", allow_partial=True)
    inspection = inspect_file(tmp_path / "network")
    assert {layer.name: layer.bits is None for layer in inspection.layers} == {LAYERS[0]: False, LAYERS[1]: True}
    assert not inspection.fully_quantized


@pytest.mark.parametrize(("target", "bits"), [("mxfp4", 3), ("mxfp6", 5), ("fp8", 6), ("int8", 4)])
def test_a_file_for_accelerators_is_described_as_its_network_is(target: Any, bits: int, tmp_path: Path) -> None:
    model = convolutional(bits)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    records = [record(s.name, bits, -1) for s in select_parameters(model, bits)]
    save_accelerator(model, tmp_path / "model", target, layers=records)
    inspection = inspect_file(tmp_path / "model", tmp_path / "model.pt")
    assert (inspection.kind, inspection.fully_quantized) == (target, True)
    for layer in inspection.layers:
        parameter = model.get_parameter(layer.name).detach()
        expected = inspect_layer(layer.name, parameter, PowerOfTwoGrid(-1, bits), None, parameter)
        assert replace(layer, bytes_after=expected.bytes_after) == expected
        assert parameter.numel() * NUMBER_FORMATS[target].element_bits / 8 < layer.bytes_after < layer.bytes_before
    assert inspection.other_bytes == inspect_file(tmp_path / "model.pt").other_bytes


def test_weights_of_an_accelerators_file_that_are_on_no_grid_are_named(tmp_path: Path) -> None:
    model = nn.Sequential(convolutional(4)[0], nn.Linear(5, 5))
    save_accelerator(model, tmp_path / "model", "int8", allow_partial=True)
    inspection = inspect_file(tmp_path / "model")
    assert {layer.name: layer.bits for layer in inspection.layers} == {"0.weight": 4, "1.weight": None}


def test_a_safetensors_file_of_weights_is_a_state_dict(files: Files, tmp_path: Path) -> None:
    save_file(files.module.state_dict(), tmp_path / "weights")
    torch.save(files.module.state_dict(), tmp_path / "weights.pt")
    inspection, other = (inspect_file(tmp_path / name) for name in ("weights", "weights.pt"))
    assert inspection.kind == "state_dict"
    by_name = {layer.name: layer for layer in other.layers}  # safetensors sorts them
    assert {layer.name: layer for layer in inspection.layers} == by_name


def convolutional(bits: int) -> nn.Module:
    """Every level in use; behind the convolution, a norm that is folded into its scales."""
    torch.manual_seed(bits)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5))
    with torch.no_grad():
        for parameter in (*model[1].parameters(), model[1].running_mean):  # type: ignore[misc, union-attr]
            parameter.uniform_(-1.0, 1.0)
        for selected in select_parameters(model, bits):
            grid = PowerOfTwoGrid(-1, bits)
            codes = torch.randint(-grid.magnitudes, grid.magnitudes + 1, selected.parameter.shape)
            codes.view(-1)[: 2 * grid.magnitudes + 1] = torch.arange(-grid.magnitudes, grid.magnitudes + 1)[
                : codes.numel()
            ]
            selected.parameter.copy_(grid.decode(codes))
    return model.eval()


OFTEN = {(2, "float"), (4, "float"), (5, "float"), (4, "int8"), (5, "int8")}  # one of each container


@pytest.mark.parametrize(
    ("bits", "activations"),
    [
        pytest.param(bits, activations, marks=() if (bits, activations) in OFTEN else pytest.mark.slow)
        for bits in range(2, 9)
        for activations in ("float", "int8")
    ],
)
def test_an_onnx_file_holds_the_codes_of_its_network(bits: int, activations: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from inq_lightning.formats.onnx import export_onnx

    model = convolutional(bits)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    layers = INQCallback(bits).select(model)
    records = [record(s.name, bits, -1) for s in layers]
    export_onnx(model, tmp_path / "model.onnx", torch.randn(2, 2, 6, 6), layers=records, activations=activations)
    inspection = inspect_file(tmp_path / "model.onnx", tmp_path / "model.pt")
    assert inspection.kind == "onnx"
    assert inspection.fully_quantized
    assert sorted(layer.name for layer in inspection.layers) == ["0.weight", "4.weight"]
    for layer in inspection.layers:
        parameter = model.get_parameter(layer.name)
        expected = inspect_layer(layer.name, parameter.detach(), PowerOfTwoGrid(-1, bits), None, parameter.detach())
        assert expected.snr_db == math.inf  # the codes stand for the network's weights, norm folded or not
        assert replace(layer, bytes_after=expected.bytes_after) == expected
    assert inspection.bytes_after < inspection.bytes_before


# ---- files that are something else -----------------------------------------------------------------------------------


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    return err


class Code:
    """Restored only by running something."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is neither a checkpoint nor"),
        (b"GIF89a no network", "is neither a checkpoint nor"),
        (b"PK\x03\x04 cut", "is damaged"),
        (b"\x10\0\0\0\0\0\0\0{}", "is damaged"),
        (b'\x30\0\0\0\0\0\0\0{"__metadata__":{"inq_lightning":"', "is damaged"),
        (b'\x30\0\0\0\0\0\0\0{"__metadata__":{"inq_accelerator":"', "is damaged"),
        (b"\x08\x0a and more", "cannot be read as an ONNX file"),
    ],
)
def test_a_foreign_or_damaged_file_is_named(
    content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file.ckpt").write_bytes(content)
    error = refusal(capsys, tmp_path / "file.ckpt")
    assert error.startswith(f"inq-inspect: {tmp_path / 'file.ckpt'}")
    assert message in error


def test_a_file_of_no_known_format_is_told_what_could_be_opened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("no network")
    error = refusal(capsys, tmp_path / "notes.txt")
    assert all(f"{name}" in error for name in ("checkpoint", "state_dict", "packed", "onnx", *NUMBER_FORMATS))


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {}, "hyper_parameters": Code()}, tmp_path / "file.ckpt")
    assert "holds no weights" in refusal(capsys, tmp_path / "file.ckpt")
    torch.save({"state_dict": Code()}, tmp_path / "file.ckpt")
    assert "holds objects that only code could restore" in refusal(capsys, tmp_path / "file.ckpt")


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"state_dict": {}}])
def test_a_file_without_weights_is_refused(content: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(content, tmp_path / "file.ckpt")
    assert "not a checkpoint" in (error := refusal(capsys, tmp_path / "file.ckpt")) or "no weights" in error


def test_a_missing_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "none.ckpt" in refusal(capsys, tmp_path / "none.ckpt")


def test_weights_that_left_the_grid_are_an_error(files: Files, tmp_path: Path) -> None:
    checkpoint = torch.load(files.quantized, weights_only=True)
    checkpoint["state_dict"]["net.0.weight"][0, 0] += 0.01
    torch.save(checkpoint, tmp_path / "moved.ckpt")
    with pytest.raises(ValueError, match=r"net\.0\.weight: 1 weights that the saved state calls frozen"):
        inspect_file(tmp_path / "moved.ckpt")


def test_the_reference_of_another_network_is_an_error(files: Files, tmp_path: Path) -> None:
    torch.save({"net.0.weight": torch.zeros(3, 3)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"net\.0\.weight has the shape \(14, 8\), but \(3, 3\) in the reference"):
        inspect_file(files.quantized, tmp_path / "other.pt")
    torch.save({"net.9.weight": torch.zeros(3, 3)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"the reference has no net\.0\.weight"):
        inspect_file(files.quantized, tmp_path / "other.pt")


# ---- what is not quantized -------------------------------------------------------------------------------------------


class Partly(TinyModule):
    """A table and a parameter of the module's own beside what is quantized, and a buffer of two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(5, 8)
        self.own = nn.Parameter(torch.randn(8, 8))
        self.register_buffer("positions", torch.randn(3, 8))

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return super().loss(((x + self.embed(y) + self.positions[0]) @ self.own, y))


@pytest.fixture(scope="module")
def partly(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Partly, INQCallback]:
    path = tmp_path_factory.mktemp("partly") / "quantized.ckpt"
    module, callback = Partly(), INQCallback(schedule=SCHEDULE, exclude=["net.3"])
    run = trainer(callback)
    run.fit(module)
    run.save_checkpoint(path, weights_only=False)
    return path, module, callback


OUT = {"own": "own layer type", "net.3.weight": "excluded", "embed.weight": "embedding"}


def test_a_checkpoint_of_which_a_part_is_quantized_tells_what_is_not_and_why(
    partly: tuple[Path, Partly, INQCallback], capsys: pytest.CaptureFixture[str]
) -> None:
    inspection = inspect_file(partly[0])
    assert not inspection.fully_quantized
    assert inspection.left_out == OUT
    assert inspection.quantized_fraction == 112 / (112 + 56 + 40 + 64)
    main([str(partly[0])])
    shown = capsys.readouterr().out
    assert re.search(r"fully quantized +no", shown)
    for name, reason in OUT.items():
        assert re.search(rf"not quantized \({reason}\) +{re.escape(name)}", shown)
    main([str(partly[0]), "--json"])
    assert json.loads(capsys.readouterr().out)["left_out"] == OUT


@pytest.mark.parametrize("source", ["module", "state_dict"])
def test_an_artifact_of_which_a_part_is_quantized_tells_what_is_not(
    partly: tuple[Path, Partly, INQCallback], source: str, tmp_path: Path
) -> None:
    module, layers = partly[1], partly[2].layers
    saved = save_packed(module if source == "module" else module.state_dict(), tmp_path / "net", layers=layers)
    # A state_dict does not tell a buffer from a parameter.
    expected = {*OUT, *(["positions"] if source == "state_dict" else [])}
    assert set(saved.off_grid) == expected
    inspection = inspect_file(tmp_path / "net")
    assert not inspection.fully_quantized
    assert set(inspection.left_out) == expected


def test_a_checkpoint_of_an_older_release_is_judged_by_all_its_matrices(
    partly: tuple[Path, Partly, INQCallback], tmp_path: Path
) -> None:
    checkpoint = torch.load(partly[0], weights_only=True)
    for said in ({"quantized_fraction": 1.0, "fully_quantized": True}, None, [1], {"left_out": {"own": 3}}):
        checkpoint["inq"] = said
        torch.save(checkpoint, tmp_path / "older.ckpt")
        inspection = inspect_file(tmp_path / "older.ckpt")
        assert not inspection.fully_quantized
        assert inspection.left_out == dict.fromkeys([*OUT, "positions"], "")


def test_a_network_whose_own_weights_are_quantized_too_is_fully_quantized(tmp_path: Path) -> None:
    module, callback = Partly(), INQCallback(schedule=SCHEDULE, include=["*"])
    run = trainer(callback)
    run.fit(module)
    run.save_checkpoint(tmp_path / "whole.ckpt", weights_only=False)
    save_packed(module, tmp_path / "layers", layers=callback.layers)
    save_packed(module, tmp_path / "by itself")
    for name in ("whole.ckpt", "layers", "by itself"):
        inspection = inspect_file(tmp_path / name)
        assert inspection.fully_quantized
        assert inspection.left_out == {}


# ---- inq-inspect -----------------------------------------------------------------------------------------------------


def test_the_script_prints_an_aligned_table_into_a_pipe(files: Files, tmp_path: Path) -> None:
    printed = run_program("inq-inspect", files.quantized, cwd=tmp_path)
    lines = printed.splitlines()
    assert lines[0].split() == ["layer", "shape", "bits", "zeros", "n2", "shares", "n1", "before/B", "after/B"]
    assert {len(line) for line in lines[:3]} == {len(lines[0])}
    assert lines[1].split()[:3] == ["net.0.weight", "14×8", "5"]
    assert "fully quantized yes" in " ".join(printed.split())
    assert "\x1b" not in printed


def test_json_is_one_document_with_everything(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(files.partial), "--json", "--reference", str(files.original)])
    document = json.loads(capsys.readouterr().out)
    inspection = inspect_file(files.partial, files.original)
    assert document == json.loads(json.dumps(inspection.as_dict()))
    assert document["schedule"] == {"portions": [0.5, 0.75, 0.875, 1.0], "starts": [0, 1, 2, 3], "unit": "epoch"}
    assert document["layers"][1]["exponents"].keys() == {str(k) for k in inspection.layers[1].exponents}


def test_the_table_has_frozen_shares_and_noise_only_where_they_tell_something(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(files.quantized)])
    assert not {"frozen", "SNR/dB"} & set(capsys.readouterr().out.split())
    main([str(files.partial), "--reference", str(files.original)])
    shown = capsys.readouterr().out.split()
    assert {"frozen", "SNR/dB", "75.0%"} <= set(shown)
    assert "phase 2 of 4" in " ".join(shown)


def test_eight_bits_of_a_deep_network_can_be_read_in_80_columns(tmp_path: Path) -> None:
    name, layers, state = "net.layer4.1.conv2.weight", [], {}
    for i in range(2):
        weight = torch.randn(512, 512, 3, 3, generator=torch.Generator().manual_seed(i))
        grid = PowerOfTwoGrid(1, 8)
        state[f"{i}.{name}"] = grid.quantize(weight)
        layers.append(Layer(f"{i}.{name}", (512, 512, 3, 3), 8, grid, weight.numel()))
    save_packed(state, tmp_path / "net.safetensors", layers=layers)
    console = Console(width=80, file=StringIO())
    console.print(inspection_table(inspect_file(tmp_path / "net.safetensors")))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert all(len(line) <= 80 for line in lines)
    assert "".join(line.split()[0] for line in lines[1:3]) == f"0.{name}"  # folded once
    assert lines[1].split()[1:4] == ["512×512×3×3", "8", "0.0%"]
    assert lines[1].split()[-2:] == ["9,437,184", "2,359,296"]
    assert re.search(r" -62 …[ ▁▂▃▄▅▆▇█]{11} +1 ", lines[1])


def test_the_table_tells_levels_where_they_are_not_the_papers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layers, net = [], nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    for name, family in (("0", "dense"), ("1", "paper"), ("2", Levels(False, (0, 3)))):
        grid = PowerOfTwoGrid(0, 2, family=family)
        with torch.no_grad():
            net[int(name)].weight.copy_(grid.quantize(net[int(name)].weight))
        layers.append(Layer(f"{name}.weight", (4, 4), 2, grid, 16))
    save_packed(net, tmp_path / "net.safetensors", layers=layers)
    main([str(tmp_path / "net.safetensors")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["layer", "shape", "bits", "levels"]
    for line, levels in zip(lines[1:4], ("dense", "paper", "±1, ±8"), strict=True):
        assert f" {levels} " in line


def test_the_plot_is_written_whole(files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    main([str(files.partial), "--json", "--plot", str(tmp_path / "out.png")])
    assert json.loads(capsys.readouterr().out)["kind"] == "checkpoint"
    assert (tmp_path / "out.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


def test_a_plot_of_nothing_or_of_an_unknown_format_is_refused(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    assert "no layer is quantized" in refusal(capsys, files.original, "--plot", tmp_path / "out.png")
    assert "'xyz' is not supported" in refusal(capsys, files.quantized, "--plot", tmp_path / "out.xyz")
    assert list(tmp_path.iterdir()) == []
