from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from pytorch_lightning import LightningModule
from support import ROOT, bits_of, trainer
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.overhead import RESNET18
from inq_lightning import INQCallback, PowerOfTwoGrid, Schedule, load_packed, save_packed
from inq_lightning.cli.export import main as export
from inq_lightning.formats.checkpoint import read_checkpoint
from inq_lightning.formats.packed import ArtifactError, read_packed
from inq_lightning.formats.tensors import STORED, as_bytes
from inq_lightning.recipes.classifier import Classifier
from inq_lightning.recipes.data import DigitsDataModule
from inq_lightning.recipes.models import SmallCNN


class Everything(nn.Module):
    """One layer of every type that can be quantized."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv1, self.up1 = nn.Conv1d(2, 3, 3), nn.ConvTranspose1d(3, 2, 3)
        self.conv2, self.up2 = nn.Conv2d(2, 3, 3, groups=1), nn.ConvTranspose2d(3, 2, 3)
        self.conv3, self.up3 = nn.Conv3d(2, 3, 2), nn.ConvTranspose3d(3, 2, 2)
        self.norm = nn.BatchNorm2d(2)
        self.embedding = nn.Embedding(11, 8)
        self.attention, self.cross = nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2, kdim=4, vdim=4)
        self.lstm, self.gru, self.rnn = nn.LSTM(8, 4, 2, bidirectional=True), nn.GRU(8, 4), nn.RNN(8, 4)
        self.lstm_cell, self.gru_cell, self.rnn_cell = nn.LSTMCell(8, 4), nn.GRUCell(8, 4), nn.RNNCell(8, 4)
        self.bilinear = nn.Bilinear(4, 4, 8)
        self.decoder = nn.Linear(8, 11, bias=False)
        self.decoder.weight = self.embedding.weight  # tied

    def forward(self, x: Tensor) -> Tensor:
        b = x.shape[0]
        a = self.up1(self.conv1(x.view(b, 2, 32))).sum((1, 2))
        a = a + self.up2(self.conv2(self.norm(x.view(b, 2, 4, 8)))).sum((1, 2, 3))
        a = a + self.up3(self.conv3(x.view(b, 2, 4, 4, 2))).sum((1, 2, 3, 4))
        sequence = self.embedding((x[:, :5] * 3).long().abs() % 11).transpose(0, 1)
        sequence = self.attention(sequence, sequence, sequence)[0]
        sequence = self.cross(sequence, sequence[..., :4], sequence[..., 4:])[0]
        one = sequence[0]
        recurrent = self.lstm(sequence)[0][0, :, :4] + self.gru(sequence)[0][0] + self.rnn(sequence)[0][0]
        cells = self.lstm_cell(one)[0] + self.gru_cell(one) + self.rnn_cell(one)
        return self.decoder(self.bilinear(recurrent, cells) + a[:, None])


class Module(LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-2, momentum=0.9, weight_decay=1e-3)

    def train_dataloader(self) -> DataLoader[Any]:
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(x, (x.abs().sum(1) * 3).long() % 11), batch_size=16)


def train(bits: int, folder: Path) -> tuple[Module, INQCallback, Path]:
    module = Module(Everything())
    callback = INQCallback(bits, schedule={0: 0.5, 1: 1.0}, embeddings=True)
    fit = trainer(callback, max_epochs=2)
    fit.fit(module)
    fit.save_checkpoint(folder / "trained.ckpt", weights_only=False)
    return module, callback, folder / "trained.ckpt"


def quantized(net: nn.Module, bits: int = 5) -> nn.Module:
    for p in net.parameters():
        if p.dim() > 1:
            p.data = PowerOfTwoGrid.from_weights(p.data, bits).quantize(p.data)
    return net


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 4))


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape)
        same = torch.equal(bits_of(a[name]), bits_of(b[name])) if a[name].is_floating_point() else None
        assert torch.equal(a[name], b[name]) if same is None else same, name


@pytest.mark.parametrize("entropy_coded", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_layer_type_comes_back_from_a_trained_checkpoint(tmp_path: Path, bits: int, entropy_coded: bool) -> None:
    module, callback, checkpoint = train(bits, tmp_path)
    path = tmp_path / "network.safetensors"
    saved = save_packed(
        module, path, layers=callback.layers, entropy_coded=entropy_coded, schedule=callback.options.phases
    )
    assert saved.off_grid == []
    assert saved.weights == sum(layer.numel for layer in callback.layers)

    plain = load_packed(path, Everything(seed=1))  # not the LightningModule that was saved
    assert_same(plain.state_dict(), module.net.state_dict())
    assert plain.decoder.weight is plain.embedding.weight

    artifact = read_packed(path)
    assert_same(artifact.state_dict, module.state_dict())
    records = {layer.name: (layer.shape, layer.bits, layer.n1) for layer in artifact.layers}
    assert records == {layer.name: (layer.shape, layer.bits, layer.n1) for layer in callback.layers}
    assert artifact.metadata["schedule"]["portions"] == [0.5, 1.0]

    read = read_checkpoint(checkpoint)
    assert read.layers is not None
    assert {layer.name for layer in read.layers} == records.keys()


def test_an_exported_checkpoint_predicts_the_same_in_a_fresh_process_without_lightning(tmp_path: Path) -> None:
    data = DigitsDataModule()
    module = Classifier(SmallCNN(), num_classes=10, lr=0.05)
    callback = INQCallback(5, schedule={0: 0.5, 1: 1.0})
    fit = trainer(callback, max_epochs=2)
    fit.fit(module, data)
    fit.save_checkpoint(tmp_path / "digits.ckpt")
    export([str(tmp_path / "digits.ckpt"), str(tmp_path / "digits.safetensors")])
    data.setup("test")
    images = torch.cat([batch[0] for batch in data.test_dataloader()])
    torch.save(images, tmp_path / "images.pt")
    with torch.no_grad():
        expected = module.eval().net(images)
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("pytorch_lightning", "lightning", "lightning_fabric", "hydra", "torchmetrics"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Block())
import torch
from inq_lightning import load_packed
from inq_lightning.recipes.models import SmallCNN
network = load_packed("digits.safetensors", SmallCNN()).eval()
with torch.no_grad():
    torch.save(network(torch.load("images.pt")), "outputs.pt")
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    outputs = torch.load(tmp_path / "outputs.pt")
    assert len(images) > 300
    assert torch.equal(outputs.argmax(1), expected.argmax(1))


class Weights(nn.Module):
    """The weights of ResNet-18, normal and rounded to the grid."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        for i, shape in enumerate(RESNET18):
            layer = nn.Conv2d(shape[1], shape[0], shape[2], bias=False) if len(shape) == 4 else nn.Linear(*shape[::-1])
            self.add_module(f"layer{i // 4}{'abcd'[i % 4]}_conv", layer)
        quantized(self, bits)


