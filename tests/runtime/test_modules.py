from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from support import same_bits
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from inq_lightning.core.layer import Layer
from inq_lightning.core.selection import select_parameters
from inq_lightning.grid import PowerOfTwoGrid
from inq_lightning.grid.levels import LevelsName
from inq_lightning.recipes.models import ResNetCIFAR, SmallCNN
from inq_lightning.runtime.modules import Packed, _has_bags, _has_fast_int8, to_packed

BITS = range(2, 9)
multiplies_codes = pytest.mark.skipif(not _has_bags(), reason="needs the quantized kernels of x86 CPUs")


def quantized(model: nn.Module, bits: int = 4) -> nn.Module:
    """The network in eval mode, each selected weight rounded to a grid."""
    for selected in select_parameters(model):
        weight = selected.parameter
        weight.data.copy_(PowerOfTwoGrid.from_weights(weight.detach(), bits).quantize(weight.detach()))
    return model.eval()


def every_level(layer: nn.Module, bits: int, n1: int = -1) -> nn.Module:
    """The layer with all levels of one grid among its weights."""
    levels = PowerOfTwoGrid(n1, bits).levels
    weight = layer.weight.data
    chosen = torch.randint(len(levels), (weight.numel(),))
    chosen[: len(levels)] = torch.arange(len(levels))[: weight.numel()]
    weight.copy_(levels[chosen].view_as(weight))
    return layer.eval()


def weight_bytes(model: nn.Module) -> int:
    """Everything that layers with weights keep besides their biases, what they share counted once."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)]
    kept = [pair for m in layers for pair in [*m.named_parameters(recurse=False), *m.named_buffers(recurse=False)]]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for n, t in kept if n != "bias"}.values())


def large(inputs: int, outputs: int, bits: int) -> nn.Module:
    """A linear layer whose weights are spread like trained ones, with a few of the largest of either sign."""
    layer = nn.Linear(inputs, outputs)
    layer.weight.data.normal_(0, 0.02).view(-1)[:2] = torch.tensor([0.1, -0.1])
    return quantized(layer, bits)


class LargestFloats(TorchDispatchMode):
    """Notes the size of the largest tensor of floating-point numbers that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor.is_sparse_csr:
                self.numel = max(self.numel, tensor.numel())
        return out


LAYERS = {
    "linear": (lambda: nn.Linear(48, 12), (3, 48)),
    "linear without bias, 3-d input": (lambda: nn.Linear(48, 12, bias=False), (2, 3, 48)),
    "conv1d": (lambda: nn.Conv1d(6, 12, 7, stride=2, dilation=2), (2, 6, 40)),
    "conv2d": (lambda: nn.Conv2d(6, 12, 3, padding=1), (2, 6, 9, 9)),
    "conv2d same": (lambda: nn.Conv2d(6, 12, 3, padding="same", bias=False), (1, 6, 9, 9)),
    "conv2d grouped": (lambda: nn.Conv2d(12, 24, 3, groups=3), (2, 12, 9, 9)),
    "conv2d depthwise": (lambda: nn.Conv2d(20, 20, 3, groups=20), (2, 20, 9, 9)),
    "conv2d circular": (lambda: nn.Conv2d(6, 12, 3, padding=2, padding_mode="circular"), (2, 6, 9, 9)),
    "conv2d reflect": (lambda: nn.Conv2d(6, 12, 3, padding=1, padding_mode="reflect"), (2, 6, 9, 9)),
    "conv2d pointwise": (lambda: nn.Conv2d(12, 24, 1), (2, 12, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 3), (2, 4, 5, 5, 5)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(6, 12, 5, stride=2, output_padding=1), (2, 6, 9)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(6, 12, 3, groups=2, bias=False), (2, 6, 9, 9)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(4, 6, 3), (1, 4, 3, 3, 3)),
}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_every_layer_decodes_and_computes_to_the_bit(kind: str, bits: int) -> None:
    torch.manual_seed(bits)
    make, shape = LAYERS[kind]
    layer, x = every_level(make(), bits), torch.randn(shape)
    packed = to_packed(layer)
    assert isinstance(packed, Packed)
    assert isinstance(packed, type(layer))
    assert same_bits(packed.weight, layer.weight)
    assert same_bits(packed(x), layer(x))
    assert "weight" not in dict(packed.named_parameters())


@pytest.mark.parametrize("bits", [2, 4, 5, 6])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_other_dtypes_compute_to_the_bit_packed_before_or_after(dtype: torch.dtype, bits: int) -> None:
    model = nn.Sequential(every_level(nn.Conv2d(3, 64, 3), bits), nn.Flatten(), every_level(nn.Linear(576, 300), bits))
    after = to_packed(model).to(dtype)
    model, x = model.to(dtype), torch.randn(2, 3, 5, 5).to(dtype)
    for packed in (after, to_packed(model)):
        assert packed(x).dtype == dtype
        assert same_bits(packed(x), model(x))


