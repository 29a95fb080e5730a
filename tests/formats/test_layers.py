from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import record
from torch import nn

from inq_lightning import (
    PowerOfTwoGrid,
    export_onnx,
    read_accelerator,
    read_packed,
    save_accelerator,
    save_packed,
    to_packed,
    to_torchao,
)
from inq_lightning.formats.layers import candidate_grids, find_grids, off_grid
from inq_lightning.grid import fit_grid
from inq_lightning.grid.levels import levels_of
from inq_lightning.grid.recognize import holds


def on_grid(*shape: int, bits: int = 5) -> torch.Tensor:
    weight = torch.randn(shape)
    return PowerOfTwoGrid.from_weights(weight, bits).quantize(weight)


def quantized(net: nn.Module) -> nn.Module:
    for p in net.parameters():
        p.data = on_grid(*p.shape)
    return net


@given(
    st.integers(-14, 15), st.integers(2, 8), st.sampled_from([torch.float16, torch.float32, torch.float64]), st.data()
)
def test_the_fitted_grid_holds_the_weights_in_fewest_bits(
    n1: int, bits: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    grid = PowerOfTwoGrid(max(n1, -24 + (1 << bits - 2) - 1), bits)
    largest = min(grid.magnitudes, 15 + grid.magnitudes - (grid.n1 or 0))
    codes = data.draw(st.lists(st.integers(-largest, largest), min_size=1, max_size=20))
    weight = grid.decode(torch.tensor(codes), torch.float64).to(dtype)
    weight = weight[weight.isfinite()]
    fitted = fit_grid(weight)
    exponents = torch.frexp(weight[weight != 0]).exponent - 1
    if fitted is None:
        assert dtype is torch.float16  # which holds 40 powers of two, fewer than the 63 magnitudes of 7 bits
        assert int(exponents.max() - exponents.min()) + 1 > 32
        return
    assert holds(fitted, weight)
    fitted.check_dtype(dtype)
    for fewer in range(2, fitted.bits):
        for family in ("paper", "full", "dense"):
            span = levels_of(family, fewer).exponents[-1]  # type: ignore[arg-type]
            for top in range(int(exponents.max()), int(exponents.min()) + span + 1):
                other = PowerOfTwoGrid(top, fewer, family=family)  # type: ignore[arg-type]
                assert not torch.equal(other.round(weight.double()), weight.double()) or not fits(other, dtype)
    if fitted.family != "paper":
        span = PowerOfTwoGrid(0, fitted.bits).magnitudes
        assert int(exponents.max() - exponents.min()) >= span


def fits(grid: PowerOfTwoGrid, dtype: torch.dtype) -> bool:
    try:
        grid.check_dtype(dtype)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(
    ("values", "bits", "family"),
    [
        ([1.0, -4.0], 2, "dense"),
        ([1.0, 4.0, -8.0, 16.0], 3, "dense"),
        ([0.0, 1.0, 4.0], 3, "full"),
        ([1.0, -2.0], 3, "paper"),
        ([0.0, 1.0, 64.0], 4, "full"),
        ([2.0**-7, 1.0], 4, "dense"),
        ([0.0, 2.0**-7, 1.0], 5, "paper"),
    ],
)
def test_bare_weights_tell_which_named_levels_they_lie_on(values: list[float], bits: int, family: str) -> None:
    grid = fit_grid(torch.tensor(values))
    assert grid is not None
    assert (grid.bits, grid.family) == (bits, family)


def test_weights_off_every_grid_have_none() -> None:
    for values in ([0.75], [1.0, float("inf")], [float("nan")], [2.0**-40, 2.0**40], [2.0**-1060]):
        assert fit_grid(torch.tensor(values, dtype=torch.float64)) is None
    assert fit_grid(torch.zeros(3)) == PowerOfTwoGrid(None, 2)
    assert fit_grid(torch.empty(0)) == PowerOfTwoGrid(None, 2)


def test_the_smallest_half_precision_weights_get_a_grid_that_half_precision_holds() -> None:
    weight = torch.tensor([2.0**-24, 2.0**-20], dtype=torch.float16)
    grid = fit_grid(weight)
    assert grid is not None
    assert torch.equal(grid.decode(grid.encode(weight), torch.float16), weight)


def test_a_network_off_the_grid_is_refused_by_the_names_of_its_layers() -> None:
    net = nn.Sequential(quantized(nn.Linear(4, 4)), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"1\.weight is not on a grid"):
        find_grids(net)
    assert list(find_grids(net, allow_partial=True)) == ["0.weight"]
    assert candidate_grids(net)["1.weight"] is None
    with pytest.raises(ValueError, match=r"names 7\.weight, which the module lacks"):
        find_grids(net, [record("7.weight", 5, 0)])


def test_frozen_parameters_count_and_stay_frozen() -> None:
    net = quantized(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    net[0].weight.requires_grad_(False)
    assert list(find_grids(net)) == ["0.weight", "1.weight"]
    assert not net[0].weight.requires_grad
    assert net[1].weight.requires_grad


class Shifted(nn.Module):
    """Something that is no weight of ours: an integer parameter, which can require no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor([1, -2, 3, 0], dtype=torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.shift.to(x.dtype)


EXPORTS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "save_packed": save_packed,
    "save_accelerator": lambda net, path: save_accelerator(net, path, "fp8"),
    "export_onnx": lambda net, path: export_onnx(net, path, torch.randn(2, 4)),
    "to_packed": lambda net, path: to_packed(net),
    "to_torchao": lambda net, path: to_torchao(net, "fp8"),
}


@pytest.mark.parametrize("export", list(EXPORTS))
def test_exports_take_integer_parameters_and_leave_the_network_as_it_was(export: str, tmp_path: Path) -> None:
    net = nn.Sequential(quantized(nn.Linear(4, 4)), Shifted(), quantized(nn.Linear(4, 4)))
    net[0].requires_grad_(False)
    before = {name: (p, p.requires_grad, p.clone()) for name, p in net.named_parameters()}
    made = EXPORTS[export](net, tmp_path / "net")
    for name, parameter in net.named_parameters():
        same, required, value = before[name]
        assert parameter is same
        assert parameter.requires_grad is required, name
        assert torch.equal(parameter, value)
    if isinstance(made, nn.Module):
        assert torch.equal(made[1].shift, net[1].shift)  # type: ignore[index, union-attr]
    if export == "save_packed":
        assert torch.equal(read_packed(tmp_path / "net").state_dict["1.shift"], net[1].shift)
    if export == "save_accelerator":
        assert torch.equal(read_accelerator(tmp_path / "net")["1.shift"], net[1].shift)


def test_an_integer_weight_of_a_layer_is_not_ours() -> None:
    net = nn.Sequential(quantized(nn.Linear(4, 4)), nn.Linear(4, 4))
    net[1].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    assert list(find_grids(net)) == ["0.weight"]


def test_a_state_dict_has_the_grids_of_its_network() -> None:
    net = quantized(nn.ModuleList([nn.LSTM(4, 4), nn.MultiheadAttention(8, 2), nn.Conv2d(2, 3, 3), nn.LayerNorm(4)]))
    assert candidate_grids(net.state_dict()) == candidate_grids(net) == find_grids(net)
    embedding = nn.Sequential(nn.Embedding(4, 4), quantized(nn.Linear(4, 4)))
    assert list(find_grids(embedding)) == ["1.weight"]
    assert candidate_grids(embedding.state_dict())["0.weight"] is None


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 4))
        self.head = nn.Linear(4, 4)


def test_parameters_of_layers_of_ones_own_count_where_they_are_on_a_grid() -> None:
    net = Own()
    net.head = quantized(net.head)
    assert list(find_grids(net)) == ["head.weight"]
    assert off_grid(net, find_grids(net)) == ["matrix"]
    net.matrix.data = torch.full((4, 4), 0.5)
    assert list(find_grids(net)) == ["matrix", "head.weight"]
    assert off_grid(net, find_grids(net)) == []


def test_a_network_without_a_matrix_on_a_grid_is_refused() -> None:
    net = Own()
    del net.head
    with pytest.raises(ValueError, match="no matrix of weights that is on a grid"):
        find_grids(net)
    with pytest.raises(ValueError, match="no matrix of weights that is on a grid"):
        find_grids(nn.Sequential(nn.BatchNorm1d(4)))


def test_computed_weights_that_were_left_out_are_told_and_do_not_stand_in_the_way() -> None:
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), quantized(nn.Linear(4, 4)))
    grids = find_grids(net)
    assert list(grids) == ["1.weight"]
    assert off_grid(net, grids) == [f"0.parametrizations.weight.original{i}" for i in (0, 1)]


def test_a_tied_weight_is_on_its_grid_under_each_of_its_names() -> None:
    net = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4, bias=False))
    net[1] = quantized(net[1])
    net[0].weight = net[1].weight
    assert off_grid(net, find_grids(net)) == []
    state = net.state_dict()
    assert off_grid(state, {"1.weight": find_grids(net)["0.weight"]}) == []


def test_weights_of_a_type_without_grids_are_no_candidates_or_refused_by_name() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    net[0].weight.data = on_grid(2, 2)
    net.register_parameter("scales", nn.Parameter(torch.ones(2, 2).to(torch.float8_e4m3fn), requires_grad=False))
    assert list(find_grids(net)) == ["0.weight"]
    net[0].weight = nn.Parameter(net[0].weight.detach().to(torch.float8_e5m2), requires_grad=False)
    with pytest.raises(ValueError, match=r"not fully quantized: 0\.weight is not on a grid"):
        find_grids(net)


def test_an_accelerator_file_of_a_module_that_renames_its_keys_has_its_weights_in_the_format(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(32, 2))
    net[0].weight.data = on_grid(2, 32, bits=4)
    net.register_state_dict_post_hook(lambda module, state, prefix, _: state.update(new=state.pop("0.weight")))
    save_accelerator(net, tmp_path / "network.safetensors", "fp8")
    assert torch.equal(read_accelerator(tmp_path / "network.safetensors")["new"], net[0].weight)
    assert (tmp_path / "network.safetensors").read_bytes().find(b'"dtype":"F8_E4M3"') > 0