@pytest.mark.parametrize("bits", [2, 5, pytest.param(8, marks=pytest.mark.slow)])
def test_a_packed_resnet18_takes_its_bits_and_an_entropy_coded_one_its_entropy(tmp_path: Path, bits: int) -> None:
    net, path = Weights(bits), tmp_path / "network.safetensors"
    packed = save_packed(net, path)
    assert packed.bits_per_weight <= bits + 0.05
    assert path.stat().st_size == packed.bytes_after
    compressed = save_packed(net, path, entropy_coded=True)
    sizes = 0.0
    for p in (p for p in net.parameters() if p.dim() > 1):
        shares = p.unique(return_counts=True)[1].double() / p.numel()
        sizes += 1.03 * float(-(shares * shares.log2()).sum()) * p.numel() / 8 + 1024
    assert compressed.bits_per_weight * compressed.weights / 8 <= sizes
    assert_same(read_packed(path).state_dict, net.state_dict())


def test_a_network_that_is_not_fully_quantized_is_refused_unless_asked_for(tmp_path: Path) -> None:
    net, path = small(), tmp_path / "network.safetensors"
    quantized(net[0])
    with pytest.raises(ValueError, match=r"not fully quantized: 3\.weight is not on a grid"):
        save_packed(net, path)
    assert list(tmp_path.iterdir()) == []
    assert save_packed(net, path, allow_partial=True).off_grid == ["3.weight"]
    assert read_packed(path).metadata["off_grid"] == ["3.weight"]
    assert_same(load_packed(path, small()).state_dict(), net.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_tensors_are_narrowed_on_request_and_the_error_is_told(tmp_path: Path, dtype: torch.dtype) -> None:
    net, path = quantized(small()), tmp_path / "network.safetensors"
    saved = save_packed(net, path, float_dtype=dtype)
    loaded, original = load_packed(path, small()).state_dict(), net.state_dict()
    errors = [float((loaded[name].double() - original[name].double()).abs().max()) for name in original]
    assert saved.float_error == max(errors) > 0
    assert torch.equal(loaded["0.weight"], original["0.weight"])
    assert torch.equal(loaded["3.bias"], original["3.bias"].to(dtype).float())
    assert loaded["1.num_batches_tracked"].dtype == torch.int64
    net[1].running_var.fill_(torch.finfo(torch.float32).max)
    with pytest.raises(ValueError, match=rf"1\.running_var holds values beyond {dtype}"):
        save_packed(net, tmp_path / "other.safetensors", float_dtype=dtype)
    assert not (tmp_path / "other.safetensors").exists()
    with pytest.raises(ValueError, match="float_dtype must be"):
        save_packed(net, path, float_dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_networks_of_other_dtypes_and_memory_formats_come_back(tmp_path: Path, dtype: torch.dtype) -> None:
    net, path = quantized(small().to(dtype)).to(memory_format=torch.channels_last), tmp_path / "network.safetensors"
    save_packed(net, path)
    target = small().to(dtype).to(memory_format=torch.channels_last)
    assert_same(load_packed(path, target).state_dict(), net.state_dict())
    assert target[0].weight.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(ArtifactError, match=r"0\.weight is .* in the file, float32\[8, 3, 3, 3\] in the network"):
        load_packed(path, small())


def test_compiled_modules_save_and_load_under_plain_names(tmp_path: Path) -> None:
    net, path = quantized(small()), tmp_path / "network.safetensors"
    save_packed(torch.compile(net), path)
    assert "0.weight" in read_packed(path).state_dict
    target = small()
    load_packed(path, torch.compile(target))
    assert_same(target.state_dict(), net.state_dict())
    nested = small()
    nested[0] = torch.compile(nested[0])
    load_packed(path, nested)
    assert torch.equal(nested[0]._orig_mod.weight, net[0].weight)


def test_layers_of_zeros_scalars_and_empty_tensors_come_back(tmp_path: Path) -> None:
    net = nn.Linear(3, 3)
    nn.init.zeros_(net.weight)
    net.register_buffer("scalar", torch.tensor(2.5))
    net.register_buffer("none", torch.empty(0, 3))
    net.register_buffer("other", torch.empty(0, 3))
    net.register_buffer("mask", torch.tensor([True, False]))
    net.register_buffer("row", net.bias.detach()[1:])
    save_packed(net, tmp_path / "network.safetensors")
    artifact = read_packed(tmp_path / "network.safetensors")
    assert_same(artifact.state_dict, net.state_dict())
    assert artifact.layers[0].n1 is None


@pytest.mark.parametrize("as_parameter", [False, True])
def test_tensors_of_every_type_come_back(tmp_path: Path, as_parameter: bool) -> None:
    net, target = quantized(nn.Linear(3, 3)), nn.Linear(3, 3)
    for name, dtype in STORED.items():
        value = torch.tensor([[0, 1, 1]]).to(torch.float32).to(dtype)
        for network, tensor in ((net, value), (target, torch.empty_like(value))):
            if as_parameter:
                network.register_parameter(f"as_{name}", nn.Parameter(tensor, requires_grad=False))
            else:
                network.register_buffer(f"as_{name}", tensor)
    assert {"complex128", "complex64", "float8_e4m3fn", "float8_e8m0fnu", "int64", "bool"} <= STORED.keys()
    save_packed(net, tmp_path / "network.safetensors")
    load_packed(tmp_path / "network.safetensors", target)
    for state in (read_packed(tmp_path / "network.safetensors").state_dict, target.state_dict()):
        for name, value in net.state_dict().items():
            assert (state[name].dtype, state[name].shape) == (value.dtype, value.shape)
            assert torch.equal(as_bytes(state[name]), as_bytes(value)), name


def test_complex_numbers_that_torch_keeps_conjugated_come_back(tmp_path: Path) -> None:
    net = quantized(nn.Linear(3, 3))
    net.register_buffer("phase", torch.tensor([1 + 2j, 3 - 1j]).conj())
    save_packed(net, tmp_path / "network.safetensors")
    assert read_packed(tmp_path / "network.safetensors").state_dict["phase"].tolist() == [1 - 2j, 3 + 1j]


class Extra(nn.Linear):
    """A linear layer with extra state."""

    extra: Any = None

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


@pytest.mark.parametrize(
    "extra",
    [
        None,
        3,
        float("inf"),
        "text",
        {"scale": 0.5, 7: (1, [None, True])},
        b"\x00\xff",
        {"history": torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16), "empty": torch.zeros(0, 3)},
    ],
)
def test_extra_state_comes_back(tmp_path: Path, extra: Any) -> None:
    net, target = quantized(nn.Sequential(Extra(3, 3))), nn.Sequential(Extra(3, 3))
    net[0].extra = extra
    save_packed(net, tmp_path / "network.safetensors")
    load_packed(tmp_path / "network.safetensors", target)
    assert repr(target[0].extra) == repr(extra)
    torch.save(net.state_dict(), tmp_path / "network.pt")
    export([str(tmp_path / "network.pt"), str(tmp_path / "exported.safetensors")])
    assert repr(read_packed(tmp_path / "exported.safetensors").extra_state["0._extra_state"]) == repr(extra)


def test_what_cannot_be_stored_is_refused_by_name_and_with_a_remedy(tmp_path: Path) -> None:
    net = quantized(Extra(2, 2))
    for extra, message in (
        (object(), "_extra_state holds a object.*Let get_extra_state return such"),
        ([torch.zeros(1 << 19)], "_extra_state holds a tensor of torch.float32.*register a buffer"),
    ):
        net.extra = extra
        with pytest.raises(ValueError, match=message):
            save_packed(net, tmp_path / "network.safetensors")
    for value, message in (
        (torch.zeros(2, 2).to_sparse(), r"other is a Tensor \(torch.sparse_coo.*make sparse ones dense"),
        (torch.zeros(2, device="meta"), "other is a Tensor .*on meta"),
        (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), r"other is torch\.qint8.*dequantize"),
        (torch.empty(2, dtype=torch.uint4), r"other is torch\.uint4; the file holds .*keep its bytes as uint8"),
    ):
        net = quantized(nn.Linear(2, 2))
        net.register_buffer("other", value)
        with pytest.raises(ValueError, match=message):
            save_packed(net, tmp_path / "network.safetensors")
    assert list(tmp_path.iterdir()) == []


