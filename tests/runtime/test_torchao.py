from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from accelerators import grids_and_dtypes, on_grid, quantize
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support import record, same_bits
from torch import Tensor, nn
from torchao.prototype.mx_formats.mx_tensor import MXTensor

from inq_lightning import PowerOfTwoGrid, to_torchao


@given(grids_and_dtypes(), st.integers(1, 8), st.integers(1, 3), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_torchao_gives_every_grid_back_bit_for_bit_or_refuses(
    drawn: tuple[str, PowerOfTwoGrid, torch.dtype], rows: int, blocks: int, seed: int
) -> None:
    target, grid, dtype = drawn
    model = nn.Linear(32 * blocks, rows, dtype=dtype)
    model.weight.data = on_grid((rows, 32 * blocks), grid, seed, dtype)
    layers = [record("weight", grid.bits, grid.n1)]
    # Where torchao's arithmetic has less range than the format: scales in float16 cannot be below 2^-24.
    narrow = target.startswith("mx") and dtype is torch.float16 and grid.n1 is not None
    if narrow and grid.n1 - {"mxfp4": 2, "mxfp6": 4}[target] < -24:
        with pytest.raises(ValueError, match="does not come back bit for bit"):
            to_torchao(model, target, layers=layers)  # type: ignore[arg-type]
        return
    assume(not (target == "int8" and dtype is torch.float64))  # refused, see below
    weight = to_torchao(model, target, layers=layers).weight  # type: ignore[arg-type]
    assert type(weight).__name__ in ("MXTensor", "Float8Tensor", "IntxUnpackedToInt8Tensor")
    assert weight.dtype is dtype
    assert same_bits(weight.dequantize(), model.weight)  # type: ignore[operator]


class Everything(nn.Module):
    """Convolutions in all styles, attention, a tied embedding, a linear layer; (batch, 3, 8, 8) to (batch, 64, 40)."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding="same"),
            nn.Conv2d(16, 16, 3, padding=1, groups=16, padding_mode="circular"),
            nn.ConvTranspose2d(16, 32, 1),
            nn.Conv2d(32, 64, 3, padding=2, dilation=2, bias=False),
        )
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.embedding = nn.Embedding(40, 64)
        self.linear = nn.Linear(64, 40, bias=False)
        self.linear.weight = self.embedding.weight
        self.last = nn.Linear(40, 40)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.convolutions(images).flatten(2).mT + self.embedding(torch.arange(64) % 40)
        return self.last(self.linear(self.attention(tokens, tokens, tokens)[0]))


@torch.no_grad()
def test_int8_networks_run_in_torchao_with_identical_outputs() -> None:
    torch.manual_seed(0)
    model = quantize(Everything(), 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    converted = to_torchao(model, "int8")
    names = {n for n, p in converted.named_parameters() if type(p).__name__ == "IntxUnpackedToInt8Tensor"}
    assert names == {*(f"convolutions.{i}.weight" for i in (0, 1, 3)), "last.weight"}
    assert converted.linear.weight is converted.embedding.weight  # type: ignore[union-attr]
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(converted(images), model(images))
    assert all(same_bits(value, before[name]) for name, value in model.state_dict().items())


@torch.no_grad()
def test_fp8_linear_layers_run_in_torchao_with_float_activations() -> None:
    torch.manual_seed(0)
    model = quantize(nn.Sequential(nn.Linear(70, 50, bias=False), nn.ReLU(), nn.Linear(50, 30)), 5)
    converted, x = to_torchao(model, "fp8"), torch.randn(4, 9, 70)
    assert torch.equal(converted[0](x), model[0](x))  # type: ignore[index]
    torch.testing.assert_close(converted(x), model(x), rtol=1e-6, atol=1e-6)  # the bias is added apart


@pytest.mark.parametrize("target", ["mxfp4", "mxfp6"])
@torch.no_grad()
def test_mx_linear_layers_run_in_torchao_as_the_float_network_on_mx_activations(target: Any) -> None:
    torch.manual_seed(0)
    model = quantize(nn.Linear(96, 20), 4)
    converted, x = to_torchao(model, target), torch.randn(7, 96)
    element = torch.float4_e2m1fn_x2 if target == "mxfp4" else "fp6_e3m2"
    assert torch.equal(converted(x), model(MXTensor.to_mx(x, element).dequantize()))


def test_shapes_that_torchao_cannot_hold_are_refused_or_left_out() -> None:
    model = quantize(nn.Sequential(nn.Linear(40, 32), nn.Linear(32, 8)), 4)
    with pytest.raises(ValueError, match=r"0\.weight has 40 columns, which torchao's MXTensor takes only"):
        to_torchao(model, "mxfp4")
    n1 = math.frexp(float(model[1].weight.detach().abs().max()))[1] - 1
    converted = to_torchao(model, "mxfp4", layers=[record("1.weight", 4, n1)])
    assert isinstance(converted[1].weight, MXTensor)  # type: ignore[index]
    assert type(converted[0].weight) is nn.Parameter  # type: ignore[index]


def test_a_network_that_torchao_has_nothing_for_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to convert: torchao multiplies fp8 weights of Linear layers only"):
        to_torchao(quantize(nn.Conv2d(3, 8, 3), 4), "fp8")


def test_what_the_subclass_cannot_compute_exactly_is_refused() -> None:
    model = nn.Linear(32, 32, dtype=torch.float16)
    model.weight.data = PowerOfTwoGrid(-24, 2).quantize(torch.full((32, 32), 2.0**-24, dtype=torch.float16))
    with pytest.raises(ValueError, match="weight does not come back bit for bit from mxfp4"):
        to_torchao(model, "mxfp4")
    with pytest.raises(ValueError, match=r"weight is float64, .* use \.float\(\)"):
        to_torchao(quantize(nn.Linear(4, 4, dtype=torch.float64), 4), "int8")
