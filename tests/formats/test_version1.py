"""Files that were written before they stored the specs of grids, see tests/data/version1/README.md."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import TESTS, TinyModule, same_bits
from torch import Tensor, nn

from inq_lightning import INQCallback, Schedule, inspect_file, load_packed, read_accelerator, read_onnx, read_packed
from inq_lightning.cli.export import main as export

FILES = TESTS / "data" / "version1"
BITS = range(2, 9)
SCHEDULES = {
    "magnitude": Schedule([0.5, 0.75, 0.875, 1.0], [0, 1, 2, 3]),
    "random": Schedule([0.5, 0.75, 0.875, 1.0], [0, 1, 2, 3]),
    "mse": Schedule([0.5, 0.75, 0.875, 1.0], [0, 1, 2, 3]),
    "pruned": Schedule([0.5, 0.75, 0.875, 1.0], [0, 4, 8, 12], "step"),
}
WIDTHS = {"magnitude": [5, 5], "random": [4, 4], "mse": [8, 3], "pruned": [5, 5]}


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)
    )


@pytest.fixture(scope="module")
def expected() -> dict[int, dict[str, Tensor]]:
    """The network's state_dict by the bits of its file."""
    weights = load_file(FILES / "weights.safetensors")
    return {b: {n.split(".", 1)[1]: x for n, x in weights.items() if n.startswith(f"{b}.")} for b in BITS}


def assert_same(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        floating = value.is_floating_point()
        assert same_bits(state[name], value) if floating else torch.equal(state[name], value), name


@pytest.mark.parametrize("kind", ["packed", "entropy"])
@pytest.mark.parametrize("bits", BITS)
def test_artifacts_load_bit_for_bit(bits: int, kind: str, expected: dict[int, dict[str, Tensor]]) -> None:
    path = FILES / f"{kind}{bits}.safetensors"
    contents = read_packed(path)
    assert_same(contents.state_dict, expected[bits])
    assert_same(load_packed(path, network()).state_dict(), expected[bits])
    assert contents.layers is not None
    assert max(layer.bits for layer in contents.layers) == min(bits, 6)  # as few as hold the weights
    assert [layer.grid is not None and layer.n1 is None for layer in contents.layers] == [False, False, bits == 3]
    assert inspect_file(path).fully_quantized


def test_the_artifact_of_a_run_has_its_schedule() -> None:
    contents = read_packed(FILES / "run.safetensors")
    weights = torch.load(FILES / "magnitude.ckpt", weights_only=True)["state_dict"]
    for name in ("net.0.weight", "net.3.weight"):
        assert same_bits(contents.state_dict[name], weights[name])
    assert contents.state_dict["net.0.bias"].dtype is torch.float32
    assert torch.equal(contents.state_dict["net.0.bias"], weights["net.0.bias"].half().float())
    assert contents.schedule == SCHEDULES["magnitude"]


@pytest.mark.parametrize("name", [*(f"net{bits}" for bits in BITS), *(f"fast{bits}" for bits in range(2, 6))])
def test_onnx_files_give_their_weights_bit_for_bit(name: str, expected: dict[int, dict[str, Tensor]]) -> None:
    contents = read_onnx(FILES / f"{name}.onnx")
    assert contents.layers is not None
    assert [layer.name for layer in contents.layers] == ["0.weight", "4.weight", "6.weight"]
    for layer in contents.layers:
        assert same_bits(contents.state_dict[layer.name], expected[int(name[-1])][layer.name])
    assert inspect_file(FILES / f"{name}.onnx").fully_quantized


@pytest.mark.parametrize("path", sorted(FILES.glob("*-?.safetensors")), ids=lambda path: path.stem)
def test_files_for_accelerators_give_their_weights_bit_for_bit(
    path: Path, expected: dict[int, dict[str, Tensor]]
) -> None:
    kind, bits = path.stem.split("-")
    assert_same(read_accelerator(path), expected[int(bits)])
    inspection = inspect_file(path)
    assert (inspection.kind, inspection.fully_quantized) == (kind, True)


@pytest.mark.parametrize("run", list(SCHEDULES))
def test_checkpoints_of_a_finished_run_are_inspected_and_exported(run: str, tmp_path: Path) -> None:
    path = FILES / f"{run}.ckpt"
    weights = torch.load(path, weights_only=True)["state_dict"]
    inspection = inspect_file(path)
    assert inspection.fully_quantized
    assert (inspection.schedule, inspection.phase) == (SCHEDULES[run], 4)
    assert [layer.bits for layer in inspection.layers] == WIDTHS[run]
    export([str(path), str(tmp_path / "net.safetensors")])
    assert_same(read_packed(tmp_path / "net.safetensors").state_dict, weights)
    assert inspect_file(tmp_path / "net.safetensors", path).schedule == SCHEDULES[run]


@pytest.mark.parametrize("run", list(SCHEDULES))
def test_checkpoints_of_an_interrupted_run_are_inspected_and_exported(run: str, tmp_path: Path) -> None:
    path = FILES / f"{run}-step6.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    inspection = inspect_file(path)
    states = checkpoint["callbacks"][INQCallback.__name__]["layers"]
    assert [(x.name, x.frozen, x.bits) for x in inspection.layers] == [
        (name, state["frozen"], state["bits"]) for name, state in states.items()
    ]
    assert (inspection.phase, inspection.fully_quantized) == (2, False)
    with pytest.raises(SystemExit):
        export([str(path), str(tmp_path / "net.safetensors")])
    export([str(path), str(tmp_path / "net.safetensors"), "--allow-partial"])
    assert_same(read_packed(tmp_path / "net.safetensors").state_dict, checkpoint["state_dict"])
    TinyModule().load_state_dict(checkpoint["state_dict"])
