from __future__ import annotations

import json
import logging
import re
import warnings
from collections import OrderedDict, UserDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from support import TinyModule, record, same_bits, trainer
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from inq_lightning import INQCallback, PowerOfTwoGrid
from inq_lightning.core.selection import select_parameters
from inq_lightning.formats.onnx import METADATA_KEY, export_onnx, session_options
from inq_lightning.recipes.classifier import Classifier
from inq_lightning.recipes.data import DigitsDataModule
from inq_lightning.recipes.models import ResNetCIFAR, SmallCNN

BITS = range(2, 9)
SHARES = {2: 0.08, 3: 0.14, 4: 0.14, 5: 0.27, 7: 0.27}  # of a float32 file, what one of so many bits may have


class EveryWidth(nn.Module):
    """For each bit width a convolution, a transposed one and a linear layer, a batch normalization behind each."""

    def __init__(self) -> None:
        super().__init__()
        self.convs, self.linears = nn.ModuleList(), nn.ModuleList()
        for bits in BITS:
            conv = nn.Conv2d(8, 8, 5, padding=2, groups=1 + bits % 2, bias=bits < 5)
            transposed = nn.ConvTranspose2d(8, 8, 3, padding=1, bias=bits > 5)
            self.convs.append(nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU(), transposed, nn.BatchNorm2d(8)))
            self.linears.append(nn.Sequential(nn.Linear(128, 128), nn.BatchNorm1d(128)))
        self.tied = nn.Linear(128, 128)
        self.tied.weight = self.linears[0][0].weight

    def forward(self, images: Tensor) -> Tensor:
        for block in self.convs:
            images = images + block(images).relu()
        x = images.flatten(1)
        for block in self.linears:
            x = x + block(x).tanh()
        out: Tensor = self.tied(x)
        return out

    @property
    def layer_bits(self) -> dict[str, int]:
        return {f"{part}.{i}.*": bits for part in ("convs", "linears") for i, bits in enumerate(BITS)}


class Sequence(nn.Module):
    """An embedding, a recurrent layer, attention, and linear layers on three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.lstm = nn.LSTM(16, 12, batch_first=True, bidirectional=True)
        self.attention = nn.TransformerEncoderLayer(24, 2, 48, batch_first=True)
        self.linear = nn.Linear(24, 20, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.linear(self.attention(self.lstm(self.embedding(tokens))[0]))
        return out


def quantize(net: nn.Module, bits: int = 5, layer_bits: dict[str, int] | None = None) -> list[Any]:
    """Rounds a fresh network to grids all of whose levels occur; norms get zero and negative gammas.

    Returns:
        Records as `INQCallback.layers` has them.
    """
    generator = torch.Generator().manual_seed(bits)
    layers = []
    with torch.no_grad():
        for name, p, width, *_ in select_parameters(net, bits, embeddings=True, layer_bits=layer_bits):
            grid = PowerOfTwoGrid.from_weights(p, width)
            p.copy_(grid.quantize(p))
            levels = grid.levels.float()[torch.randperm(len(grid.levels), generator=generator)][: p.numel()]
            p.view(-1)[: len(levels)] = levels
            layers.append(record(name, width, grid.n1))
        for module in net.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean):
                    tensor.normal_(generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
                if module.num_features > 2:
                    module.weight[0], module.weight[1] = 0, -1
    return layers


def run(path: Path, x: Tensor, mode: str | None = "exact") -> Any:
    options = ort.SessionOptions() if mode is None else session_options(mode)  # type: ignore[arg-type]
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


def float_file(net: nn.Module, path: Path, x: Tensor) -> Path:
    """The network as torch.onnx writes it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            net.eval(),
            (x,),
            dynamo=True,
            opset_version=21,
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
            verbose=False,
        )
    assert program is not None
    program.save(path)
    return path


