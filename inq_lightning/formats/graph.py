"""The graph of a quantized network: traced by torch.onnx, its quantized weights kept apart, its norms folded.

What writes such a graph, in whatever format, gives the weights back in a form of its own.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from inq_lightning._common import LazyExtra
from inq_lightning.core.feeding import evaluating
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


class Examples(NamedTuple):
    """Example inputs of a network.

    Attributes:
        args: The positional ones.
        kwargs: Those by name.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors among them, which are the inputs of the graph; the rest is fixed in it."""
        return tuple(value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Tensor))

    def replace(self, tensors: Iterable[Tensor]) -> Examples:
        """The same with other tensors."""
        left = iter(tensors)
        args = tuple(next(left) if isinstance(value, Tensor) else value for value in self.args)
        return Examples(args, {k: next(left) if isinstance(v, Tensor) else v for k, v in self.kwargs.items()})

    def names(self, model: nn.Module) -> list[str]:
        """What the graph calls its inputs: as the network's forward does."""
        positional, several = [], "args"
        for parameter in inspect.signature(model.forward).parameters.values():
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                positional.append(parameter.name)
            elif parameter.kind is parameter.VAR_POSITIONAL:
                several = parameter.name
        positional += [f"{several}_{i}" for i in range(len(self.args) - len(positional))]
        pairs = (*zip(positional, self.args, strict=False), *self.kwargs.items())
        return [name for name, value in pairs if isinstance(value, Tensor)]

    def __str__(self) -> str:
        """Types and shapes."""
        return ", ".join(f"{str(x.dtype).removeprefix('torch.')}{tuple(x.shape)}" for x in self.tensors)


def trace(model: nn.Module, examples: Examples, grids: Mapping[str, Grid], fixed_batch: bool = False) -> Graph:
    """Trace a network in eval mode and without gradients; it is left as it was.

    Args:
        model: Trained network.
        examples: Its inputs, see :func:`as_examples`.
        grids: Grids of its quantized weights, by name.
        fixed_batch: Whether the graph takes batches of the examples' size only.

    Raises:
        ImportError: The extra ``export`` is not installed.
        ValueError: The network does not run on the examples, returns no tensor, or cannot be exported.
    """
    with _evaluating(model), _quietly(), torch.no_grad():
        outputs, others = _run(model, examples)
        program = _export(model, examples, fixed_batch)
        weights = _hide_weights(program.model.graph, model, grids)
        program.optimize()
    if others:
        warnings.warn(
            f"the file leaves out what the network returns besides tensors: {', '.join(others)}; what holds tensors of "
            "its own, let forward return as a tuple, list, dict or dataclass of tensors",
            stacklevel=3,
        )
    for weight in weights.values():
        program.model.graph.inputs.remove(weight.value)
    fold_batch_norms(program.model.graph, weights)
    return Graph(program.model, weights, outputs)


def as_examples(inputs: Tensor | tuple[Any, ...] | Mapping[str, Any], fixed_batch: bool = False) -> Examples:
    """Example inputs by position or by name.

    Args:
        inputs: A tensor, a tuple of positional inputs, or a mapping of those by name. What is None, a truth value, a
            number or a text among them becomes part of the graph.
        fixed_batch: Whether tensors may have any shape; else the first dimension of each is the batch.

    Raises:
        TypeError: They are something else, or hold something else.
        ValueError: Their batches differ, or are empty.
    """
    if isinstance(inputs, Mapping):
        examples = Examples((), dict(inputs))
    else:
        examples = Examples((inputs,) if isinstance(inputs, Tensor) else inputs, {})
    allowed = (Tensor, bool, int, float, str, type(None))
    if not isinstance(examples.args, tuple):
        raise TypeError(f"inputs must be a tensor, a tuple of tensors or a dict of them, got {type(inputs).__name__}")
    other = [type(x).__name__ for x in (*examples.args, *examples.kwargs.values()) if not isinstance(x, allowed)]
    if other or not examples.tensors:
        what = f"hold {', '.join(other)}" if other else "hold no tensor"
        raise TypeError(f"inputs must be a tensor, a tuple of tensors or a dict of them; these {what}")
    batches = {x.shape[0] if x.dim() else None for x in examples.tensors}
    if not fixed_batch and (len(batches) > 1 or batches & {None, 0}):
        shapes = ", ".join(str(tuple(x.shape)) for x in examples.tensors)
        raise ValueError(
            f"inputs must have the batch as their first dimension, the same and not 0; got {shapes}. With "
            "fixed_batch=True they may have any shape"
        )
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
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # attention in one fused operator, which ONNX lacks
        with evaluating(model), torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


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


