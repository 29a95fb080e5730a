from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import nn

from inq_lightning._common import LazyExtra, import_extra
from inq_lightning.recipes.models import (
    BasicBlock,
    LeNet5,
    ResNetCIFAR,
    SmallCNN,
    timm_model,
    torchvision_model,
)


@pytest.mark.parametrize(("depth", "parameters"), [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018)])
def test_resnet_has_the_papers_number_of_parameters(depth: int, parameters: int) -> None:
    assert sum(parameter.numel() for parameter in ResNetCIFAR(depth).parameters()) == parameters


@pytest.mark.parametrize("depth", [20, 32, 44, 56])
def test_resnet_depth_counts_its_weighted_layers(depth: int) -> None:
    layers = [module for module in ResNetCIFAR(depth).modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(layers) == depth


@pytest.mark.parametrize("depth", [-4, 2, 18, 21, 49])
def test_resnet_rejects_other_depths(depth: int) -> None:
    with pytest.raises(ValueError, match=f"6n \\+ 2.*got {depth}"):
        ResNetCIFAR(depth)


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (SmallCNN(), (1, 8, 8)),
        (SmallCNN(3, 10, 30), (3, 30, 30)),
        (SmallCNN(1, 10, 4), (1, 4, 4)),
        (LeNet5(1, 10, 28), (1, 28, 28)),
        (LeNet5(3, 10, 33), (3, 33, 33)),
        (LeNet5(1, 10, 12), (1, 12, 12)),
        (ResNetCIFAR(20), (3, 32, 32)),
        (ResNetCIFAR(20, in_channels=1), (1, 17, 17)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_networks_map_images_to_logits(network: nn.Module, shape: tuple[int, ...]) -> None:
    logits = network(torch.randn(2, *shape))
    assert logits.shape == (2, 10)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_lenet_has_the_papers_flat_features() -> None:
    assert LeNet5(1, 10, 28).classifier[0].in_features == 400


def test_networks_reject_images_too_small_for_their_pooling() -> None:
    with pytest.raises(ValueError, match="at least 4; got 3"):
        SmallCNN(image_size=3)
    with pytest.raises(ValueError, match="at least 12; got 11"):
        LeNet5(1, 10, 11)


def test_a_shortcut_that_changes_shape_has_no_parameters_and_pads_with_zeros() -> None:
    block = BasicBlock(2, 5, stride=2).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.rand(1, 2, 5, 5)
    y = block(x)
    assert torch.equal(y[:, :2], x[:, :, ::2, ::2])
    assert torch.equal(y[:, 2:], torch.zeros(1, 3, 3, 3))


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed")
def test_missing_torchvision_names_the_extra() -> None:
    with pytest.raises(ImportError, match=r"torchvision.*not installed.*the extra vision, pip install"):
        torchvision_model("resnet18", 10)


@pytest.mark.skipif(find_spec("timm") is not None, reason="timm is installed")
def test_missing_timm_names_the_extra() -> None:
    with pytest.raises(ImportError, match=r"timm.*not installed.*the extra vision, pip install"):
        timm_model("resnet18", 10, 3)


@pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed")
def test_torchvision_builds_a_model_and_names_near_matches() -> None:
    assert torchvision_model("resnet18", 7)(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    with pytest.raises(ValueError, match=r"did you mean.*resnet18"):
        torchvision_model("resnet81", 10)
    with pytest.raises(ValueError, match=r"did you mean.*IMAGENET1K_V1"):
        torchvision_model("resnet18", 1000, weights="IMAGENET_V1")
    with pytest.raises(ValueError, match="have 1000 classes, not num_classes=10"):
        torchvision_model("resnet18", 10, weights="DEFAULT")


@pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed")
def test_timm_builds_a_model_and_names_near_matches() -> None:
    assert timm_model("resnet18.a1_in1k", 7, 1)(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    with pytest.raises(ValueError, match=r"did you mean.*resnet18"):
        timm_model("resnet81", 10, 3)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("raise RuntimeError('operator broken::nms does not exist')", "fails to import.*nms does not exist.*torch"),
        ("import surely_missing_dependency", "needs surely_missing_dependency, which is not"),
    ],
)
def test_a_broken_installation_is_told_from_a_missing_one(
    source: str, message: str, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_package.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=rf"broken_package is installed but {message}.*the extra vision, pip install"):
        import_extra("broken_package", "vision")


def test_a_module_of_an_extra_is_asked_for_where_it_is_used() -> None:
    assert LazyExtra("json", "export").loads("[1]") == [1]
    missing = LazyExtra("surely_missing_package", "export")
    with pytest.raises(ImportError, match=r"surely_missing_package is needed here.*the extra export, pip install"):
        _ = missing.anything