def decoded(path: Path) -> dict[str, Any]:
    """Float32 weights of a file, from its initializers, without ONNX Runtime."""
    graph = onnx.load(path).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "DequantizeLinear":
            codes, scale = (arrays[name] for name in node.input)
            shape = [1] * codes.ndim
            if scale.ndim:
                shape[next((a.i for a in node.attribute if a.name == "axis"), 1)] = -1
            arrays[node.output[0]] = codes.astype(np.float32) * scale.reshape(shape)
        elif node.op_type == "Cast" and node.input[0].endswith(".codes"):
            arrays[node.output[0]] = arrays[node.input[0]].astype(np.int32)
        elif node.op_type in ("Gather", "Mul") and all(name in arrays for name in node.input):
            a, b = (arrays[name] for name in node.input)
            arrays[node.output[0]] = a[b] if node.op_type == "Gather" else a * b
    return arrays


def types(path: Path) -> dict[str, str]:
    return {
        tensor.name: onnx.TensorProto.DataType.Name(tensor.data_type)
        for tensor in onnx.load(path).graph.initializer
        if tensor.name.endswith(".codes")
    }


class Exported(NamedTuple):
    net: EveryWidth
    path: Path
    fast: Path
    floats: Path
    difference: float
    fast_difference: float


@pytest.fixture(scope="module")
def exported(tmp_path_factory: Any) -> Exported:
    torch.manual_seed(0)
    folder, net, x = tmp_path_factory.mktemp("onnx"), EveryWidth(), torch.randn(4, 8, 4, 4)
    layers = quantize(net, layer_bits=net.layer_bits)
    difference = export_onnx(net, folder / "net.onnx", x, layers=layers)
    fast_difference = export_onnx(net, folder / "fast.onnx", x, layers=layers, activations="int8")
    floats = float_file(net, folder / "float.onnx", x)
    return Exported(net, folder / "net.onnx", folder / "fast.onnx", floats, difference, fast_difference)


def records(path: Path) -> Any:
    return json.loads({entry.key: entry.value for entry in onnx.load(path).metadata_props}[METADATA_KEY])


def test_the_codes_are_in_the_smallest_type_that_holds_their_bits(exported: Exported) -> None:
    expected = {2: "INT2", 3: "INT4", 4: "UINT4", 5: "FLOAT8E4M3FN", 6: "FLOAT8E4M3FN", 7: "FLOAT8E5M2", 8: "UINT8"}
    found = types(exported.path)
    layers = records(exported.path)
    assert len(layers) == 21  # the tied weight once
    for name, layer in layers.items():
        assert found[f"{name}.codes"] == expected[layer["bits"]]
    model = onnx.load(exported.path)
    assert (model.opset_import[0].version, model.ir_version) == (25, 13)
    onnx.checker.check_model(model, full_check=True)


def test_weights_in_the_file_are_bit_identical_to_those_of_the_float_file(exported: Exported) -> None:
    ours = decoded(exported.path)
    theirs = {t.name: numpy_helper.to_array(t) for t in onnx.load(exported.floats).graph.initializer}
    for name in records(exported.path):
        assert ours[name].dtype == np.float32
        assert ours[name].tobytes() == theirs[name].tobytes(), name
    # All norms are folded but the one behind the tied weight.
    assert [node.op_type for node in onnx.load(exported.path).graph.node].count("BatchNormalization") == 1


def test_weights_without_a_norm_are_bit_identical_to_those_of_torch(tmp_path: Path) -> None:
    net = nn.Sequential(*(nn.Linear(16, 16) for _ in BITS))
    layers = quantize(net, layer_bits={f"{i}.*": bits for i, bits in enumerate(BITS)})
    assert export_onnx(net, tmp_path / "net.onnx", torch.randn(2, 16), layers=layers) < 1e-6
    ours = decoded(tmp_path / "net.onnx")
    for i in range(len(net)):
        assert ours[f"{i}.weight"].tobytes() == net[i].weight.detach().numpy().tobytes()


