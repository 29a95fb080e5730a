"""Integer networks in ONNX Runtime: every logit, with its optimizations and without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from networks import Branches, networks, quantized
from torch import Tensor, nn

from inq_lightning import IntegerNetwork, export_integer_onnx, lower, save_packed
from inq_lightning.cli.export import main
from inq_lightning.recipes.models import ResNetCIFAR, SmallCNN

ort: Any = pytest.importorskip("onnxruntime")


def logits(path: Path, images: Tensor, optimized: bool) -> Tensor:
    options = ort.SessionOptions()
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"input": images.numpy()})[0])


def assert_equal(network: IntegerNetwork, path: Path, images: Tensor) -> None:
    export_integer_onnx(network, path)
    expected = (network.run(images).double() * 2.0**network.exponent).float()
    for optimized in (True, False):
        assert torch.equal(logits(path, images, optimized), expected), optimized


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(made=networks())
def test_random_networks_have_the_same_logits_or_are_refused_by_name(
    made: tuple[nn.Module, Tensor], tmp_path_factory: pytest.TempPathFactory
) -> None:
    net, images = made
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    try:
        network = lower(net, images)
        assert_equal(network, path, torch.cat([images, 100 * images]))
    except ValueError as error:
        refusals = ("would need", "does not hold", "8 bits do not hold", "different steps", "no linear layer")
        if not any(refusal in str(error) for refusal in refusals):
            raise
        assert not path.exists()


@pytest.mark.parametrize(("bits", "activation_bits"), [(4, 8), (3, 8), (2, 4)])
@pytest.mark.parametrize(
    ("make", "shape"), [(SmallCNN, (1, 8, 8)), (lambda: ResNetCIFAR(8), (3, 16, 16))], ids=["SmallCNN", "ResNetCIFAR"]
)
def test_the_packages_own_networks_have_the_same_logits(
    make: Callable[[], nn.Module], shape: tuple[int, ...], bits: int, activation_bits: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    images = torch.randn(64, *shape)
    net = make()
    net.train()(images)
    assert_equal(
        lower(quantized(net, images, bits, activation_bits=activation_bits), images), tmp_path / "net.onnx", images
    )


def test_what_8_bits_do_not_hold_is_refused_by_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.randn(8, 1, 8, 8)
    path = tmp_path / "net.onnx"
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    with pytest.raises(ValueError, match="0 has weights up to 128 times the smallest, which int8 does not hold"):
        export_integer_onnx(lower(quantized(net, images, 5), images), path)
    joined = nn.Sequential(
        Branches(nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU()), nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU())),
        *(nn.Flatten(), nn.Linear(256, 2)),
    )
    with torch.no_grad():
        joined[0].branches[0][0].weight.mul_(64)  # type: ignore[union-attr, index, operator]
    with pytest.raises(ValueError, match=r"cat in 0 (joins|has results)"):
        export_integer_onnx(lower(quantized(joined, images, 4), images), path)
    assert not path.exists()


def test_the_command_exports_what_an_artifact_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    images = torch.randn(8, 1, 8, 8)
    net = quantized(nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3)), images, 4)
    network = lower(net, images)
    artifact = tmp_path / "net.safetensors"
    save_packed(net, artifact, integer=network)
    main([str(artifact), str(tmp_path / "net.onnx"), "--format", "integer-onnx"])
    assert torch.equal(
        logits(tmp_path / "net.onnx", images, True), (network.run(images).double() * 2.0**network.exponent).float()
    )
    main([str(artifact), str(tmp_path / "firmware"), "--format", "c", "--layout", "lists"])
    assert (tmp_path / "firmware" / "inq_network.c").is_file()
    assert "a buffer of" in capsys.readouterr().out
    save_packed(net, artifact)
    for arguments, message in (
        (["x.onnx", "--format", "integer-onnx"], "holds no integer network"),
        (["x", "--format", "c", "--fixed-batch"], "--fixed-batch has no meaning for --format c"),
        (["x.onnx", "--format", "integer-onnx", "--layout", "lists"], "--layout has no meaning"),
    ):
        with pytest.raises(SystemExit) as ended:
            main([str(artifact), str(tmp_path / arguments[0]), *arguments[1:]])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


def test_a_layer_of_zeros_is_exported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.randn(8, 1, 8, 8)
    net = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(18, 2))
    nn.init.zeros_(net[0].weight)  # type: ignore[arg-type]
    assert_equal(lower(quantized(net, images, 4), images), tmp_path / "net.onnx", images)
