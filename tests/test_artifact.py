from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pytorch_lightning import Trainer
from torch import Tensor, nn

from inq_lightning import INQCallback, PowerOfTwoGrid, load_packed, save_packed, select_parameters
from inq_lightning.cli.export import main as export
from inq_lightning.data import DigitsDataModule
from inq_lightning.export.artifact import ArtifactError, read_packed
from inq_lightning.models import SmallCNN

SETTINGS = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Everything(nn.Module):
    """Every kind of layer in the selection."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                *(nn.Linear(5, 7), nn.Bilinear(3, 4, 5), nn.Conv1d(3, 4, 3), nn.Conv2d(4, 6, 3, groups=2)),
                *(nn.Conv3d(2, 3, 2), nn.ConvTranspose1d(3, 2, 3), nn.ConvTranspose2d(3, 4, 2)),
                *(nn.ConvTranspose3d(2, 2, 2), nn.MultiheadAttention(8, 2), nn.LSTM(4, 5, 2), nn.GRU(3, 4)),
                *(nn.RNN(3, 3), nn.LSTMCell(3, 4), nn.GRUCell(4, 3), nn.Embedding(9, 4), nn.BatchNorm2d(6)),
            ]
        )


def quantized(bits: int, dtype: torch.dtype = torch.float32) -> Everything:
    torch.manual_seed(bits)
    network = Everything().to(dtype)
    for selected in select_parameters(network, bits, embeddings=True):
        weight = selected.parameter.data
        weight.copy_(PowerOfTwoGrid.from_weights(weight, bits).quantize(weight))
    return network


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


@pytest.mark.parametrize("entropy_coded", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_layer_comes_back_bit_for_bit(bits: int, entropy_coded: bool, tmp_path: Path) -> None:
    network, path = quantized(bits), tmp_path / "net.safetensors"
    saved = save_packed(network, path, entropy_coded=entropy_coded)
    assert saved.off_grid == []
    assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]
    fresh = Everything()
    assert load_packed(path, fresh) is fresh
    assert same(fresh, network)
    assert {layer.bits for layer in read_packed(path).layers} <= set(range(2, bits + 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_types_come_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    network = quantized(4, dtype)
    save_packed(network, tmp_path / "net.safetensors")
    assert same(load_packed(tmp_path / "net.safetensors", Everything().to(dtype)), network)


def test_narrower_floats_leave_the_weights_alone_and_tell_the_largest_error(tmp_path: Path) -> None:
    network = quantized(5)
    saved = save_packed(network, tmp_path / "net.safetensors", float_dtype=torch.bfloat16)
    loaded = load_packed(tmp_path / "net.safetensors", Everything()).state_dict()
    errors = {name: float((value - loaded[name]).abs().max()) for name, value in network.state_dict().items()}
    assert 0 < saved.float_error == max(errors.values())
    assert all(errors[s.name] == 0 for s in select_parameters(network, 5, embeddings=True))


def test_a_network_that_is_not_fully_quantized_is_refused_by_the_names_of_its_layers(tmp_path: Path) -> None:
    network, path = quantized(5), tmp_path / "net.safetensors"
    network.layers[0].weight.data[0, 0] = 0.3  # type: ignore[index, union-attr]
    with pytest.raises(ValueError, match=r"layers\.0\.weight"):
        save_packed(network, path)
    assert not path.exists()
    assert save_packed(network, path, allow_partial=True).off_grid == ["layers.0.weight"]
    assert same(load_packed(path, Everything()), network)


def test_a_file_of_another_network_is_refused_and_the_network_stays_as_it_was(tmp_path: Path) -> None:
    save_packed(quantized(5), tmp_path / "net.safetensors")
    other = SmallCNN()
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ArtifactError, match="does not fit the network"):
        load_packed(tmp_path / "net.safetensors", other)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    def build() -> nn.Sequential:
        network = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        network[1].weight = network[0].weight
        return network

    network = build()
    network[0].weight.data = PowerOfTwoGrid.from_weights(network[0].weight.data, 4).quantize(network[0].weight.data)
    save_packed(network, tmp_path / "net.safetensors")
    loaded = load_packed(tmp_path / "net.safetensors", build())
    assert same(loaded, network)
    assert loaded[0].weight is loaded[1].weight  # type: ignore[index]
    assert len(read_packed(tmp_path / "net.safetensors").layers) == 1


def test_codes_and_metadata_of_a_network_like_resnet18_take_little_more_than_their_bits(tmp_path: Path) -> None:
    network = nn.Sequential(*(nn.Conv2d(512, 512, 3, bias=False) for _ in range(4)), nn.Linear(512, 1000))
    for bits in (2, 5):
        for selected in select_parameters(network, bits):
            weight = selected.parameter.data.normal_()
            weight.copy_(PowerOfTwoGrid.from_weights(weight, bits, exponent="mse").quantize(weight))
        assert bits <= save_packed(network, tmp_path / "net.safetensors").bits_per_weight <= bits + 0.05


PLAIN_PROCESS = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("pytorch_lightning", "lightning", "torchmetrics"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import torch
from inq_lightning import load_packed
from inq_lightning.models import SmallCNN
images = torch.load(sys.argv[2], weights_only=True)
with torch.inference_mode():
    torch.save(load_packed(sys.argv[1], SmallCNN()).eval()(images).argmax(1), sys.argv[3])
"""


def test_a_checkpoint_becomes_an_artifact_that_predicts_the_same_in_a_process_without_lightning(tmp_path: Path) -> None:
    from inq_lightning.classifier import Classifier

    data = DigitsDataModule()
    module, callback = Classifier(SmallCNN(), 10, lr=0.05), INQCallback(bits=5)
    trainer = Trainer(max_epochs=4, callbacks=[callback], **SETTINGS)  # type: ignore[arg-type]
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "net.ckpt")
    export([str(tmp_path / "net.ckpt"), str(tmp_path / "net.safetensors")])
    assert {layer.bits for layer in read_packed(tmp_path / "net.safetensors").layers} == {5}

    images = torch.cat([images for images, _ in data.test_dataloader()])
    torch.save(images, tmp_path / "images.pt")
    files = [str(tmp_path / name) for name in ("net.safetensors", "images.pt", "predictions.pt")]
    subprocess.run([sys.executable, "-c", PLAIN_PROCESS, *files], check=True, cwd=Path(__file__).parents[1])
    predictions: Tensor = torch.load(tmp_path / "predictions.pt", weights_only=True)
    with torch.inference_mode():
        assert torch.equal(predictions, module.eval()(images).argmax(1))