def test_outputs_in_mode_exact_are_those_of_the_float_file_bit_for_bit(exported: Exported) -> None:
    for batch in (1, 7):
        x = torch.randn(batch, 8, 4, 4)
        floats = run(exported.floats, x, None)
        assert floats.std(0).min() > 0.01 or batch == 1
        assert run(exported.path, x, "exact").tobytes() == floats.tobytes()
        for mode in ("low-memory", "fast", None):
            np.testing.assert_allclose(run(exported.path, x, mode), floats, atol=1e-5 * np.abs(floats).max())


def test_the_returned_difference_is_that_of_rounding(exported: Exported) -> None:
    x = torch.randn(64, 8, 4, 4)
    with torch.no_grad():
        expected = exported.net.eval()(x).numpy()
    largest = np.abs(expected).max()
    assert 0 <= exported.difference < 1e-5 * largest
    assert np.abs(run(exported.path, x) - expected).max() < 1e-5 * largest
    assert exported.fast_difference < 0.05 * largest


def test_int8_activations_are_multiplied_by_codes_in_linear_layers(exported: Exported) -> None:
    operators = [node.op_type for node in onnx.load(exported.fast).graph.node]
    assert operators.count("MatMulNBits") == 2 + 1 + 1 + 2  # the tied weight twice, 5 bits in two planes
    assert operators.count("Gemm") == 3  # 6 to 8 bits
    x = torch.randn(64, 8, 4, 4)
    expected = run(exported.floats, x, None)
    for mode in ("exact", "low-memory", "fast"):
        assert np.abs(run(exported.fast, x, mode) - expected).max() < 0.05 * np.abs(expected).max()


def test_the_planes_of_codes_add_up_to_the_weight(tmp_path: Path) -> None:
    net = nn.Sequential(*(nn.Linear(200, 200, bias=bits < 4) for bits in (2, 3, 4, 5)))
    layers = quantize(net, layer_bits={f"{i}.*": bits for i, bits in enumerate((2, 3, 4, 5))})
    export_onnx(net, tmp_path / "net.onnx", torch.randn(2, 200), layers=layers, activations="int8")
    graph = onnx.load(tmp_path / "net.onnx").graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    totals = {f"{i}.weight": np.zeros((200, 200), np.float32) for i in range(4)}
    for node in (node for node in graph.node if node.op_type == "MatMulNBits"):
        width = next(a.i for a in node.attribute if a.name == "bits")
        codes, scale, zero = (arrays[name] for name in node.input[1:])
        values = np.stack([codes >> shift & (1 << width) - 1 for shift in range(0, 8, width)], -1)
        values = values.reshape(200, scale.shape[1], -1).astype(np.float32) - (zero[0, 0] & (1 << width) - 1)
        totals[node.input[1].split(".plane")[0]] += (values * scale[..., None]).reshape(200, -1)[:, :200]
    for i in range(4):
        assert totals[f"{i}.weight"].tobytes() == net[i].weight.detach().numpy().tobytes()


def test_a_norm_behind_a_grouped_transposed_convolution_stays(tmp_path: Path) -> None:
    net = nn.Sequential(nn.ConvTranspose2d(8, 8, 2, groups=2), nn.BatchNorm2d(8))
    x = torch.randn(2, 8, 4, 4)
    assert export_onnx(net, tmp_path / "net.onnx", x, layers=quantize(net)) < 1e-5
    assert [n.op_type for n in onnx.load(tmp_path / "net.onnx").graph.node][-1] == "BatchNormalization"
    assert decoded(tmp_path / "net.onnx")["0.weight"].tobytes() == net[0].weight.detach().numpy().tobytes()