class Renames(nn.Module):
    """A module whose state_dict has names of its own."""

    def __init__(self, copies: bool = False) -> None:
        super().__init__()
        self.net, self.copies = small(), copies

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = {f"backbone.{name}": value for name, value in super().state_dict(*args, **kwargs).items()}
        return {name: value.clone() for name, value in state.items()} if self.copies else state

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        return super().load_state_dict({k.removeprefix("backbone."): v for k, v in state_dict.items()}, *args, **kwargs)


def test_a_state_dict_that_renames_its_keys_is_packed_by_what_it_holds(tmp_path: Path) -> None:
    net, target = quantized(Renames()), Renames()
    saved = save_packed(net, tmp_path / "network.safetensors")
    assert saved.weights == 3 * 8 * 9 + 32 * 4
    file = read_packed(tmp_path / "network.safetensors")
    assert [layer.name for layer in file.layers or ()] == ["backbone.net.0.weight", "backbone.net.3.weight"]
    assert_same(load_packed(tmp_path / "network.safetensors", target).state_dict(), net.state_dict())
    with pytest.raises(ValueError, match=r"state_dict\(\) does not hold net\.0\.weight, which is on a grid"):
        save_packed(quantized(Renames(copies=True)), tmp_path / "copies.safetensors")


def test_a_state_dict_that_puts_other_weights_in_their_place_is_refused(tmp_path: Path) -> None:
    net = quantized(nn.Linear(3, 3))
    average = torch.randn(3, 3)
    net.register_state_dict_post_hook(lambda module, state, prefix, _: state.update({f"{prefix}weight": average}))
    with pytest.raises(ValueError, match=r"does not hold weight, which is on a grid"):
        save_packed(net, tmp_path / "network.safetensors")


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, nn.utils.weight_norm, nn.utils.spectral_norm])
def test_a_norm_of_weights_that_was_left_out_comes_back(tmp_path: Path, norm: Any) -> None:
    torch.manual_seed(0)
    module = Module(nn.Sequential(nn.Linear(64, 16), norm(nn.Linear(16, 11))))
    callback = INQCallback(4, schedule={0: 0.5, 1: 1.0}, exclude=["net.1*"])
    fit = trainer(callback, max_epochs=2)
    fit.fit(module)
    fit.save_checkpoint(tmp_path / "trained.ckpt")
    module.eval()
    target = Module(nn.Sequential(nn.Linear(64, 16), norm(nn.Linear(16, 11)))).eval()
    save_packed(module, tmp_path / "a.safetensors", layers=callback.layers)
    save_packed(module, tmp_path / "b.safetensors")
    save_packed(module.state_dict(), tmp_path / "c.safetensors")
    export([str(tmp_path / "trained.ckpt"), str(tmp_path / "d.safetensors")])
    for name in "abcd":
        load_packed(tmp_path / f"{name}.safetensors", target)
        assert_same(target.state_dict(), module.state_dict())


