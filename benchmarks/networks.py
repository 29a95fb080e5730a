"""The networks whose files are measured, with the published shapes and numbers of parameters."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """A residual block: convolutions of the given channels and sizes, and a shortcut where the shape changes."""

    def __init__(self, channels: Sequence[int], sizes: Sequence[int], stride: int) -> None:
        super().__init__()
        strided = sizes.index(3)  # the first 3×3
        layers = [
            conv_bn(i, o, size, stride if place == strided else 1)
            for place, ((i, o), size) in enumerate(zip(itertools.pairwise(channels), sizes, strict=True))
        ]
        self.body = nn.Sequential(*itertools.chain(*([layer, nn.ReLU()] for layer in layers)))[:-1]
        same = stride == 1 and channels[0] == channels[-1]
        self.shortcut = nn.Identity() if same else conv_bn(channels[0], channels[-1], 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.body(x) + self.shortcut(x))


def conv_bn(in_channels: int, out_channels: int, size: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, out_channels, size, stride, size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels))


def resnet(counts: Sequence[int], bottleneck: bool) -> nn.Module:
    """He et al. 2016, "Deep residual learning", table 1, with the shortcuts of option B."""
    layers: list[nn.Module] = [conv_bn(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for stage, blocks in enumerate(counts):
        width = 64 << stage
        inner, sizes = ([width, width, 4 * width], [1, 3, 1]) if bottleneck else ([width, width], [3, 3])
        for block in range(blocks):
            layers.append(Block([channels, *inner], sizes, 2 if stage and not block else 1))
            channels = inner[-1]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000))


def vgg16() -> nn.Module:
    """Simonyan and Zisserman 2015, configuration D."""
    layers: list[nn.Module] = []
    channels = 3
    for width, convolutions in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(convolutions):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    layers += [nn.Flatten(), nn.Linear(512 * 49, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(4096, 1000))


class ViTB16(nn.Module):
    """Dosovitskiy et al. 2021, ViT-B/16 for images of 224×224."""

    def __init__(self) -> None:
        super().__init__()
        self.class_token = nn.Parameter(torch.zeros(1, 1, 768))
        self.positions = nn.Parameter(torch.zeros(1, 197, 768))
        self.patches = nn.Conv2d(3, 768, 16, 16)
        layers = [
            nn.TransformerEncoderLayer(768, 12, 3072, 0, "gelu", batch_first=True, norm_first=True) for _ in range(12)
        ]
        self.blocks = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(768)
        self.head = nn.Linear(768, 1000)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images).flatten(2).mT
        tokens = torch.cat([self.class_token.expand(len(images), -1, -1), patches], 1) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(tokens))[:, 0])
        return logits


class LLMLayer(nn.Module):
    """The linear layers of one decoder layer as wide as LLaMA-7B's: q, k, v, o, and the three of its MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(4096, 4096, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(4096, 11008, bias=False) for _ in range(2))
        self.down = nn.Linear(11008, 4096, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (32, 128)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        out: Tensor = x + self.down(functional.silu(self.gate(x)) * self.up(x))
        return out


class Network(NamedTuple):
    make: Callable[[], nn.Module]
    parameters: int  # as published
    input: tuple[int, ...]  # shape of an example, without the batch


NETWORKS = {
    "ResNet-18": Network(lambda: resnet([2, 2, 2, 2], bottleneck=False), 11_689_512, (3, 224, 224)),
    "ResNet-50": Network(lambda: resnet([3, 4, 6, 3], bottleneck=True), 25_557_032, (3, 224, 224)),
    "VGG-16": Network(vgg16, 138_357_544, (3, 224, 224)),
    "ViT-B/16": Network(ViTB16, 86_567_656, (3, 224, 224)),
    "LLM layer": Network(LLMLayer, 4 * 4096**2 + 3 * 4096 * 11008, (16, 4096)),
}


def build(network: str) -> nn.Module:
    """The network with uninitialized memory, which is not resident until something is written to it."""
    with torch.device("meta"):
        model = NETWORKS[network].make()
    return model.to_empty(device="cpu").eval()


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Normal weights that keep the size of activations; norms that change nothing."""
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if p.dim() > 1:
            p.normal_(0, (2 / p[0].numel()) ** 0.5)
        else:
            p.fill_(0 if name.endswith("bias") else 1)
    for name, buffer in model.named_buffers():
        buffer.fill_(1 if name.endswith("running_var") else 0)
