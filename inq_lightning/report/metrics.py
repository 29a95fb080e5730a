"""Metrics of a quantization, usable by themselves; the callback logs the same ones."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from inq_lightning.core.size import bits_of, signal_and_noise, snr_db


class QuantizedFraction(Metric):
    """Share of the weights that are frozen on their grid, 0 to 1.

    >>> metric = QuantizedFraction()
    >>> metric.update(torch.tensor([True, True, False, False]))
    >>> metric.update(torch.tensor([True, False, False, False]))
    >>> metric.compute()
    tensor(0.3750, dtype=torch.float64)
    """

    full_state_update = False
    higher_is_better = True
    frozen: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("frozen", torch.tensor(0, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, mask: Tensor) -> None:
        """Add the weights of one layer.

        Args:
            mask: bool of any shape, True where the weight is frozen.
        """
        self.frozen += mask.count_nonzero()
        self.total += mask.numel()

    def compute(self) -> Tensor:
        """The fraction: float64 scalar, nan before any update."""
        return self.frozen.double() / self.total


class SignalToQuantizationNoise(Metric):
    """Ratio of the weights' power to the power of their rounding errors, in dB: 10·log10(Σw² / Σ(w - q)²).

    >>> metric = SignalToQuantizationNoise()
    >>> metric.update(torch.tensor([1.0, 0.9]), torch.tensor([1.0, 1.0]))
    >>> metric.compute()
    tensor(22.5768, dtype=torch.float64)
    """

    full_state_update = False
    higher_is_better = True
    signal: Tensor
    noise: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("signal", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("noise", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, weights: Tensor, quantized: Tensor) -> None:
        """Add a group of weights.

        Args:
            weights: Weights before rounding, any shape, floating point.
            quantized: The same weights after rounding, same shape.
        """
        signal, noise = signal_and_noise(weights, quantized)
        self.signal += signal
        self.noise += noise

    def compute(self) -> Tensor:
        """The ratio in dB: float64 scalar, inf where nothing was changed, nan before any update."""
        return snr_db(self.signal, self.noise)


class BitsPerWeight(Metric):
    """Mean number of bits that a weight takes: its code length where quantized, its dtype's width elsewhere.

    >>> metric = BitsPerWeight()
    >>> metric.update(torch.zeros(300), bits=4)
    >>> metric.update(torch.zeros(100))
    >>> metric.compute()
    tensor(11., dtype=torch.float64)
    """

    full_state_update = False
    higher_is_better = False
    bits: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("bits", torch.tensor(0, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, weights: Tensor, bits: int | None = None) -> None:
        """Add a tensor.

        Args:
            weights: Tensor of any shape.
            bits: Bits that one of its elements takes; None for the width of its dtype.
        """
        self.bits += bits_of(weights, bits)
        self.total += weights.numel()

    def compute(self) -> Tensor:
        """The mean: float64 scalar, nan before any update."""
        return self.bits.double() / self.total