@pytest.mark.parametrize("n1", [-16, -140, 100])
def test_extreme_exponents_decode_to_the_bit(n1: int) -> None:
    for bits in (2, 4, 5):
        layer = every_level(nn.Linear(48, 12), bits, n1)
        assert same_bits(to_packed(layer).weight, layer.weight)
    half = every_level(nn.Linear(48, 12).half(), 5, -16)  # down to the smallest float16
    assert same_bits(to_packed(half).weight, half.weight)


def test_a_layer_of_zeros_is_packed() -> None:
    layer = nn.Linear(8, 4)
    layer.weight.data.zero_()
    assert same_bits(to_packed(layer).weight, layer.weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("batch", [1, 2, 4, 5, 20])
@torch.no_grad()
def test_a_large_linear_layer_stays_within_its_bounds(bits: int, batch: int) -> None:
    torch.manual_seed(bits)
    assert_within_bounds(large(1000, 1500, bits), batch)


@pytest.mark.parametrize(("levels", "bits"), [("dense", 2), ("dense", 3), ("full", 4), ("dense", 4)])
@torch.no_grad()
def test_a_large_linear_layer_on_other_levels_does_too(levels: LevelsName, bits: int) -> None:
    torch.manual_seed(bits)
    layer = nn.Linear(1000, 1500).eval()
    weight = layer.weight.normal_(0, 0.02)
    grid = PowerOfTwoGrid.from_weights(weight, bits, exponent="mse", family=levels)
    weight.copy_(grid.quantize(weight))
    for batch in (1, 20):
        assert_within_bounds(layer, batch, [Layer("weight", (1500, 1000), bits, grid, weight.numel())])


def assert_within_bounds(layer: nn.Module, batch: int, layers: list[Layer] | None = None) -> None:
    x = torch.randn(batch, 1000) * torch.logspace(-3, 3, batch)[:, None]
    exact = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    rounding = exact.abs() * 2**-23 + 1e-9
    room = x.abs().sum(1, keepdim=True) * layer.weight.abs().max()  # which is 2^n1
    packed = to_packed(layer, layers=layers)
    assert same_bits(packed.weight, layer.weight)
    error = (packed(x) - exact).abs()
    assert bool((error <= room * 2 * (256 + 1000 / 128) * 2**-24 + rounding).all())
    assert bool((error.amax(1) < 1e-6 * exact.abs().amax(1)).all())
    room = x.abs().amax(1, keepdim=True) * layer.weight.abs().sum(1)
    error = (to_packed(layer, activations="int8", layers=layers)(x) - exact).abs()
    assert bool((error <= room / 254 * (1 + 1e-4) + rounding).all())
    assert bool((error.amax(1) < 0.02 * exact.abs().amax(1)).all())


@multiplies_codes
@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@torch.no_grad()
def test_a_large_linear_layer_never_decodes_its_whole_weight(bits: int) -> None:
    layer = large(1000, 300, bits)
    for activations, tolerance in (("float", 1e-6), ("int8", 2e-2))[: 2 if _has_fast_int8() else 1]:
        packed = to_packed(layer, activations=activations)
        for batch in (1, 20):
            x = torch.randn(batch, 1000)
            with LargestFloats() as made:
                y = packed(x)
            assert 0 < made.numel < layer.weight.numel()
            assert (y - layer(x)).abs().max() < tolerance * layer(x).abs().max()


@pytest.mark.parametrize("activations", ["float", "int8"])
@torch.no_grad()
def test_many_weights_of_128_steps_and_few_outputs_are_decoded(activations: str) -> None:
    x = torch.randint(-127, 128, (2, 1500)).float()
    x[:, 0] = 127.0
    for layer in (every_level(nn.Linear(1500, 300), 5), every_level(nn.Linear(1500, 100), 4)):
        expected = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double()).float()
        torch.testing.assert_close(to_packed(layer, activations=activations)(x), expected, rtol=1e-6, atol=1e-3)


@pytest.mark.skipif(not _has_fast_int8(), reason="needs VNNI instructions")
@pytest.mark.parametrize("bits", [4, 5])
@pytest.mark.parametrize("batch", [3, 20])
@torch.no_grad()
def test_integer_products_are_exact_for_integer_inputs(bits: int, batch: int) -> None:
    layer = large(1024, 300, bits)
    layer.bias.zero_()
    x = torch.randint(-127, 128, (batch, 1024)).float()
    x[:, 0] = 127.0
    exact = nn.functional.linear(x.double(), layer.weight.double()).float()
    assert same_bits(to_packed(layer)(x), exact)
    assert same_bits(to_packed(layer, activations="int8")(x), exact)


