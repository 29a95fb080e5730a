from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerators import grids_and_dtypes, on_grid, quantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support import SCHEDULE, TinyModule, assert_same_state, record, same_bits, trainer
from torch import Tensor, nn

from inq_lightning import INQCallback, PowerOfTwoGrid
from inq_lightning.formats import accelerator
from inq_lightning.formats.accelerator import NUMBER_FORMATS, read_accelerator, save_accelerator
from inq_lightning.runtime.torchao import to_torchao

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E3M2 = [k / 16 for k in (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28)]
E3M2 += [2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0, 8.0, 10.0, 12.0, 14.0, 16.0, 20.0, 24.0, 28.0]


class Bare(nn.Module):
    """One parameter of any shape, and something that stays as it is."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.tensor([0.1, -0.0, 3.0]))
        self.register_buffer("steps", torch.tensor(7))


def numpy_decode(path: Path, name: str, shape: tuple[int, ...], target: str) -> np.ndarray[Any, Any]:
    """Decode one weight with nothing but the bytes of the file and the tables of the OCP specification."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])

    def part(key: str, dtype: str) -> np.ndarray[Any, Any]:
        begin, end = header[key]["data_offsets"]
        return np.frombuffer(raw[start + begin : start + end], dtype).reshape(header[key]["shape"])

    if target in ("int8", "fp8"):
        assert header[name]["dtype"] == {"int8": "I8", "fp8": "F8_E4M3"}[target]
        assert header[name]["shape"] == list(shape)
        elements = part(name, "i1").astype(np.float64)
        if target == "fp8":
            byte = part(name, "u1").astype(np.int64)
            field, mantissa = byte >> 3 & 15, byte & 7
            elements = np.where(field > 0, 8 + mantissa, mantissa) * 2.0 ** (np.maximum(field, 1) - 10)
            elements = np.where(byte > 127, -elements, elements)
        (scale,) = part(f"{name}_scale", "<f4")
        return elements * np.float64(scale)
    width, values = (4, E2M1) if target == "mxfp4" else (6, E3M2)
    packed, scale = part(f"{name}_packed", "u1"), part(f"{name}_scale", "u1").astype(np.float64)
    bits = np.unpackbits(packed, axis=-1, bitorder="little").reshape(*packed.shape[:-1], -1, width)
    index = bits @ (1 << np.arange(width))
    elements = np.array(values + [-v for v in values])[index]
    blocks = elements.reshape(*packed.shape[:-1], -1, 32) * (2.0 ** (scale - 127))[..., None]
    rows = blocks.reshape(*packed.shape[:-1], -1)
    columns = math.prod(shape[1:] if len(shape) > 1 else shape)
    assert not rows[..., columns:].any()
    assert packed.shape[-1] == -(-columns // 32) * 4 * width
    return rows[..., :columns].reshape(shape)


@given(grids_and_dtypes(), st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(0, 99))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_files_hold_every_grid_bit_for_bit(
    tmp_path: Path, drawn: tuple[str, PowerOfTwoGrid, torch.dtype], shape: list[int], seed: int
) -> None:
    target, grid, dtype = drawn
    size = tuple(n if i == 0 or len(shape) < 3 else n % 5 + 1 for i, n in enumerate(shape))
    model, path = Bare(on_grid(size, grid, seed, dtype)), tmp_path / "out.safetensors"
    save_accelerator(model, path, target, layers=[record("weight", grid.bits, grid.n1)])  # type: ignore[arg-type]
    expected = model.weight.detach().double().numpy()
    assert np.array_equal(numpy_decode(path, "weight", size, target), expected)
    state = read_accelerator(path)
    assert state.keys() == model.state_dict().keys()
    assert all(same_bits(state[name], value) for name, value in model.named_parameters())
    assert torch.equal(state["steps"], model.steps)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("target", sorted(NUMBER_FORMATS))
def test_every_format_holds_as_many_powers_of_two_as_its_bits_need_and_no_more(target: str) -> None:
    every_byte = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).tolist()
    elements = {"mxfp4": E2M1, "mxfp6": E3M2, "fp8": every_byte, "int8": range(128)}[target]
    powers = {x for x in elements if x > 0 and math.frexp(x)[0] == 0.5}
    assert 1 << NUMBER_FORMATS[target].max_bits - 2 <= len(powers) < 1 << NUMBER_FORMATS[target].max_bits - 1


