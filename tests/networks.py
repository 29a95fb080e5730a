"""Random quantized networks of every operation that whole numbers can follow."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from inq_lightning import PowerOfTwoGrid, calibrate_activations, quantize_activations
from inq_lightning.core.frozen import fit_levels


class Residual(nn.Module):
    """A block beside a shortcut, which may be sliced and padded as in ResNetCIFAR."""

    def __init__(self, block: nn.Module, relu: bool, channels: int = 0, stride: int = 1) -> None:
        super().__init__()
        self.block = block
        self.relu = nn.ReLU() if relu else nn.Identity()
        self.channels, self.stride = channels, stride

    def forward(self, x: Tensor) -> Tensor:
        shortcut = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.channels))
        output: Tensor = self.relu(self.block(x) + shortcut)
        return output


class Branches(nn.Module):
    """Two branches joined in the dimension of the channels."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


def quantized(net: nn.Module, images: Tensor, bits: int, levels: Any = "auto", activation_bits: int = 8) -> nn.Module:
    """Round all weights to the nearest levels, and activations as they fall."""
    with torch.no_grad():
        for parameter in (m.weight for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))):
            grid = PowerOfTwoGrid.from_weights(
                parameter, bits, exponent="auto", family=fit_levels(parameter, bits, levels)
            )
            parameter.copy_(grid.quantize(parameter))
    quantize_activations(net, activation_bits)
    calibrate_activations(net, [images])
    return net.eval()


@st.composite
def networks(draw: Any) -> tuple[nn.Module, Tensor]:
    """A network of random layers with random weights, norms and widths, and images for it."""
    torch.manual_seed(draw(st.integers(0, 1 << 20)))
    channels, size = draw(st.integers(1, 3)), draw(st.integers(5, 9))
    images = torch.randn(4, channels, size, draw(st.integers(5, 9))) * draw(st.sampled_from([0.01, 1.0, 30.0]))
    layers: list[nn.Module] = []
    net, x = nn.Sequential(), images

    def try_out(layer: nn.Module) -> None:
        nonlocal x
        try:
            with torch.no_grad():
                result = layer.eval()(x)
        except RuntimeError:  # a window larger than what is left of the images
            return
        if result.numel() and all(result.shape):
            layers.append(layer)
            x = result

    def convolution(inputs: int, keeps: bool = False) -> nn.Conv2d:
        groups = draw(st.sampled_from([1, inputs]))
        outputs = inputs if keeps else groups * draw(st.integers(1, 3))
        kernel = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
        if keeps:
            return nn.Conv2d(inputs, outputs, kernel, padding="same", groups=groups, bias=draw(st.booleans()))
        stride, padding, dilation = draw(st.integers(1, 2)), draw(st.integers(0, 2)), draw(st.integers(1, 2))
        return nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias=draw(st.booleans()))

    def norm(features: int, kind: type[nn.Module]) -> nn.Module:
        made: Any = kind(features)
        with torch.no_grad():
            made.running_mean.copy_(torch.randn(features))
            made.running_var.copy_(torch.rand(features) * draw(st.sampled_from([0.1, 1.0, 10.0])) + 1e-3)
            made.weight.copy_(torch.randn(features))  # negative ones, too
            made.weight[torch.rand(features) < 0.1] = 0
            made.bias.copy_(torch.randn(features))
        return made

    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["conv", "conv", "max", "average", "residual", "branches", "norm"]))
        if kind == "conv":
            try_out(convolution(x.shape[1]))
            if draw(st.booleans()):
                try_out(norm(x.shape[1], nn.BatchNorm2d))
            try_out(draw(st.sampled_from([nn.ReLU(), nn.ReLU6(), nn.Identity(), nn.Dropout(0.5)])))
        elif kind == "max" and min(x.shape[2:]) > 2:
            padding = draw(st.integers(0, 1))
            try_out(nn.MaxPool2d(draw(st.integers(2, 3)), draw(st.integers(1, 2)), padding, draw(st.integers(1, 2))))
        elif kind == "average" and min(x.shape[2:]) > 2:
            try_out(nn.AvgPool2d(draw(st.integers(2, 3)), draw(st.integers(1, 2)), draw(st.integers(0, 1))))
        elif kind == "residual":
            grows, stride = draw(st.integers(0, 2)), draw(st.integers(1, 2))
            inputs = x.shape[1]
            inner = nn.Sequential(
                nn.Conv2d(inputs, inputs + grows, 3, stride, 1, bias=False), norm(inputs + grows, nn.BatchNorm2d)
            )
            try_out(Residual(inner, draw(st.booleans()), grows, stride))
        elif kind == "branches":
            pair = (nn.Sequential(convolution(x.shape[1], keeps=True), nn.ReLU()) for _ in range(2))
            try_out(Branches(*pair))
        elif kind == "norm":
            try_out(nn.Sequential(norm(x.shape[1], nn.BatchNorm2d), nn.ReLU()))
    if draw(st.booleans()):
        try_out(nn.AdaptiveAvgPool2d(1))
    try_out(nn.Flatten())
    if draw(st.booleans()):
        hidden = draw(st.integers(2, 5))
        try_out(nn.Linear(x.shape[1], hidden))
        if draw(st.booleans()):
            try_out(norm(hidden, nn.BatchNorm1d))
        try_out(nn.ReLU())
    try_out(nn.Linear(x.shape[1], draw(st.integers(1, 4))))
    net.extend(layers)
    if draw(st.integers(0, 9)) == 0:
        nn.init.zeros_(next(m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))).weight)
    bits = draw(st.integers(2, 8))
    return quantized(net, images, bits, activation_bits=draw(st.integers(2, 8))), images
