"""The module that rounds activations to steps of a power of two.

Zhou et al. (ICLR 2017) quantize weights only; what multiplies them has to be a whole number, too, for a multiplication
to become a shift. Scales are powers of two, so that changing from one to the next is a shift as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Exponents that are compared, from the least that holds every value; those above it are for batches yet to come.
_COMPARED = range(2, -5, -1)
_LEAST = -100
_UNKNOWN = -(1 << 15)  # no exponent


class PowerOfTwoActivation(nn.Module):
    """Rounds a tensor to multiples of 2^exponent, half to even, and clamps them; gradients pass straight through.

    Until it is calibrated it changes nothing. While ``pending``, the next batch in training mode calibrates it: the
    exponent becomes that of the least squared error, the smallest that holds every value or one of the four below it;
    the same in all processes of a distributed run.

    Args:
        bits: Code length of one value, 2 to 8.
        signed: Whether there are negative codes: -2^(bits-1) to 2^(bits-1) - 1 rather than 0 to 2^bits - 1.
        name: What messages call it.

    Attributes:
        low: Smallest code.
        high: Largest code.
        exponent: Of the step; None before it is calibrated.
        pending: Whether the next training batch calibrates it.
        grid: int32 of shape (3,), what a checkpoint keeps: exponent, low, high.

    Raises:
        ValueError: ``bits`` is out of range.
    """

    grid: Tensor

    def __init__(self, bits: int = 8, signed: bool = False, name: str = "") -> None:
        super().__init__()
        check_activation_bits("bits", bits)
        self.low, self.high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
        self.name = name
        self.exponent: int | None = None
        self.pending = True
        self._errors: dict[int, float] = {}
        self.register_buffer("grid", torch.tensor([_UNKNOWN, self.low, self.high], dtype=torch.int32))

    @classmethod
    def of(cls, grid: Tensor, name: str = "") -> PowerOfTwoActivation:
        """One of which only the saved ``grid`` is known.

        Raises:
            ValueError: It is none.
        """
        if grid.shape != (3,):
            raise ValueError(f"{name}: a grid of activations has three numbers, this has the shape {tuple(grid.shape)}")
        exponent, low, high = grid.tolist()
        activation = cls((high - low).bit_length(), low < 0, name)
        activation._set(None if exponent == _UNKNOWN else exponent)
        return activation

    @property
    def bits(self) -> int:
        """Code length of one value."""
        return (self.high - self.low).bit_length()

    @property
    def signed(self) -> bool:
        """Whether there are negative codes."""
        return self.low < 0

    def forward(self, values: Tensor) -> Tensor:
        """Maps a tensor of any shape and floating type to one like it."""
        if self.pending and self.training:
            self.calibrate(values)
            self.pending = False
        if self.exponent is None:
            return values
        return self.rounded(values, self.exponent)

    def rounded(self, values: Tensor, exponent: int) -> Tensor:
        """The values in steps of 2^exponent."""
        if torch.compiler.is_compiling() and not torch.is_grad_enabled():  # the same for torch.onnx, which lacks that
            return (values * 2.0**-exponent).round().clamp(self.low, self.high) * 2.0**exponent
        return torch.fake_quantize_per_tensor_affine(values, 2.0**exponent, 0, self.low, self.high)

    @torch.no_grad()
    def calibrate(self, values: Tensor, more: bool = False) -> None:
        """Choose the exponent of least squared error.

        In a distributed run, a collective call.

        Args:
            values: What it will round.
            more: Whether to add the errors of earlier calls to those of this one.

        Raises:
            ValueError: There are infinite values, or nan.
        """
        values = values.detach().float()
        largest = values.amax() if not self.signed else values.abs().amax()
        largest = _over_processes(torch.where(values.isfinite().all(), largest, math.nan), "MAX")
        top = float(largest)
        if not math.isfinite(top):
            raise ValueError(
                f"{self.name}: the batch that calibrates its activations holds infinite values or nan; look for them "
                "in the data, or train with a lower learning rate"
            )
        highest = _least_exponent(top, self.high)
        if not more or not self._errors:
            self._errors = {highest + k: 0.0 for k in _COMPARED}
        errors = torch.stack([(self.rounded(values, e) - values).double().square().sum() for e in self._errors])
        for exponent, error in zip(self._errors, _over_processes(errors, "SUM").tolist(), strict=True):
            self._errors[exponent] += error
        *_, best = min((error, k > highest, -k, k) for k, error in self._errors.items())
        self._set(best)

    def _set(self, exponent: int | None) -> None:
        self.exponent = exponent
        codes = [_UNKNOWN if exponent is None else exponent, self.low, self.high]
        self.grid.copy_(torch.tensor(codes, dtype=self.grid.dtype))  # whole: to_empty leaves nothing in it

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        saved = state_dict.get(f"{prefix}grid")
        if isinstance(saved, Tensor) and saved.shape == self.grid.shape and not saved.is_meta:
            exponent, *codes = saved.tolist()
            if codes != [self.low, self.high]:
                raise ValueError(
                    f"{self.name or prefix}: activations of codes {codes[0]} to {codes[1]} were saved, here they are "
                    f"{self.low} to {self.high}; give it the bits that it was saved with"
                )
            self._set(None if exponent == _UNKNOWN else exponent)
            self.pending = self.exponent is None
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """Bits, sign and step."""
        step = "not calibrated" if self.exponent is None else f"step=2^{self.exponent}"
        return f"bits={self.bits}, signed={self.signed}, {step}"


def check_activation_bits(option: str, bits: object) -> None:
    """Refuse what is no width of activations.

    Raises:
        ValueError: ``bits`` is no whole number from 2 to 8; the message names the option.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"{option} must be a whole number from 2 to 8, got {bits!r}")


def _least_exponent(largest: float, high: int) -> int:
    """The smallest e with high · 2^e >= largest, and one whose step float32 can divide by."""
    if largest <= 0:
        return 1 - high.bit_length()
    mantissa, exponent = math.frexp(largest / high)
    return max(exponent - (mantissa == 0.5), _LEAST)


def _over_processes(values: Tensor, operation: str) -> Tensor:
    """Reduced over all processes, where there are several."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(values, op=getattr(distributed.ReduceOp, operation))
    return values