@pytest.mark.parametrize("target", sorted(NUMBER_FORMATS))
def test_extreme_exponents_fit_up_to_the_scales_range_and_are_refused_beyond(target: str, tmp_path: Path) -> None:
    magnitudes = 1 << NUMBER_FORMATS[target].max_bits - 2
    top = {"mxfp4": 2, "mxfp6": 4, "fp8": 8, "int8": magnitudes - 1}[target]
    lowest = (-127 if target.startswith("mx") else -126) + top
    path = tmp_path / "out.safetensors"
    for n1, fits in ((127 + top, True), (128 + top, False), (lowest, True), (lowest - 1, False)):
        grid = PowerOfTwoGrid(n1, NUMBER_FORMATS[target].max_bits)
        weight = grid.levels[grid.levels.abs() >= 2.0**n1 / magnitudes]
        model, layers = Bare(weight), [record("weight", grid.bits, n1)]
        if fits:
            save_accelerator(model, path, target, layers=layers)  # type: ignore[arg-type]
            assert same_bits(read_accelerator(path)["weight"], model.weight)
        else:
            with pytest.raises(ValueError, match=rf"weight goes up to 2\^{n1}, so its scale .* outside the range"):
                save_accelerator(model, path, target, layers=layers)  # type: ignore[arg-type]


@pytest.mark.parametrize("target", sorted(NUMBER_FORMATS))
def test_a_trained_network_comes_back_whole_and_predicts_the_same(target: str, tmp_path: Path) -> None:
    module, callback = TinyModule(), INQCallback(bits=4, levels="paper", schedule=SCHEDULE)
    trainer(callback).fit(module)
    path = tmp_path / "out.safetensors"
    save_accelerator(module, path, target, layers=callback.layers)  # type: ignore[arg-type]
    again = TinyModule(seed=1)
    again.load_state_dict(read_accelerator(path))
    assert_same_state(again, module)


def test_tied_and_compiled_weights_are_stored_once_under_their_own_names(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False))
    model[1].weight = model[0].weight
    quantize(model, 3)
    path = tmp_path / "out.safetensors"
    save_accelerator(torch.compile(model), path, "mxfp4")  # type: ignore[arg-type]
    assert load_file(path).keys() == {"0.weight_packed", "0.weight_scale"}
    state = read_accelerator(path)
    assert state.keys() == model.state_dict().keys()
    model[0].weight.data.zero_()
    model.load_state_dict(state)
    assert same_bits(model[1].weight, state["0.weight"])


def test_the_documented_layout_is_what_the_file_has(tmp_path: Path) -> None:
    row = torch.tensor([0.5, -1.0, 2.0, -4.0] + [0.0] * 29)  # 33 weights: two blocks
    path = tmp_path / "out.safetensors"
    save_accelerator(Bare(torch.stack([row, -row])), path, "mxfp4", layers=[record("weight", 4, 2)])
    tensors = load_file(path)
    assert tensors["weight_packed"].shape == (2, 32)
    assert tensors["weight_packed"][0, :3].tolist() == [0b1010_0001, 0b1110_0100, 0]
    assert tensors["weight_scale"].tolist() == [[127, 127], [127, 127]]
    save_accelerator(Bare(row), path, "mxfp6", layers=[record("weight", 5, 4)])
    tensors = load_file(path)
    assert tensors["weight_packed"].shape == (48,)
    e3m2 = [0b001000, 0b101100, 0b010000, 0b110100]  # sign, three exponent bits of bias 3, two mantissa bits
    stream = sum(e << 6 * i for i, e in enumerate(e3m2))
    assert tensors["weight_packed"][:4].tolist() == [*stream.to_bytes(3, "little"), 0]
    assert tensors["weight_scale"].tolist() == [127, 127]
    save_accelerator(Bare(row), path, "int8", layers=[record("weight", 4, 2)])
    tensors = load_file(path)
    assert tensors["weight"][:5].tolist() == [1, -2, 4, -8, 0]
    assert tensors["weight_scale"].tolist() == [0.5]


@pytest.mark.parametrize("target", sorted(NUMBER_FORMATS))
def test_negative_zero_becomes_zero(target: Any, tmp_path: Path) -> None:
    save_accelerator(Bare(torch.tensor([-0.0, 1.0, -1.0])), tmp_path / "out", target, layers=[record("weight", 2, 0)])
    assert same_bits(read_accelerator(tmp_path / "out")["weight"], torch.tensor([0.0, 1.0, -1.0]))