@pytest.mark.parametrize("activations", ["float", "int8"])
@torch.no_grad()
def test_awkward_inputs_of_a_large_linear_layer(activations: str) -> None:
    layer = large(512, 512, 5)
    packed = to_packed(layer, activations=activations)
    assert packed(torch.randn(0, 512)).shape == (0, 512)
    assert packed(torch.randn(512)).shape == (512,)
    assert packed(torch.randn(2, 3, 512)).shape == (2, 3, 512)
    assert same_bits(packed(torch.zeros(1, 512)), layer(torch.zeros(1, 512)))
    x = torch.randn(3, 512)
    x[0, 5], x[1, 6], x[2] = float("nan"), float("inf"), x[2] * 1e30
    y = packed(x)
    assert bool(y[:2].isnan().all())
    torch.testing.assert_close(y[2], layer(x)[2], rtol=0, atol=float(layer(x)[2].abs().max()) * 0.02)
    tiny = torch.randn(1, 512) * 1e-36
    bound = float(layer.weight.abs().sum(1).max()) * (1e-42 if activations == "float" else 1e-36)
    torch.testing.assert_close(packed(tiny), layer(tiny), rtol=1e-5, atol=bound)
    with torch.autocast("cpu", torch.bfloat16):
        if activations == "float":
            assert same_bits(packed(x[2:]), layer(x[2:]))


def test_gradients_reach_the_input_in_float_mode() -> None:
    layer = large(512, 512, 5)
    x = torch.randn(2, 512)
    gradients = []
    for module in (layer, to_packed(layer)):
        leaf = x.clone().requires_grad_()
        module(leaf).square().sum().backward()
        gradients.append(leaf.grad)
    assert same_bits(*gradients)


@pytest.mark.parametrize("bits", [3, 5])
@torch.no_grad()
def test_a_whole_resnet_computes_to_the_bit_in_less_than_a_third_of_the_memory(bits: int) -> None:
    torch.manual_seed(0)
    model, x = quantized(ResNetCIFAR(20), bits), torch.randn(2, 3, 32, 32)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    packed = to_packed(model)
    assert same_bits(packed(x), model(x))
    assert weight_bytes(packed) <= 0.3 * weight_bytes(model)
    assert all(same_bits(before[name].float(), t.float()) for name, t in model.state_dict().items())
    assert isinstance(model.conv1.weight, nn.Parameter)


@torch.no_grad()
def test_a_whole_mlp_stays_close_in_less_than_a_third_of_the_memory() -> None:
    torch.manual_seed(0)
    mlp = quantized(nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 10)))
    x = torch.randn(4, 512)
    packed = to_packed(mlp)
    for network in (packed, to_packed(mlp, activations="int8")):
        assert weight_bytes(network) <= 0.3 * weight_bytes(mlp)
    assert float((packed(x) - mlp(x)).abs().max()) < 2e-6 * float(mlp(x).abs().max())


@torch.no_grad()
def test_a_state_dict_loads_into_a_packed_network_with_other_weights_and_bits() -> None:
    torch.manual_seed(0)
    source, target = to_packed(quantized(SmallCNN(), 5)), to_packed(quantized(SmallCNN(), 2))
    x = torch.randn(2, 1, 8, 8)
    assert not torch.equal(source(x), target(x))
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target.load_state_dict(torch.load(file, weights_only=True))
    assert same_bits(source(x), target(x))


@pytest.mark.parametrize("target", ["float", "int8"])
@pytest.mark.parametrize("source", ["float", "int8"])
@torch.no_grad()
def test_a_state_dict_of_a_large_layer_loads_whatever_the_bits_and_activations(source: str, target: str) -> None:
    x = torch.randn(1, 512)
    for bits in (3, 5, 6):
        state = to_packed(large(512, 300, bits), activations=source).state_dict()
        assert set(state) == {"bias", "codes", "grid"}
        assert state["codes"].dtype is torch.int8
        assert state["codes"].shape == (300, 512)
        for others in (4, 5, 7):
            packed = to_packed(large(512, 300, others), activations=target)
            again = to_packed(large(512, 300, others), activations=target)
            packed.load_state_dict(state)
            again.load_state_dict(packed.state_dict())
            assert same_bits(again.weight, packed.weight)
            assert same_bits(again(x), packed(x))
            assert all(same_bits(state[name].float(), t.float()) for name, t in packed.state_dict().items())


@torch.no_grad()
def test_copies_and_pickles_compute_the_same() -> None:
    for model, x in ((SmallCNN(), torch.randn(2, 1, 8, 8)), (large(512, 512, 5), torch.randn(2, 512))):
        packed = to_packed(quantized(model))
        file = io.BytesIO()
        torch.save(packed, file)
        file.seek(0)
        for other in (copy.deepcopy(packed), torch.load(file, weights_only=False)):
            assert same_bits(other(x), packed(x))


