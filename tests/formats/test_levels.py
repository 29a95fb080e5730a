"""Networks on other levels than the paper's: what each format makes of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from support import same_bits
from torch import nn

from inq_lightning import (
    Levels,
    PowerOfTwoGrid,
    export_onnx,
    inspect_file,
    load_packed,
    read_onnx,
    save_accelerator,
    save_packed,
    to_packed,
)
from inq_lightning.core.layer import Layer
from inq_lightning.formats.accelerator import NUMBER_FORMATS
from inq_lightning.grid.levels import levels_of

LEVELS = [("dense", 2), ("dense", 3), ("dense", 4), ("dense", 5), ("full", 3), ("full", 4), ("full", 5)]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 3)
    ).eval()


def quantized(levels: str, bits: int) -> tuple[nn.Sequential, list[Layer]]:
    net, layers = network(), []
    for name in ("0.weight", "4.weight", "6.weight"):
        w = net.get_parameter(name)
        grid = PowerOfTwoGrid.from_weights(w.detach(), bits, exponent="mse", family=levels)  # type: ignore[arg-type]
        w.data.copy_(grid.quantize(w))
        layers.append(Layer(name, tuple(w.shape), bits, grid, w.numel()))
    return net, layers


@pytest.mark.parametrize("entropy_coded", [False, True])
@pytest.mark.parametrize(("levels", "bits"), LEVELS)
def test_an_artifact_gives_every_weight_back(levels: str, bits: int, entropy_coded: bool, tmp_path: Path) -> None:
    net, layers = quantized(levels, bits)
    path = tmp_path / "net.safetensors"
    save_packed(net, path, layers=layers, entropy_coded=entropy_coded)
    again = load_packed(path, network())
    assert all(
        same_bits(a.float(), b.float())
        for a, b in zip(net.state_dict().values(), again.state_dict().values(), strict=True)
    )
    inspection = inspect_file(path)
    assert inspection.fully_quantized
    assert [layer.bits for layer in inspection.layers] == [bits] * 3
    assert levels == "full" or all(layer.zeros == 0 for layer in inspection.layers)


@pytest.mark.parametrize(("levels", "bits"), LEVELS)
def test_an_onnx_file_computes_the_same_and_gives_every_weight_back(levels: str, bits: int, tmp_path: Path) -> None:
    net, layers = quantized(levels, bits)
    path = tmp_path / "net.onnx"
    assert export_onnx(net, path, torch.randn(2, 1, 4, 4), layers=layers) < 1e-5
    contents = read_onnx(path)
    for layer in layers:
        assert torch.equal(contents.state_dict[layer.name], net.get_parameter(layer.name))
    types = {tensor.name: tensor.data_type for tensor in onnx.load(path).graph.initializer}
    stored = {onnx.TensorProto.DataType.Name(types[f"{layer.name}.codes"]) for layer in layers}
    assert stored <= {2: {"UINT2"}, 3: {"UINT4", "INT4"}, 4: {"UINT4"}, 5: {"FLOAT8E4M3FN"}}[bits]


@pytest.mark.parametrize(("levels", "bits"), LEVELS)
def test_an_onnx_file_with_int8_activations_multiplies_the_multiples(levels: str, bits: int, tmp_path: Path) -> None:
    net, layers = quantized(levels, bits)
    path, x = tmp_path / "net.onnx", torch.randn(64, 1, 4, 4)
    assert export_onnx(net, path, x, layers=layers, activations="int8") < 0.05
    contents = read_onnx(path)
    for layer in layers:
        assert torch.equal(contents.state_dict[layer.name], net.get_parameter(layer.name))
    small = levels_of(levels, bits).exponents[-1] <= 7  # type: ignore[arg-type]
    assert any(node.op_type == "MatMulNBits" for node in onnx.load(path).graph.node) == small


@pytest.mark.parametrize("target", ["mxfp4", "mxfp6", "fp8", "int8"])
@pytest.mark.parametrize(("levels", "bits"), LEVELS)
def test_an_accelerator_file_is_exact_or_is_refused(levels: str, bits: int, target: str, tmp_path: Path) -> None:
    net, layers = quantized(levels, bits)
    path = tmp_path / "net.safetensors"
    powers = {"mxfp4": 4, "mxfp6": 9, "fp8": 18, "int8": 7}[target]  # of two that an element can be
    if bits <= NUMBER_FORMATS[target].max_bits and levels_of(levels, bits).exponents[-1] < powers:  # type: ignore[arg-type]
        save_accelerator(net, path, target, layers=layers)  # type: ignore[arg-type]
        assert inspect_file(path).fully_quantized
        return
    with pytest.raises(ValueError, match=r"bit for bit|at most"):
        save_accelerator(net, path, target, layers=layers)  # type: ignore[arg-type]
    assert not path.exists()


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize(("levels", "bits"), LEVELS)
def test_packed_modules_decode_them_bit_for_bit(levels: str, bits: int, activations: str) -> None:
    net, layers = quantized(levels, bits)
    packed = to_packed(net, layers=layers, activations=activations)  # type: ignore[arg-type]
    again = to_packed(quantized("paper", 5)[0], allow_partial=True)
    again.load_state_dict(packed.state_dict())
    for one in (packed, again):
        for name in ("0", "4", "6"):
            assert same_bits(one.get_submodule(name).weight, net.get_submodule(name).weight)  # type: ignore[arg-type]


def test_packed_modules_refuse_levels_without_a_name() -> None:
    net, layers = quantized("paper", 3)
    grid = PowerOfTwoGrid(0, 2, family=Levels(False, (0, 3)))
    with torch.no_grad():
        net[0].weight.copy_(grid.quantize(net[0].weight))
    layers = [replace(one, grid=grid, bits=2) if one.name == "0.weight" else one for one in layers]
    with pytest.raises(ValueError, match=r"0\.weight has levels of your own"):
        to_packed(net, layers=layers)


def test_packed_state_of_before_there_were_levels_loads() -> None:
    net, layers = quantized("paper", 3)
    packed = to_packed(net, layers=layers)
    state = {k: v[:3] if k.endswith("grid") else v for k, v in packed.state_dict().items()}
    packed.load_state_dict(state)
    assert same_bits(packed[0].weight, net[0].weight)  # type: ignore[index]