def test_bits_a_weight_are_those_of_the_table(tmp_path: Path) -> None:
    model = quantize(nn.Linear(256, 256, bias=False), 4)
    for target in NUMBER_FORMATS:
        save_accelerator(model, tmp_path / target, target)  # type: ignore[arg-type]
        size = sum(t.numel() * t.element_size() for t in load_file(tmp_path / target).values())
        whole = 4 if target in ("fp8", "int8") else 0  # the scale of the tensor
        assert 8 * (size - whole) == NUMBER_FORMATS[target].bits_per_weight * model.weight.numel()


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convert", ["file", "torchao"])
@pytest.mark.parametrize(
    ("target", "bits", "message"),
    [
        ("mxfp4", 5, "mxfp4 holds weights of at most 4 bits, but 0.weight has 5; use mxfp6 or fp8"),
        ("int8", 5, "int8 holds weights of at most 4 bits, but 0.weight has 5; use mxfp6 or fp8"),
        ("mxfp6", 6, "mxfp6 holds weights of at most 5 bits, but 0.weight has 6; use fp8"),
        ("fp8", 7, "fp8 holds weights of at most 6 bits, but 0.weight has 7; use save_packed"),
        ("nvfp4", 3, "format must be one of mxfp4, mxfp6, fp8, int8, got 'nvfp4'"),
        ("mxfp4", None, "the network is not fully quantized: 0.weight is not on a grid"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    convert: str, target: Any, bits: int | None, message: str, tmp_path: Path
) -> None:
    model, path = nn.Sequential(nn.Linear(32, 32), nn.ReLU()), tmp_path / "out.safetensors"
    layers = None if bits is None else [record("0.weight", bits, -2)]
    if bits is not None:
        model[0].weight.data = PowerOfTwoGrid(-2, bits).quantize(model[0].weight.data)
    path.write_bytes(b"what was there before")
    call: Any = partial(save_accelerator, model, path) if convert == "file" else partial(to_torchao, model)
    with pytest.raises(ValueError, match=message):
        call(target, layers=layers)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"what was there before"]


def test_partly_quantized_networks_keep_the_rest_as_it_is(tmp_path: Path) -> None:
    model = nn.Sequential(quantize(nn.Linear(32, 32), 4), nn.Linear(32, 4))
    save_accelerator(model, tmp_path / "out", "mxfp4", allow_partial=True)
    assert all(same_bits(value, model.state_dict()[name]) for name, value in read_accelerator(tmp_path / "out").items())
    converted = to_torchao(model, "int8", allow_partial=True)
    assert type(converted[1].weight) is nn.Parameter  # type: ignore[index]


def test_tensors_that_bear_the_files_names_are_refused(tmp_path: Path) -> None:
    model = quantize(nn.Linear(32, 32), 4)
    model.register_buffer("weight_scale", torch.ones(3))
    with pytest.raises(ValueError, match="tensor of its own called weight_scale"):
        save_accelerator(model, tmp_path / "out", "int8")
    assert not list(tmp_path.iterdir())


def test_state_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    class Odd(nn.Linear):
        def get_extra_state(self) -> str:
            return "more"

        def set_extra_state(self, state: str) -> None: ...

    with pytest.raises(ValueError, match="_extra_state is a str, no tensor; only save_packed"):
        save_accelerator(quantize(Odd(32, 32), 4), tmp_path / "out", "fp8")


def test_other_files_and_later_versions_are_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(1)}, tmp_path / "plain")
    with pytest.raises(ValueError, match="no inq_accelerator metadata"):
        read_accelerator(tmp_path / "plain")
    save_file({"weight": torch.ones(1)}, tmp_path / "later", {"inq_accelerator": '{"version": 3}'})
    with pytest.raises(ValueError, match="has version 3, this release reads versions 1 and 2"):
        read_accelerator(tmp_path / "later")


@pytest.mark.parametrize("target", ["mxfp4", "mxfp6"])
def test_a_file_with_a_wrong_bit_never_gets_its_name(
    target: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = accelerator.pack_elements
    monkeypatch.setattr(accelerator, "pack_elements", lambda elements, width: pack(elements, width) ^ 1)
    with pytest.raises(ValueError, match=f"weight does not come back bit for bit from {target}"):
        save_accelerator(quantize(nn.Linear(32, 32), 4), tmp_path / "out", target)
    assert not list(tmp_path.iterdir())
