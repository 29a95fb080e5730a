"""A network of whole numbers: its input, its operations, and what runs them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor, nn

from inq_lightning.core.flow import network_of
from inq_lightning.core.size import bytes_at
from inq_lightning.formats.contents import Record
from inq_lightning.integer.operations import EXACT, Counts, Operation, Product, Scaled
from inq_lightning.integer.record import describe, weights_of

_BATCH = 128  # inputs at a time: what unfolded convolutions take in memory


@dataclass(frozen=True)
class IntegerNetwork:
    """A quantized network in whole numbers of 32 bits: additions, shifts, comparisons.

    Attributes:
        shape: Of one input.
        input_exponent: The input is rounded to steps of 2^input_exponent, half to even.
        input_low: Least input, in steps.
        input_high: Largest input, in steps.
        operations: In the order in which they are computed; the last one's results are the logits.
        images: How many inputs :func:`~inq_lightning.lower` has compared.
        changed: Of how many of them the prediction is another one than the network's in floats.
    """

    shape: tuple[int, ...]
    input_exponent: int
    input_low: int
    input_high: int
    operations: tuple[Operation, ...]
    images: int = field(default=0, compare=False)
    changed: int = field(default=0, compare=False)

    @property
    def products(self) -> tuple[Product, ...]:
        """Its convolutions and linear layers."""
        return tuple(op for op in self.operations if isinstance(op, Product))

    @property
    def exponent(self) -> int:
        """A logit of q stands for q · 2^exponent."""
        return self.operations[-1].exponent

    @property
    def terms(self) -> int:
        """Powers of two that stand for the factor of a normalization, at most."""
        return max((op.scaling.terms for op in self.operations if isinstance(op, Scaled)), default=1)

    @property
    def accumulator_bits(self) -> int:
        """Bits of the largest whole number on the way, with its sign."""
        return max(op.peak for op in self.operations).bit_length() + 1

    @property
    def counts(self) -> Counts:
        """Operations for one input."""
        return Counts(*(sum(numbers) for numbers in zip(*(op.counts() for op in self.operations), strict=True)))

    def round_input(self, images: Tensor) -> Tensor:
        """The input in steps: int32 of the shape of ``images``, (batch, *shape) of a floating type.

        Raises:
            ValueError: They are of another shape, or hold nan.
        """
        if tuple(images.shape[1:]) != self.shape:
            raise ValueError(f"inputs must be of shape (batch, {', '.join(map(str, self.shape))}), got {images.shape}")
        if bool(images.isnan().any()):
            raise ValueError("inputs hold nan, which no whole number stands for")
        steps = torch.ldexp(images.double(), torch.tensor(-self.input_exponent)).round()
        return steps.clamp(self.input_low, self.input_high).to(torch.int32)

    def run(self, images: Tensor) -> Tensor:
        """Compute logits, as a device does: this is what the network is.

        Args:
            images: Of shape (batch, *shape), of a floating type; or steps, as :meth:`round_input` gives them.

        Returns:
            int32 of shape (batch, classes), in steps of 2^exponent.

        Raises:
            ValueError: See :meth:`round_input`.
        """
        steps = self.round_input(images) if images.is_floating_point() else images.to(torch.int32)
        return torch.cat([self._run(part) for part in torch.split(steps.cpu(), _BATCH)])

    def _run(self, steps: Tensor) -> Tensor:
        values = [steps]
        for operation in self.operations:
            values.append(operation.run(*(values[k] for k in operation.sources)))
        return values[-1]

    @property
    def bytes(self) -> int:
        """Size of weights, factors and biases, as small as they can be packed."""
        scalings = [op.scaling for op in self.operations if isinstance(op, Scaled)]
        numbers = sum(2 * s.signs.numel() + s.rights.numel() + 4 * s.bias.numel() for s in scalings)
        return numbers + sum(bytes_at(op.weight.numel(), op.bits) for op in self.products)

    @property
    def summary(self) -> dict[str, int]:
        """What it takes, as plain numbers: operations for one input, bits, bytes, and what lowering has changed."""
        own = {name: getattr(self, name) for name in ("terms", "accumulator_bits", "bytes", "images", "changed")}
        return {**self.counts._asdict(), **own}

    @classmethod
    def plain_fields(cls) -> list[str]:
        """Names of its attributes but the operations, which JSON can hold."""
        return [field.name for field in fields(cls) if field.name != "operations"]

    def record(self) -> Record:
        """It without its weights, for :func:`~inq_lightning.save_packed`."""
        described, tensors = describe(self.operations)
        own = {name: getattr(self, name) for name in self.plain_fields()}
        program = {**own, "summary": self.summary, "operations": described}
        return Record(program, tensors, weights_of(self.operations))

    @contextmanager
    def computing(self, module: nn.Module) -> Iterator[None]:
        """Let a module that holds the network compute with whole numbers, as ``trainer.test(module)`` then does.

        Args:
            module: What :func:`~inq_lightning.lower` was given: the network, or a LightningModule whose steps call it,
                by its forward where it has one of its own.
        """
        network, _ = network_of(module)
        network.forward = self.to_torch(torch.float32).forward
        try:
            yield
        finally:
            del network.forward

    def to_torch(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """An ordinary module whose logits are those of :meth:`run` times 2^exponent, every one.

        Args:
            dtype: torch.float64, or torch.float32, which is faster; an operation whose numbers float32 does not hold
                exactly is computed in float64 there. On a GPU take float64: convolutions in float32 may round there.

        Raises:
            ValueError: ``dtype`` is another one, or a number on the way is not exact in it.
        """
        if dtype not in EXACT:
            raise ValueError(f"dtype must be torch.float64 or torch.float32, got {dtype}")
        return IntegerModule(self, dtype)


class IntegerModule(nn.Module):
    """An :class:`IntegerNetwork` in a floating type that holds all of its whole numbers.

    Args:
        network: The network.
        dtype: The floating type; see :meth:`IntegerNetwork.to_torch`.
    """

    def __init__(self, network: IntegerNetwork, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = network
        self.dtypes = [dtype if op.summed < EXACT[dtype] else torch.float64 for op in network.operations]

    def forward(self, images: Tensor) -> Tensor:
        """Maps (batch, *shape) of a floating type to logits of shape (batch, classes), float64 or float32."""
        with torch.autocast(images.device.type, enabled=False):  # its types are not exact
            return self._compute(images)

    def _compute(self, images: Tensor) -> Tensor:
        network = self.network
        steps = (images.double() * 2.0**-network.input_exponent).round()
        values = [steps.clamp(network.input_low, network.input_high)]
        for operation, dtype in zip(network.operations, self.dtypes, strict=True):
            values.append(operation.floats(*(values[k].to(dtype) for k in operation.sources)))
        return values[-1] * 2.0**network.exponent