@pytest.mark.parametrize("entropy_coded", [False, True])
def test_layers_without_weights_come_back(tmp_path: Path, entropy_coded: bool) -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 0), nn.Conv2d(0, 2, 3), nn.Embedding(0, 3))

    saved = save_packed(quantized(net()), tmp_path / "network.safetensors", entropy_coded=entropy_coded)
    assert saved.weights == 16
    load_packed(tmp_path / "network.safetensors", net())


def test_a_state_dict_is_saved_as_its_network_is(tmp_path: Path) -> None:
    net = quantized(small())
    assert save_packed(net, tmp_path / "a") == save_packed(net.state_dict(), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_same_network_gives_the_same_file_with_usual_permissions(tmp_path: Path) -> None:
    net = quantized(small())
    for name in "ab":
        save_packed(net, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    (tmp_path / "usual").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_nothing_is_left_behind_where_writing_fails(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        save_packed(quantized(small()), tmp_path / "folder")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
    with pytest.raises(OSError, match="missing"):
        save_packed(quantized(small()), tmp_path / "missing" / "network.safetensors")
    with pytest.raises(OSError, match="nowhere"):
        read_packed(tmp_path / "nowhere.safetensors")


def other_shape() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 5))


def longer() -> nn.Module:
    return nn.Sequential(*small(), nn.Linear(4, 4))


def shorter() -> nn.Module:
    return small()[:3]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (other_shape, r"3\.weight is float32\[4, 32\] in the file, float32\[5, 32\] in the network"),
        (longer, r"4\.weight is in the network, not in the file"),
        (shorter, r"3\.weight is in the file, not in the network"),
        (lambda: small().to("meta"), r"has no memory in the network; call its to_empty"),
    ],
)
def test_another_network_is_refused_and_stays_as_it_was(
    tmp_path: Path, build: Callable[[], nn.Module], message: str
) -> None:
    save_packed(quantized(small()), tmp_path / "network.safetensors")
    target = build()
    before = {name: t.clone() for name, t in target.state_dict().items()}
    with pytest.raises(ArtifactError, match=message):
        load_packed(tmp_path / "network.safetensors", target)
    if not target[0].weight.is_meta:
        assert_same(target.state_dict(), before)


