"""The graph of a quantized network: traced by torch.onnx, its quantized weights kept apart, its norms folded.

What writes such a graph, in whatever format, gives the weights back in a form of its own.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from inq_lightning._common import LazyExtra
from inq_lightning.core.layer import named_weights
from inq_lightning.grid import Grid
from inq_lightning.grid.recognize import encode

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

OPSET = 21  # the first with 4-bit types

ir = LazyExtra("onnx_ir", "export")


class Weight(NamedTuple):
    """A quantized weight, and the factors of a batch normalization that is folded into it.

    Attributes:
        value: Where the graph uses it; nothing computes it yet.
        codes: int8, in the weight's shape.
        grid: What the codes stand for.
        factors: float32, one for each index of ``axis``; () without a norm.
        axis: The axis of the outputs.
    """

    value: Any
    codes: Array
    grid: Grid
    factors: Array = np.float32(1).reshape(())
    axis: int = 0

    @property
    def multiples(self) -> Array:
        """The weight without its factors, divided by 2^step of its grid: whole numbers, float64."""
        return self.grid.multiples(torch.from_numpy(self.codes)).numpy()

    def scale(self, exponent: int = 0) -> Array:
        """What numbers in units of 2^exponent are multiplied with: 2^(step - exponent), times the factors."""
        return np.asarray(np.ldexp(self.factors, self.grid.step - exponent))


class Graph(NamedTuple):
    """What :func:`trace` returns.

    Attributes:
        model: ``onnx_ir.Model``.
        weights: The quantized weights by their name in the graph; tied ones come once, as torch.onnx stores them.
        outputs: What torch computes from the example inputs, in the order of the graph's outputs.
    """

    model: Any
    weights: dict[str, Weight]
    outputs: list[Array]


def trace(model: nn.Module, examples: tuple[Tensor, ...], grids: Mapping[str, Grid]) -> Graph:
    """Trace a network in eval mode; it is left as it was.

    Args:
        model: Trained network.
        examples: Its positional inputs, see :func:`as_examples`.
        grids: Grids of its quantized weights, by name.

    Raises:
        ImportError: The extra ``export`` is not installed.
        ValueError: The network does not run on the examples or cannot be exported with a dynamic batch.
    """
    with _evaluating(model), _quietly():
        outputs = _run(model, examples)
        program = _export(model, examples)
        weights = _hide_weights(program.model.graph, model, grids)
        program.optimize()
    for weight in weights.values():
        program.model.graph.inputs.remove(weight.value)
    fold_batch_norms(program.model.graph, weights)
    return Graph(program.model, weights, outputs)


def as_examples(inputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Example inputs as a tuple, the first dimension of each the batch.

    Raises:
        TypeError: They are neither a tensor nor a tuple of tensors.
        ValueError: Their batches differ, or are empty.
    """
    examples = (inputs,) if isinstance(inputs, Tensor) else inputs
    if not isinstance(examples, tuple) or not examples or not all(isinstance(x, Tensor) for x in examples):
        raise TypeError(f"inputs must be a tensor or a tuple of tensors, got {type(inputs).__name__}")
    batches = {x.shape[0] if x.dim() else None for x in examples}
    if len(batches) > 1 or batches & {None, 0}:
        shapes = ", ".join(str(tuple(x.shape)) for x in examples)
        raise ValueError(f"inputs must have the batch as their first dimension, the same and not 0; got {shapes}")
    return examples


def initializer(graph: Any, name: str, array: Array, dtype: str | None = None) -> Any:
    """Add a constant to a graph, converted to one of ONNX's types where that is named."""
    array = np.ascontiguousarray(array).reshape(array.shape)
    tensor = ir.tensor(array if dtype is None else array.astype(ir.DataType[dtype].numpy(), copy=False), name=name)
    value = ir.Value(name=name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype))
    graph.register_initializer(value)
    return value


def is_linear(node: Any) -> bool:
    """Whether a node is x @ weight.T + bias."""
    if node.op_type != "Gemm":
        return False
    attributes = node.attributes
    factors, transposed = [attributes.get_float(a, 1.0) for a in ("alpha", "beta")], attributes.get_int("transA", 0)
    return factors == [1.0, 1.0] and not transposed and bool(attributes.get_int("transB", 0))