@torch.no_grad()
def test_channels_last_before_or_after_computes_to_the_bit() -> None:
    torch.manual_seed(0)
    model, x = quantized(ResNetCIFAR(20)), torch.randn(2, 3, 32, 32)
    after = to_packed(model).to(memory_format=torch.channels_last)
    model = model.to(memory_format=torch.channels_last)
    for packed in (after, to_packed(model)):
        assert packed.conv1.weight.is_contiguous(memory_format=torch.channels_last)
        assert same_bits(packed(x), model(x))


@pytest.mark.parametrize("activations", ["float", "int8"])
@torch.no_grad()
def test_export_runs_and_agrees(activations: str) -> None:
    model = nn.Sequential(every_level(nn.Conv2d(3, 8, 3), 5), nn.Flatten(), large(512, 512, 5))
    x = torch.randn(2, 3, 10, 10)
    packed = to_packed(model, activations=activations)
    exported = torch.export.export(packed, (x,)).module()
    torch.testing.assert_close(exported(x), packed(x), rtol=0, atol=2e-6 * float(packed(x).abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("activations", ["float", "int8"])
@torch.no_grad()
def test_compile_runs_whole_and_agrees(activations: str) -> None:
    packed = to_packed(large(512, 512, 5), activations=activations)
    x = torch.randn(2, 512)
    compiled = torch.compile(packed, fullgraph=True)
    torch.testing.assert_close(compiled(x), packed(x), rtol=0, atol=2e-6 * float(packed(x).abs().max()))


@torch.no_grad()
def test_large_tied_layers_share_their_codes_however_they_are_kept() -> None:
    model, x = nn.Sequential(large(512, 512, 5), nn.Linear(512, 512, bias=False)), torch.randn(1, 512)
    model[1].weight = model[0].weight
    packed = to_packed(model)
    assert weight_bytes(packed) <= 0.3 * weight_bytes(model)
    torch.testing.assert_close(packed(x), model(x), rtol=0, atol=1e-6 * float(model(x).abs().max()))


def test_tied_layers_share_their_codes_and_hooks_stay() -> None:
    first, second = every_level(nn.Linear(32, 32), 4), nn.Linear(32, 32)
    second.weight = first.weight
    calls: list[nn.Module] = []
    first.register_forward_hook(lambda module, args, output: calls.append(module))
    packed = to_packed(nn.Sequential(first, second))
    assert packed[0].codes is packed[1].codes
    packed(torch.randn(1, 32))
    assert calls == [packed[0]]


def test_what_may_compute_something_else_stays_in_floating_point() -> None:
    class Doubling(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = nn.ModuleDict(
        {
            "own": Doubling(8, 8),
            "attention": nn.MultiheadAttention(8, 2),
            "lstm": nn.LSTM(8, 8),
            "embedding": nn.Embedding(8, 8),
            "head": nn.Linear(8, 8),
            "linear": nn.Linear(8, 8),
            "raw": nn.Linear(8, 8),
        }
    )
    model["head"].weight = model["embedding"].weight
    quantized(model)
    model["raw"].weight.data.normal_()
    packed = to_packed(model, allow_partial=True)
    assert [name for name, module in packed.named_modules() if isinstance(module, Packed)] == ["linear"]
    assert packed["head"].weight is packed["embedding"].weight
    assert packed["head"].weight is not model["head"].weight


def test_a_network_with_the_older_weight_norm_is_packed_after_it_has_run() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.utils.weight_norm(nn.Linear(8, 4)))
    net[0].weight.data = PowerOfTwoGrid.from_weights(net[0].weight.data, 4).quantize(net[0].weight.data)
    net(torch.randn(2, 8)).sum().backward()
    x = torch.randn(2, 8)
    assert torch.equal(to_packed(net)(x), net(x))


def test_networks_that_are_not_quantized_and_unknown_modes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.weight.* not on a grid"):
        to_packed(nn.Sequential(nn.Linear(8, 8)))
    with pytest.raises(ValueError, match="activations must be one of float, int8, got 'int4'"):
        to_packed(every_level(nn.Linear(8, 8), 4), activations="int4")  # type: ignore[arg-type]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("activations", ["float", "int8"])
@torch.no_grad()
def test_it_moves_to_the_gpu_and_agrees(activations: str) -> None:
    layer = large(512, 512, 5)
    packed, x = to_packed(layer, activations=activations), torch.randn(3, 512)
    expected = packed(x)
    assert same_bits(packed.cuda().weight.cpu(), layer.weight)
    torch.testing.assert_close(packed(x.cuda()).cpu(), expected, rtol=1e-3, atol=1e-3)
