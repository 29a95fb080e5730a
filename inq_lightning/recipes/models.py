"""Networks for `inq-train`: small ones written here, and factories for torchvision and timm.

Every network maps images, float of shape (batch, in_channels, height, width), to logits, float of shape
(batch, num_classes).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from torch import Tensor, nn

from inq_lightning._common import import_extra


class SmallCNN(nn.Module):
    """Two 3x3 convolutions with batch normalization and pooling, a third one, and a linear classifier.

    The network of the demo: it learns 8x8 digits in seconds on a CPU.

    Args:
        in_channels: Channels of the images.
        num_classes: Number of classes.
        image_size: Height and width of the images, in pixels; at least 4.

    Raises:
        ValueError: `image_size` is below 4.
    """

    def __init__(self, in_channels: int = 1, num_classes: int = 10, image_size: int = 8) -> None:
        super().__init__()
        if image_size < 4:
            raise ValueError(f"SmallCNN halves the image twice, so image_size must be at least 4; got {image_size}")
        self.features = nn.Sequential(
            *_conv_bn_relu(in_channels, 16),
            nn.MaxPool2d(2),
            *_conv_bn_relu(16, 32),
            nn.MaxPool2d(2),
            *_conv_bn_relu(32, 64),
        )
        self.linear = nn.Linear(64 * (image_size // 4) ** 2, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Maps images (batch, in_channels, image_size, image_size) to logits (batch, num_classes)."""
        logits: Tensor = self.linear(self.features(images).flatten(1))
        return logits


def _conv_bn_relu(in_channels: int, out_channels: int) -> list[nn.Module]:
    convolution = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(out_channels), nn.ReLU()]


class LeNet5(nn.Module):
    """LeNet-5 (LeCun et al. 1998, "Gradient-based learning applied to document recognition"), as trained today.

    Layer sizes are the paper's; the activation is ReLU and the pooling takes the maximum. The first convolution pads
    by two, so that 28x28 images give the paper's 5x5 maps.

    Args:
        in_channels: Channels of the images.
        num_classes: Number of classes.
        image_size: Height and width of the images, in pixels; at least 12.

    Raises:
        ValueError: `image_size` is below 12.
    """

    def __init__(self, in_channels: int = 1, num_classes: int = 10, image_size: int = 28) -> None:
        super().__init__()
        if image_size < 12:
            raise ValueError(f"LeNet5 needs image_size of at least 12; got {image_size}. SmallCNN takes 4 and more")
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, 6, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Linear(16 * ((image_size // 2 - 4) // 2) ** 2, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Maps images (batch, in_channels, image_size, image_size) to logits (batch, num_classes)."""
        logits: Tensor = self.classifier(self.features(images).flatten(1))
        return logits


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a parameter-free shortcut (He et al. 2016, section 3.3, option A).

    Where the block changes the shape, the shortcut takes every `stride`-th pixel and appends channels of zeros.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output, at least `in_channels`.
        stride: Stride of the first convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        self.stride = stride
        self.new_channels = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, in_channels, h, w) to (batch, out_channels, ceil(h / stride), ceil(w / stride))."""
        residual = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        output: Tensor = self.relu2(residual + nn.functional.pad(shortcut, (0, 0, 0, 0, 0, self.new_channels)))
        return output


class ResNetCIFAR(nn.Module):
    """Residual network for small images (He et al. 2016, "Deep residual learning", section 4.2).

    Three stages of `(depth - 2) / 6` blocks with 16, 32 and 64 channels, global average pooling and a linear
    classifier. Weights start as He et al. 2015 (Kaiming normal). The paper reports depths 20, 32, 44, 56 and 110.

    Args:
        depth: Number of weighted layers, 6n + 2.
        in_channels: Channels of the images.
        num_classes: Number of classes.

    Raises:
        ValueError: `depth` is not 6n + 2.
    """

    def __init__(self, depth: int, in_channels: int = 3, num_classes: int = 10) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth must be 6n + 2, such as 20, 32, 44 or 56; got {depth}")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Maps images (batch, in_channels, height, width), any size, to logits (batch, num_classes)."""
        features = self.layer3(self.layer2(self.layer1(self.relu(self.bn1(self.conv1(images))))))
        logits: Tensor = self.linear(self.pool(features).flatten(1))
        return logits


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))


def torchvision_model(name: str, num_classes: int, weights: str | None = None) -> nn.Module:
    """Builds a classification network of torchvision.

    Args:
        name: Name in `torchvision.models.list_models()`, such as `resnet18`.
        num_classes: Number of classes.
        weights: Name of pretrained weights, such as `DEFAULT` or `IMAGENET1K_V1`; None starts at random.

    Returns:
        The network; its images have three channels.

    Raises:
        ImportError: torchvision is missing or broken.
        ValueError: The name or the weights are unknown, or the weights are for another number of classes.
    """
    models = import_extra("torchvision.models", "vision")
    _check_name("torchvision model", name, models.list_models(module=models))
    if weights is not None:
        pretrained = models.get_model_weights(name)
        _check_name(f"weights of torchvision's {name}", weights, pretrained.__members__)
        classes = len(pretrained[weights].meta["categories"])
        if classes != num_classes:
            raise ValueError(
                f"weights {weights!r} of torchvision's {name} have {classes} classes, not num_classes={num_classes}; "
                "use weights=None, or timm_model(..., pretrained=True), which fits a new classifier"
            )
    network: nn.Module = models.get_model(name, weights=weights, num_classes=num_classes)
    return network


def timm_model(name: str, num_classes: int, in_channels: int, pretrained: bool = False) -> nn.Module:
    """Builds a network of timm.

    Args:
        name: Name in `timm.list_models()`, such as `resnet18`, a tagged `resnet18.a1_in1k`, or a `hf-hub:` address.
        num_classes: Number of classes; timm puts a new classifier on pretrained weights of another number.
        in_channels: Channels of the images; timm adapts pretrained weights to them.
        pretrained: Whether to download pretrained weights.

    Returns:
        The network.

    Raises:
        ImportError: timm, or the torchvision it needs, is missing or broken.
        ValueError: The name is unknown.
    """
    timm = import_extra("timm", "vision")
    if ":" not in name:
        _check_name("timm model", name.split(".")[0], timm.list_models())
    network: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, in_chans=in_channels)
    return network


def _check_name(kind: str, name: str, known: Iterable[str]) -> None:
    names = sorted(known)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=5, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else f"there are {len(names)}, such as {', '.join(names[:5])}"
        raise ValueError(f"unknown {kind} {name!r}: {hint}")