def fold_batch_norms(graph: Any, weights: dict[str, Weight]) -> None:
    """Turn batch normalizations behind quantized layers into the weights' factors and the layers' biases."""
    for norm in [node for node in graph if node.op_type == "BatchNormalization"]:
        layer = norm.inputs[0].producer()
        axis = None if layer is None else _output_axis(layer)
        constants = [v.const_value for v in norm.inputs[1:]]
        if axis is None or any(c is None for c in constants) or len(norm.inputs[0].uses()) > 1:
            continue
        value, bias = layer.inputs[1], layer.inputs[2] if len(layer.inputs) > 2 else None
        weight = weights.get(value.name)
        if weight is None or len(value.uses()) > 1 or (bias is not None and bias.const_value is None):
            continue
        gamma, beta, mean, variance = (c.numpy() for c in constants)
        epsilon = norm.attributes.get_float("epsilon", 1e-5)
        # As torch.onnx folds, so that both make the same floats.
        scale = gamma / np.sqrt(variance + epsilon)
        shift = ((np.zeros_like(mean) if bias is None else bias.const_value.numpy()) - mean) * scale + beta
        weights[value.name] = weight._replace(factors=scale, axis=axis)
        folded = ir.node(
            layer.op_type,
            [layer.inputs[0], value, initializer(graph, f"{value.name}.bias", shift)],
            layer.attributes,
            name=layer.name,
        )
        ir.convenience.replace_nodes_and_values(
            graph, layer, [layer, norm], [folded], [norm.outputs[0]], [folded.outputs[0]]
        )


def _output_axis(layer: Any) -> int | None:
    """The axis of a layer's weight that runs over its outputs; None where that is not one scale for each."""
    if layer.op_type == "Conv":
        return 0
    if layer.op_type == "ConvTranspose":
        return 1 if layer.attributes.get_int("group", 1) == 1 else None
    return 0 if is_linear(layer) else None


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, without what an export may leave behind in torch."""
    modes = {module: module.training for module in model.modules()}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # attention in one fused operator, which ONNX lacks
        model.eval()
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, training in modes.items():
            module.training = training


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the exporter's warnings and log messages."""
    level = logging.root.manager.disable
    try:
        logging.disable(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _run(model: nn.Module, examples: tuple[Tensor, ...]) -> list[Array]:
    try:
        with torch.no_grad():
            outputs = model(*examples)
    except Exception as error:
        shapes = ", ".join(str(tuple(x.shape)) for x in examples)
        raise ValueError(f"the network does not run on inputs of shape {shapes}: {error}") from error
    leaves = torch.utils._pytree.tree_leaves(outputs)
    return [leaf.numpy(force=True) for leaf in leaves if isinstance(leaf, Tensor)]


def _export(model: nn.Module, examples: tuple[Tensor, ...]) -> Any:
    """The network's program as it is, no weight folded or renamed."""
    if examples[0].shape[0] == 1:  # would be taken for a constant
        examples = tuple(torch.cat([x, x]) for x in examples)
    try:
        return torch.onnx.export(
            model,
            examples,
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=tuple({0: torch.export.Dim.DYNAMIC} for _ in examples),
            optimize=False,
            verbose=False,
        )
    except Exception as error:
        cause = error.__cause__ or error
        reason = next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        raise ValueError(
            f"torch.onnx cannot export the network with a dynamic batch ({reason}); see the exception above for what "
            "in its forward to change, such as sizes that are Python numbers"
        ) from error


def _hide_weights(graph: Any, model: nn.Module, grids: Mapping[str, Grid]) -> dict[str, Weight]:
    """Turn the initializers of quantized weights into inputs, which no optimization can fold away."""
    quantized = {id(p): grids[name] for name, p in named_weights(model) if name in grids}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    weights = {}
    for name in list(graph.initializers):
        grid = quantized.get(id(parameters.get(name)))
        if grid is not None:
            value = graph.initializers.pop(name)
            value.const_value = None
            graph.inputs.append(value)
            weights[name] = Weight(value, encode(grid, parameters[name]).numpy(force=True), grid)
    return weights
