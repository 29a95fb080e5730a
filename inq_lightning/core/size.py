"""How much weights take, and what rounding them costs: plain functions, which metrics and reports share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from inq_lightning.core.layer import plain_name


class Size(NamedTuple):
    """What some weights take.

    Attributes:
        bits: All of them together, in bits.
        weights: How many they are.
    """

    bits: int
    weights: int

    @property
    def bytes(self) -> int:
        """All of them together, in whole bytes."""
        return bytes_at(self.bits, 1)


def size_of(module: nn.Module, widths: Mapping[str, int] | None = None) -> Size:
    """Measure the parameters of a module, tied ones once.

    Args:
        module: The module.
        widths: Bits a weight of those that are quantized, by name; all others take what their dtype does.
    """
    parameters = {plain_name(name): p.detach() for name, p in module.named_parameters()}
    bits = sum(bits_of(parameter, (widths or {}).get(name)) for name, parameter in parameters.items())
    return Size(bits, sum(parameter.numel() for parameter in parameters.values()))


def bits_of(weights: Tensor, bits: int | None = None) -> int:
    """Size of a tensor in bits: at ``bits`` a weight, or, without them, as its dtype stores it."""
    return weights.numel() * (8 * weights.element_size() if bits is None else bits)


def bytes_at(numel: int, bits: int) -> int:
    """How many whole bytes ``numel`` weights of ``bits`` bits take without gaps."""
    return (numel * bits + 7) // 8


def signal_and_noise(weights: Tensor, quantized: Tensor) -> tuple[Tensor, Tensor]:
    """Σw² and Σ(w - q)² of weights and the same after rounding, two tensors of one shape; float64 scalars."""
    exact = weights.double()
    return exact.square().sum(), (exact - quantized.double()).square().sum()


def snr_db(signal: Tensor | float, noise: Tensor | float) -> Tensor:
    """10·log10(signal / noise), in dB: float64; inf where only ``noise`` is 0, nan where both are."""
    return 10 * torch.log10(torch.as_tensor(signal, dtype=torch.float64) / noise)