def test_weights_that_are_tied_only_in_the_network_are_refused(tmp_path: Path) -> None:
    net = quantized(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    save_packed(net, tmp_path / "network.safetensors")
    target = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    target[1].weight = target[0].weight
    with pytest.raises(ArtifactError, match=r"1\.weight and 0\.weight are tied in the network, not in the file"):
        load_packed(tmp_path / "network.safetensors", target)


def test_another_version_and_other_safetensors_files_are_refused_by_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "network.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(ArtifactError, match="not one of save_packed"):
        read_packed(path)
    safetensors.torch.save_file({"a": torch.zeros(2)}, path, {"inq_lightning": json.dumps({"version": 3})})
    with pytest.raises(ArtifactError, match="format version 3, this release reads versions 1 and 2"):
        read_packed(path)
    path.write_bytes(b"")
    with pytest.raises(ArtifactError, match="damaged"):
        read_packed(path)


def test_a_schedule_and_the_sizes_are_told(tmp_path: Path) -> None:
    net = quantized(small())
    saved = save_packed(net, tmp_path / "a.safetensors", schedule=Schedule([0.5, 1.0]))
    assert saved.bytes_before == sum(t.numel() * t.element_size() for t in net.state_dict().values())
    assert saved.weights == 3 * 8 * 9 + 32 * 4
    assert read_packed(tmp_path / "a.safetensors").metadata["schedule"]["portions"] == [0.5, 1.0]
    with pytest.raises(ValueError, match="no matrix of weights"):
        save_packed(nn.BatchNorm1d(3), tmp_path / "b.safetensors", layers=[])