class _Flat(nn.Module):
    """The network as a function from tensors by position to tensors, with its own names of everything."""

    call: nn.Module
    examples: Examples

    def __init__(self, model: nn.Module, examples: Examples) -> None:
        super().__init__()
        for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            vars(self)[name] = vars(model)[name]
        vars(self).update(training=model.training, call=model, examples=examples)  # without registering the network

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """What the network returns, the tensors of it."""
        examples = self.examples.replace(tensors)
        return tuple(x for _, x in _leaves(self.call(*examples.args, **examples.kwargs)) if isinstance(x, Tensor))


def _leaves(found: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """What an output holds, and where in it: of the containers that torch knows, of mappings and dataclasses."""
    for keys, leaf in torch.utils._pytree.tree_flatten_with_path(found)[0]:
        place = path + torch.utils._pytree.keystr(keys)
        if isinstance(leaf, Mapping):
            inner = leaf.items()
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            inner = [(field.name, getattr(leaf, field.name)) for field in fields(leaf)]  # type: ignore[assignment]
        elif isinstance(leaf, (list, tuple)):
            inner = enumerate(leaf)  # type: ignore[assignment]
        else:
            yield place, leaf
            continue
        for key, value in inner:
            yield from _leaves(value, f"{place}[{key!r}]")


def _run(model: nn.Module, examples: Examples) -> tuple[list[Array], list[str]]:
    """The tensors that the network returns, and what it returns besides."""
    try:
        returned = model(*examples.args, **examples.kwargs)
    except Exception as error:
        raise ValueError(f"the network does not run on inputs {examples}: {_reason(error)}") from error
    tensors, others = [], []
    for place, leaf in _leaves(returned):
        if isinstance(leaf, Tensor):
            tensors.append(leaf.numpy(force=True))
        elif leaf is not None:
            others.append(f"{place or 'the output'} ({type(leaf).__name__})")
    if not tensors:
        raise ValueError(f"the network returns no tensor, but {', '.join(others) or 'None'}: let forward return some")
    return tensors, others


def _export(model: nn.Module, examples: Examples, fixed_batch: bool) -> Any:
    """The network's program as it is, no weight folded or renamed."""
    tensors = examples.tensors
    dynamic = None if fixed_batch else (tuple({0: torch.export.Dim.DYNAMIC} for _ in tensors),)
    if not fixed_batch and tensors[0].shape[0] == 1:  # would be taken for a constant
        tensors = tuple(torch.cat([x, x]) for x in tensors)
    flat = _Flat(model, examples)
    try:
        return torch.onnx.export(
            flat,
            tensors,
            input_names=examples.names(model),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=dynamic,
            optimize=False,
            verbose=False,
        )
    except Exception as error:
        reason = _reason(error)
        if "TorchExportError" not in type(error).__name__:
            raise ValueError(f"torch.onnx cannot write the network as ONNX: {reason}") from error
        if fixed_batch or not _traces(flat, tensors):
            raise ValueError(
                f"torch.export cannot trace the network: {reason}. Change that part of its forward, such as branches "
                "on the values of tensors"
            ) from error
        raise ValueError(
            f"torch.export cannot trace the network with a dynamic batch: {reason}. With fixed_batch=True "
            "(inq-export: --fixed-batch) the file takes batches of the example's size only; or change what in forward "
            "depends on the size of the batch"
        ) from error


def _traces(flat: nn.Module, tensors: tuple[Tensor, ...]) -> bool:
    """Whether the network can be traced for one size of the batch."""
    try:
        torch.export.export(flat, tensors, strict=False)
    except Exception:
        return False
    return True


def _reason(error: BaseException) -> str:
    """The first cause of an error, in a line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else type(error).__name__
    return " ".join(lines[:2] if first.endswith(":") else [first]).rstrip(".")


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