@pytest.mark.parametrize("bits", [5, pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_embeddings_recurrent_layers_and_attention_keep_their_codes(bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, tokens = Sequence(), torch.randint(0, 20, (2, 5))
    layers = quantize(net, bits)
    for p in net.parameters():
        p.requires_grad_(False)  # torch then has a fused operator for attention, which ONNX lacks
    assert export_onnx(net, tmp_path / "net.onnx", tokens, layers=layers) < 1e-5
    ours, parameters = decoded(tmp_path / "net.onnx"), dict(net.named_parameters())
    assert len(layers) == 10
    for layer in layers:
        assert ours[layer.name].tobytes() == parameters[layer.name].numpy().tobytes()
    tokens = torch.randint(0, 20, (3, 5))
    expected = run(float_file(net, tmp_path / "float.onnx", tokens), tokens, None)
    np.testing.assert_allclose(run(tmp_path / "net.onnx", tokens, "exact"), expected, atol=1e-6)
    np.testing.assert_allclose(run(tmp_path / "net.onnx", tokens, "low-memory"), expected, atol=1e-5)
    if bits == 5:
        assert export_onnx(net, tmp_path / "fast.onnx", tokens, layers=layers, activations="int8") < 0.05
        operators = [node.op_type for node in onnx.load(tmp_path / "fast.onnx").graph.node]
        assert operators.count("MatMulNBits") == 10  # two planes of five linear layers
        transposed = [n for n in onnx.load(tmp_path / "fast.onnx").graph.node if n.op_type == "Transpose"]
        assert not any(".weight" in name for node in transposed for name in node.input)


@pytest.fixture(scope="module")
def resnet_bytes(tmp_path_factory: Any) -> int:
    path = tmp_path_factory.mktemp("resnet") / "float.onnx"
    return float_file(ResNetCIFAR(20), path, torch.randn(2, 3, 16, 16)).stat().st_size


@pytest.mark.parametrize("bits", [2, *(pytest.param(bits, marks=pytest.mark.slow) for bits in (3, 4)), 5])
def test_files_of_resnet20_are_as_small_as_promised(bits: int, resnet_bytes: int, tmp_path: Path) -> None:
    net = ResNetCIFAR(20)
    quantize(net, bits)
    export_onnx(net, tmp_path / "net.onnx", torch.randn(2, 3, 16, 16))
    assert (tmp_path / "net.onnx").stat().st_size <= SHARES[bits] * resnet_bytes
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


@pytest.mark.parametrize(
    "bits",
    [5, *(pytest.param(bits, marks=pytest.mark.slow) for bits in (2, 3, 4, 7))],
)
def test_a_trained_network_predicts_the_same_on_the_whole_test_set(bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    data, callback = DigitsDataModule(), INQCallback(bits=bits, schedule={1: 0.5, 2: 1.0})
    module = Classifier(SmallCNN(), 10, lr=0.05, lr_schedule="constant")
    trainer(callback, max_epochs=3).fit(module, data)
    images = torch.cat([images for images, _ in data.test_dataloader()])
    difference = export_onnx(module, tmp_path / "net.onnx", images[:1], layers=callback.layers)
    assert difference < 1e-4
    with torch.no_grad():
        expected = module.eval()(images).argmax(1).numpy()
    assert len(set(expected)) == 10
    for mode in ("exact", "low-memory", "fast"):
        assert (run(tmp_path / "net.onnx", images, mode).argmax(1) == expected).all()
    # Even of a network of 26,000 weights the graph is a small part.
    floats = float_file(module.net, tmp_path / "float.onnx", images[:2]).stat().st_size
    assert (tmp_path / "net.onnx").stat().st_size <= SHARES[bits] * floats


def test_files_hold_nothing_that_readers_know_anyway(tmp_path: Path) -> None:
    net = SmallCNN()
    quantize(net, 3)
    export_onnx(net, tmp_path / "net.onnx", torch.randn(2, 1, 8, 8))
    graph = onnx.load(tmp_path / "net.onnx").graph
    assert not graph.value_info
    assert not any(node.name or node.doc_string or node.metadata_props for node in graph.node)
    assert not any(value.metadata_props for value in [*graph.input, *graph.output])
    for node in (node for node in graph.node if node.op_type == "Conv"):
        assert {a.name for a in node.attribute} <= {"pads", "kernel_shape"}


def test_the_network_and_torch_are_left_as_they_were(tmp_path: Path, capfd: Any) -> None:
    net = SmallCNN().train()
    quantize(net, 3)
    net.features[1].eval()
    modes = {name: module.training for name, module in net.named_modules()}
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    random, disabled, filters = torch.get_rng_state(), logging.root.manager.disable, list(warnings.filters)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        export_onnx(net, tmp_path / "net.onnx", torch.randn(1, 1, 8, 8, generator=torch.Generator()))
    assert not caught
    assert {name: module.training for name, module in net.named_modules()} == modes
    assert all(same_bits(tensor.float(), state[name].float()) for name, tensor in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled()
    assert (logging.root.manager.disable, list(warnings.filters)) == (disabled, filters)
    out, err = capfd.readouterr()
    assert out + err == ""


def test_layers_that_were_left_out_stay_float(tmp_path: Path) -> None:
    net, x = SmallCNN(), torch.randn(2, 1, 8, 8)
    layers = [layer for layer in quantize(net, 5) if layer.name != "linear.weight"]
    with torch.no_grad():
        net.linear.weight.normal_()
    with pytest.raises(ValueError, match=r"not fully quantized: linear\.weight"):
        export_onnx(net, tmp_path / "net.onnx", x)
    assert not list(tmp_path.iterdir())
    floats = run(float_file(net, tmp_path / "float.onnx", x), x, None)
    for options in ({"layers": layers}, {"allow_partial": True}):
        export_onnx(net, tmp_path / "net.onnx", x, **options)  # type: ignore[arg-type]
        assert set(records(tmp_path / "net.onnx")) == {layer.name for layer in layers}
        assert run(tmp_path / "net.onnx", x).tobytes() == floats.tobytes()


def test_layers_of_zeros_are_exported_at_every_bit_width(tmp_path: Path) -> None:
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in BITS))
    for p in net.parameters():
        nn.init.zeros_(p)
    layers = [record(f"{i}.weight", bits, None) for i, bits in enumerate(BITS)]
    assert export_onnx(net, tmp_path / "net.onnx", torch.randn(2, 4), layers=layers) == 0
    assert set(types(tmp_path / "net.onnx").values()) == {"INT2", "INT4", "FLOAT8E4M3FN"}
    assert not any(decoded(tmp_path / "net.onnx")[layer.name].any() for layer in layers)


def test_a_compiled_network_is_exported_as_the_one_within(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    quantize(net, 4)
    assert export_onnx(torch.compile(net), tmp_path / "net.onnx", torch.randn(2, 8)) < 1e-6  # type: ignore[arg-type]
    assert set(types(tmp_path / "net.onnx").values()) == {"UINT4"}


def test_several_inputs_and_outputs_share_the_dynamic_batch(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(5, 3)

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            z = self.a(x) + self.b(y)
            return {"sum": z, "infinite": z / 0, "largest": z.argmax(1)}

    net = Two()
    quantize(net, 3)
    assert export_onnx(net, tmp_path / "net.onnx", (torch.randn(1, 4), torch.randn(1, 5))) < 1e-6
    session = ort.InferenceSession(str(tmp_path / "net.onnx"), session_options())
    outputs = session.run(None, {"x": np.ones((9, 4), np.float32), "y": np.ones((9, 5), np.float32)})
    assert [output.shape for output in outputs] == [(9, 3), (9, 3), (9,)]


class Forward(nn.Module):
    """A linear layer within a forward of any kind."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.bias = nn.Parameter(torch.randn(5, 5))
        quantize(self, 4)
        self.call = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(self, *args, **kwargs)


class Named(Forward):
    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float | Tensor = 1.0) -> Tensor:  # type: ignore[override]
        out: Tensor = self.linear(x) * scale
        return out if mask is None else out * mask


def infer(path: Path, *args: Tensor, **kwargs: Tensor) -> list[Any]:
    session = ort.InferenceSession(str(path), session_options())
    inputs = kwargs or {f"args_{i}": x for i, x in enumerate(args)}
    return session.run(None, {name: x.numpy() for name, x in inputs.items()})  # type: ignore[no-any-return]


def test_a_forward_of_any_number_of_inputs_has_a_dynamic_batch(tmp_path: Path) -> None:
    net = Forward(lambda self, *xs: sum(self.linear(x) for x in xs))
    x = torch.randn(3, 4)
    for count in (1, 3):
        assert export_onnx(net, tmp_path / "net.onnx", (torch.randn(1, 4),) * count) < 1e-6
        (out,) = infer(tmp_path / "net.onnx", *[x] * count)
        np.testing.assert_allclose(out, count * net.linear(x).detach().numpy(), atol=1e-5)


def test_inputs_by_name_have_a_dynamic_batch_each_and_other_values_are_fixed(tmp_path: Path) -> None:
    net, x, mask = Named(lambda: None), torch.randn(3, 4), torch.rand(3, 1)
    inputs = {"scale": mask[:1], "x": x[:1], "mask": mask[:1]}
    assert export_onnx(net, tmp_path / "net.onnx", inputs) < 1e-6
    (out,) = infer(tmp_path / "net.onnx", x=x, mask=mask, scale=mask)
    np.testing.assert_allclose(out, net(x, mask, scale=mask).detach().numpy(), atol=1e-6)
    assert export_onnx(net, tmp_path / "net.onnx", UserDict({"x": x, "scale": 2.0, "mask": None})) < 1e-6
    (out,) = infer(tmp_path / "net.onnx", x=x[:2])
    np.testing.assert_allclose(out, 2 * net.linear(x[:2]).detach().numpy(), atol=1e-6)


def test_attention_with_a_learned_bias_is_exported(tmp_path: Path) -> None:
    def attend(self: Forward, x: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        y = self.linear(x).view(-1, 5, 2, 2).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(y, y, y, attn_mask=self.bias.expand(1, 2, 5, 5))

    net = Forward(attend)
    assert export_onnx(net, tmp_path / "net.onnx", torch.randn(2, 5, 4)) < 1e-5
    assert net.bias.requires_grad
    assert infer(tmp_path / "net.onnx", torch.randn(7, 5, 4))[0].shape == (7, 2, 5, 2)


class Cache:
    def __init__(self, keys: Tensor) -> None:
        self.keys = keys


@dataclass
class Output:
    logits: Tensor
    cache: Cache
    hidden: tuple[Tensor, ...]


class Mapped(OrderedDict[str, Any]):
    """As the outputs of transformers are."""


@pytest.mark.parametrize(
    ("outputs", "tensors", "told"),
    [
        (lambda y: (y, None), 1, ""),
        (lambda y: (y, 3, 2.5, "text"), 1, r"\[1\] \(int\), \[2\] \(float\), \[3\] \(str\)"),
        (lambda y: (y, y.shape[0]), 1, r"\[1\] \(int\)"),
        (lambda y: {"logits": y, "size": y.shape}, 1, r"\['size'\]"),
        (lambda y: Output(y, Cache(y), (y + 1, y * 2)), 3, r"\['cache'\] \(Cache\)"),
        (lambda y: Mapped(logits=y, past=[Cache(y), {"a": y + 1}]), 2, r"\['past'\]\[0\] \(Cache\)"),
    ],
)
def test_outputs_that_are_no_tensors_are_left_out_and_named(
    outputs: Any, tensors: int, told: str, tmp_path: Path
) -> None:
    net, x = Forward(lambda self, x: outputs(self.linear(x))), torch.randn(2, 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert export_onnx(net, tmp_path / "net.onnx", x) < 1e-6
    assert len(caught) == bool(told)
    assert not told or re.search(f"leaves out what the network returns besides tensors: {told}", str(caught[0].message))
    found = infer(tmp_path / "net.onnx", x)
    assert len(found) == tensors
    np.testing.assert_allclose(found[0], net.linear(x).detach().numpy(), atol=1e-6)


def test_a_fixed_batch_takes_what_no_dynamic_one_can(tmp_path: Path) -> None:
    fixed = FixedBatch()
    quantize(fixed, 5)
    x = torch.randn(3, 8)
    assert export_onnx(fixed, tmp_path / "net.onnx", x, fixed_batch=True) < 1e-6
    (described,) = ort.InferenceSession(str(tmp_path / "net.onnx"), session_options()).get_inputs()
    assert described.shape == [3, 8]
    images = Forward(lambda self, x, images: self.linear(x) + images.mean())
    export_onnx(images, tmp_path / "net.onnx", (torch.randn(1, 4), torch.randn(3, 2, 2)), fixed_batch=True)
    inputs = ort.InferenceSession(str(tmp_path / "net.onnx"), session_options()).get_inputs()
    assert [x.shape for x in inputs] == [[1, 4], [3, 2, 2]]


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda self, x: 3, r"returns no tensor, but the output \(int\)"),
        (lambda self, x: torch.matrix_exp(x.view(-1, 2, 2)), "cannot write the network as ONNX: .*matrix_exp"),
        (lambda self, x: x if self.linear(x).sum() > 0 else -x, "cannot trace the network: .*branches on the values"),
        (lambda self, x: self.missing(x), "does not run on inputs .*has no attribute 'missing'"),
    ],
)
def test_what_cannot_be_exported_is_refused_with_the_true_cause(forward: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as error:
        export_onnx(Forward(forward), tmp_path / "net.onnx", torch.randn(2, 4))
    assert ("fixed_batch" in str(error.value)) == ("dynamic" in message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, nn.utils.weight_norm])
def test_a_weight_norm_that_was_left_out_is_exported(norm: Any, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    layers = quantize(net, 4)
    net.append(norm(nn.Linear(4, 2)))
    net(torch.randn(2, 4)).sum().backward()
    for options in ({}, {"layers": layers}):
        assert export_onnx(net, tmp_path / "net.onnx", torch.randn(2, 4), **options) < 1e-6
        assert set(records(tmp_path / "net.onnx")) == {"0.weight"}


class FixedBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x.reshape(3, 8))
        return out


def test_bad_input_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    net = TinyModule().net
    x = torch.randn(2, 8)
    target = tmp_path / "net.onnx"
    with pytest.raises(ValueError, match="not fully quantized"):
        export_onnx(net, target, x)
    quantize(net, 5)
    with pytest.raises(ValueError, match=r"does not run on inputs float32\(2, 9\)"):
        export_onnx(net, target, torch.randn(2, 9))
    with pytest.raises(TypeError, match="a tuple of tensors or a dict of them, got list"):
        export_onnx(net, target, [x])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch as their first dimension"):
        export_onnx(net, target, (x, torch.randn(3, 8)))
    with pytest.raises(ValueError, match=r"torch\.float64.*model\.float\(\)"):
        export_onnx(TinyModule().net.double(), target, x.double())
    with pytest.raises(OSError, match="missing"):
        export_onnx(net, tmp_path / "missing" / "net.onnx", x)
    fixed = FixedBatch()
    quantize(fixed, 5)
    with pytest.raises(TypeError, match="these hold list"):
        export_onnx(net, target, {"x": [x]})
    with pytest.raises(TypeError, match="these hold no tensor"):
        export_onnx(net, target, {"x": None})
    with pytest.raises(ValueError, match=r"cannot trace the network with a dynamic batch: .*fixed_batch=True"):
        export_onnx(fixed, target, torch.randn(3, 8))
    with pytest.raises(ValueError, match="mode must be one of exact, low-memory, fast, got 'slow'"):
        session_options("slow")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="activations must be one of float, int8, got 'int4'"):
        export_onnx(net, target, x, activations="int4")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_failed_export_leaves_the_older_file(tmp_path: Path) -> None:
    fixed = FixedBatch().train()
    quantize(fixed, 5)
    (tmp_path / "net.onnx").write_bytes(b"older")
    with pytest.raises(ValueError, match="dynamic batch"):
        export_onnx(fixed, tmp_path / "net.onnx", torch.randn(3, 8))
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]
    assert (tmp_path / "net.onnx").read_bytes() == b"older"
    assert fixed.training
    assert logging.root.manager.disable == 0
