"""An integer network as an ONNX file of 8-bit operators, which ONNX Runtime computes to the same logits.

Every value is uint8: a signed one has 128 as its zero. A product is QLinearConv: what is multiplied are 8-bit numbers,
the bias is a whole number of the sums' steps, and what scales the sums is a whole number over 2^16 or less, so that
float32, in which ONNX Runtime scales, rounds as whole numbers do (:mod:`inq_lightning.integer.scaling`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inq_lightning._common import LazyExtra, atomic, import_extra
from inq_lightning.formats.graph import Array, initializer
from inq_lightning.integer.network import IntegerNetwork
from inq_lightning.integer.operations import (
    EXACT,
    Average,
    Concat,
    Max,
    Operation,
    Pad,
    Product,
    Reshape,
    Scale,
    Scaled,
    Slice,
    Sum,
)

OPSET, IR_VERSION = 21, 10
_CONTRIB = "com.microsoft"

ir, onnx = (LazyExtra(module, "export") for module in ("onnx_ir", "onnx"))


def export_integer_onnx(network: IntegerNetwork, path: str | Path) -> None:
    """Write an integer network as one ONNX file for ONNX Runtime.

    The file takes float32 of shape (batch, *shape) and returns float32 logits of shape (batch, classes), each the
    network's own times 2^exponent, exactly.

    Args:
        network: The network.
        path: The file; it appears only once it is complete.

    Raises:
        ImportError: The extra ``export`` is not installed.
        ValueError: A layer does not fit into 8-bit operators; the message names it, and says why.
        OSError: The file cannot be written.
    """
    for module in ("onnx", "onnx_ir"):
        import_extra(module, "export")
    model = _Writer(network).model()
    with atomic(Path(path)) as partial:
        partial.write_bytes(ir.to_proto(model).SerializeToString())


class _Writer:
    """Makes the graph, operation by operation."""

    def __init__(self, network: IntegerNetwork) -> None:
        self.network = network
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET, _CONTRIB: 1}, name="integer_network")
        self.values: list[Any] = []
        self.zeros: list[int] = []  # zero points of the values
        self.steps: list[int] = []  # exponents of their steps
        self.number = 0

    def model(self) -> Any:
        """The whole graph."""
        network = self.network
        batch = ir.Shape(["batch", *network.shape])
        entry = ir.Value(name="input", shape=batch, type=ir.TensorType(ir.DataType.FLOAT))
        self.graph.inputs.append(entry)
        self._add(self._rounded_input(entry), network.input_low, network.input_exponent)
        for operation in network.operations[:-1]:
            self._check(operation)
            value = getattr(self, f"_{type(operation).__name__.lower()}")(operation)
            self._add(value, operation.low, operation.exponent)
        logits = self._logits(network.operations[-1])
        logits.name = "logits"
        logits.shape = ir.Shape(["batch", *network.operations[-1].shape])
        logits.type = ir.TensorType(ir.DataType.FLOAT)
        self.graph.outputs.append(logits)
        return ir.Model(self.graph, ir_version=IR_VERSION, producer_name="inq-lightning")

    def _add(self, value: Any, low: int, exponent: int) -> None:
        self.values.append(value)
        self.zeros.append(128 if low < 0 else 0)
        self.steps.append(exponent)

    def _check(self, operation: Operation) -> None:
        if operation.high - operation.low > 255 or operation.low < -128:
            raise ValueError(
                f"{operation.name} has results from {operation.low} to {operation.high}, which 8 bits do not hold; "
                "round them to 8 bits"
            )

    # ---- nodes and constants -----------------------------------------------------------------------------------------

    def _node(self, kind: str, *inputs: Any, domain: str = "", **attributes: Any) -> Any:
        self.number += 1
        made = ir.node(kind, inputs, attributes, domain=domain, name=f"{kind}_{self.number}")
        made.outputs[0].name = f"value_{self.number}"
        self.graph.append(made)
        return made.outputs[0]

    def _constant(self, array: Any, dtype: str) -> Any:
        self.number += 1
        return initializer(self.graph, f"constant_{self.number}", np.asarray(array), dtype)

    def _byte(self, value: int) -> Any:
        return self._constant(np.uint8(value), "UINT8")

    def _float(self, value: Any) -> Any:
        return self._constant(np.asarray(value, np.float32), "FLOAT")

    def _clipped(self, value: Any, low: int, high: int, zero: int) -> Any:
        """A uint8 value within bounds that are narrower than uint8."""
        if (low + zero, high + zero) == (0, 255):
            return value
        return self._node("Clip", value, self._byte(low + zero), self._byte(high + zero))

    def _rounded_input(self, entry: Any) -> Any:
        network = self.network
        zero = 128 if network.input_low < 0 else 0
        value = self._node("QuantizeLinear", entry, self._float(2.0**network.input_exponent), self._byte(zero))
        return self._clipped(value, network.input_low, network.input_high, zero)

    # ---- operations --------------------------------------------------------------------------------------------------

    def _convolution(self, operation: Scaled, value: Any, weight: Tensor, factors: Tensor, **attributes: Any) -> Any:
        """QLinearConv of a 4-D value with whole numbers of int8, whose sums are multiplied with ``factors``."""
        scaling, source = operation.scaling, operation.sources[0]
        channels = len(weight)
        rights, bias = scaling.rights.expand(channels), scaling.bias.long().expand(channels)
        sign = torch.where(factors < 0, -1, 1)
        # A channel whose factor is zero is a constant: its bias over a sum of nothing.
        weight = weight.long() * torch.where(factors == 0, 0, sign).view(-1, 1, 1, 1)
        factors = torch.where(factors == 0, 1, factors)
        sums, factors = sign * (bias // factors), factors.abs()
        if bool((weight.abs() > 127).any()):
            raise ValueError(
                f"{operation.name} has weights up to {int(weight.abs().max())} times the smallest, which int8 does not "
                'hold; quantize it to 4 bits, levels="full", or fewer'
            )
        if (most := operation.sums + int(sums.abs().max())) >= EXACT[torch.float32]:
            raise ValueError(
                f"{operation.name} has sums up to {most}, which float32 does not hold exactly; give it fewer bits of "
                "weights or activations"
            )
        zero = 128 if operation.low < 0 else 0
        scales = factors.double() * torch.exp2(-rights.double())
        value = self._node(
            "QLinearConv",
            value,
            self._float(1.0),
            self._byte(self.zeros[source]),
            self._constant(weight.numpy(), "INT8"),
            self._float(scales.numpy()),
            self._constant(np.zeros(channels, np.int8), "INT8"),
            self._float(1.0),
            self._byte(zero),
            self._constant(sums.numpy(), "INT32"),
            **attributes,
        )
        return self._clipped(value, operation.low, operation.high, zero)

    def _product(self, operation: Product) -> Any:
        value, weight = self.values[operation.sources[0]], operation.weight
        factors = operation.scaling.factors.expand(len(weight))
        if weight.dim() == 2:  # a convolution over one pixel
            pixel = self._reshaped(value, (weight.shape[1], 1, 1))
            return self._reshaped(
                self._convolution(operation, pixel, weight[:, :, None, None], factors), operation.shape
            )
        left, right, top, bottom = operation.padding
        return self._convolution(
            operation,
            value,
            weight,
            factors,
            strides=list(operation.stride),
            pads=[top, left, bottom, right],
            dilations=list(operation.dilation),
            group=operation.groups,
        )

    def _scale(self, operation: Scale) -> Any:
        """The factors are the weights of a convolution over one pixel of one channel."""
        value, channels = self.values[operation.sources[0]], operation.shape[0]
        weight = operation.scaling.factors.expand(channels).view(-1, 1, 1, 1)
        ones = torch.ones(channels, dtype=torch.int64)
        if len(operation.shape) == 3:
            return self._convolution(operation, value, weight, ones, group=channels)
        pixel = self._reshaped(value, (channels, 1, 1))
        return self._reshaped(self._convolution(operation, pixel, weight, ones, group=channels), operation.shape)

    def _average(self, operation: Average) -> Any:
        value, channels = self.values[operation.sources[0]], operation.shape[0]
        ones = torch.ones((channels, 1, *operation.kernel), dtype=torch.int64)
        factors = operation.scaling.factors.expand(channels)
        rows, columns = operation.padding
        strides = list(operation.stride)
        return self._convolution(
            operation, value, ones, factors, strides=strides, pads=[rows, columns] * 2, group=channels
        )

    def _sum(self, operation: Sum) -> Any:
        scaling, zero = operation.scaling, 128 if operation.low < 0 else 0
        inputs = []
        for source, left in zip(operation.sources, operation.lefts, strict=True):
            inputs += [self.values[source], self._float(2.0**left), self._byte(self.zeros[source])]
        step = 2.0 ** int(scaling.rights[0]) / int(scaling.factors[0])
        value = self._node("QLinearAdd", *inputs, self._float(step), self._byte(zero), domain=_CONTRIB)
        return self._clipped(value, operation.low, operation.high, zero)

    def _max(self, operation: Max) -> Any:
        rows, columns = operation.padding
        return self._node(
            "MaxPool",
            self.values[operation.sources[0]],
            kernel_shape=list(operation.kernel),
            strides=list(operation.stride),
            pads=[rows, columns] * 2,
            dilations=list(operation.dilation),
        )

    def _reshape(self, operation: Reshape) -> Any:
        return self._reshaped(self.values[operation.sources[0]], operation.shape)

    def _reshaped(self, value: Any, shape: Sequence[int]) -> Any:
        return self._node("Reshape", value, self._constant([-1, *shape], "INT64"))

    def _pad(self, operation: Pad) -> Any:
        pairs = list(zip(operation.amounts[::2], operation.amounts[1::2], strict=True))[::-1]
        pairs = [(0, 0)] * (len(operation.shape) + 1 - len(pairs)) + pairs
        amounts = self._constant([before for before, _ in pairs] + [behind for _, behind in pairs], "INT64")
        source = operation.sources[0]
        return self._node("Pad", self.values[source], amounts, self._byte(self.zeros[source]))

    def _slice(self, operation: Slice) -> Any:
        columns = [self._constant(column, "INT64") for column in zip(*operation.slices, strict=True)]
        axes = self._constant(list(range(1, len(operation.slices) + 1)), "INT64")
        starts, stops, steps = columns
        return self._node("Slice", self.values[operation.sources[0]], starts, stops, axes, steps)

    def _concat(self, operation: Concat) -> Any:
        if any(operation.lefts) or len({self.zeros[source] for source in operation.sources}) > 1:
            raise ValueError(
                f"{operation.name} joins values of different steps or signs; give both the same scale, by an "
                "activation behind it"
            )
        return self._node("Concat", *(self.values[source] for source in operation.sources), axis=operation.axis)

    # ---- the end -----------------------------------------------------------------------------------------------------

    def _logits(self, operation: Operation) -> Any:
        """Sums of 32 bits, and what they stand for."""
        source = operation.sources[0]
        if not isinstance(operation, Product) or operation.weight.dim() != 2:
            raise ValueError(f"{operation.name} is no linear layer, which a network of 8-bit operators ends with")
        scaling = operation.scaling
        if bool((scaling.factors != 1).any()) or bool((scaling.rights != 0).any()):
            raise ValueError(f"{operation.name} is followed by a normalization; fold it into the layer")
        if bool((operation.weight.abs() > 127).any()):
            raise ValueError(f"{operation.name} has weights that int8 does not hold; quantize it to 4 bits or fewer")
        if operation.peak >= EXACT[torch.float32]:
            raise ValueError(f"{operation.name} has logits of more than 24 bits, which float32 does not hold exactly")
        weight = self._constant(_transposed(operation.weight), "INT8")
        sums = self._node("MatMulInteger", self.values[source], weight, self._byte(self.zeros[source]))
        whole = self._node("Add", sums, self._constant(scaling.bias.numpy(), "INT32"))
        return self._node("Mul", self._node("Cast", whole, to=1), self._float(2.0**operation.exponent))


def _transposed(weight: Tensor) -> Array:
    return np.ascontiguousarray(weight.numpy().T)
