"""ONNX files whose quantized weights stay small: codes in the smallest type that ONNX Runtime executes."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor, nn

from inq_lightning._common import import_extra
from inq_lightning.formats.layers import LayerGrid, encode, find_grids
from inq_lightning.grid import PowerOfTwoGrid

SessionMode = Literal["exact", "low-memory", "fast"]
Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

OPSET, IR_VERSION = 21, 10  # the first with 4-bit types
OPSET_INT2, IR_VERSION_INT2 = 25, 13
METADATA_KEY = "inq_lightning"

# Bits → the type that DequantizeLinear takes, and the exponent of its largest power of two in use. The magnitudes of 5
# to 7 bits are powers of two of 8-bit floats, down to their subnormal numbers.
DEQUANTIZED = {2: ("INT2", 0), 3: ("INT4", 1), 5: ("FLOAT8E4M3FN", 8), 6: ("FLOAT8E4M3FN", 8), 7: ("FLOAT8E5M2", 15)}
# Bits → the type of the codes where none of those holds the magnitudes; a table has them.
_LOOKED_UP = {4: "UINT4", 8: "UINT8"}

# Bits → those of the integers that MatMulNBits multiplies, and its fastest block of them.
_PLANES = {2: (2, 128), 3: (4, 256), 4: (8, 128), 5: (4, 256)}
_INT8_ACTIVATIONS = 4  # its accuracy_level

# DequantizeLinear is folded only where it is not kept for quantized operators; those would round activations, too.
_EXACT = {"session.disable_quant_qdq": "1"}
_SESSION_ENTRIES: dict[str, dict[str, str]] = {
    "exact": _EXACT,
    "low-memory": {
        # The transpose optimizers would add nodes that only folding takes away. Before ONNX Runtime 1.27, the
        # propagation moves DequantizeLinear past what cuts a recurrent weight into gates, and outputs are wrong.
        "optimization.disable_specified_optimizers": (
            "ConstantFolding;QDQPropagationTransformer;TransposeOptimizer;TransposeOptimizer_CPUExecutionProvider"
        ),
        "session.qdq_matmulnbits_accuracy_level": "1",
    },
    "fast": _EXACT | {"session.set_denormal_as_zero": "1", "mlas.enable_gemm_fastmath_arm64_bfloat16": "1"},
}


class _Weight(NamedTuple):
    """A quantized weight, and the factors of a batch normalization that is folded into it.

    Attributes:
        codes: int8, in the weight's shape.
        grid: What the codes stand for.
        factors: float32, one for each index of ``axis``; () without a norm.
        axis: The axis of the outputs.
    """

    codes: Array
    grid: PowerOfTwoGrid
    factors: Array = np.float32(1).reshape(())
    axis: int = 0

    def scale(self, exponent: int = 0) -> Array:
        """What integers in units of 2^exponent are multiplied with: 2^(n2 - exponent), times the factors."""
        return np.asarray(np.ldexp(self.factors, (self.grid.n2 or 0) - exponent))


def _integers(codes: Array) -> Array:
    """What the codes stand for, divided by 2^n2; float64."""
    integers: Array = np.sign(codes) * np.exp2(np.abs(codes.astype(np.float64)) - 1)
    return integers


def export_onnx(
    model: nn.Module,
    path: str | Path,
    inputs: Tensor | tuple[Tensor, ...],
    *,
    layers: Iterable[LayerGrid] | None = None,
    allow_partial: bool = False,
    speed: bool = False,
) -> float:
    """Write a quantized network as one ONNX file, and check the file in ONNX Runtime.

    Quantized weights are stored as codes that nodes of the graph decode without loss (docs/export-onnx.md has the
    types); the rest stays float32. A batch normalization behind a quantized layer becomes scales of the decoding. The
    first dimension of the inputs is dynamic. The network is exported in eval mode and left as it was.

    Args:
        model: Trained network with float32 parameters.
        path: File to write; replaced if it exists.
        inputs: Example input of ``model.forward``, or a tuple of its positional inputs, on the model's device; the
            first dimension of each is the batch.
        layers: `INQCallback.layers`; left out, the weights tell which grids they are on.
        allow_partial: Whether to keep parameters that are not on a grid in float32, rather than refuse the network.
        speed: Whether linear layers of at most 5 bits become MatMulNBits, an operator of ONNX Runtime alone, with
            activations rounded to 8 bits: faster at batch 1, with outputs that are off by about a percent.

    Returns:
        The largest absolute difference between the outputs of torch and of ONNX Runtime (mode ``"exact"``).

    Raises:
        ImportError: The extra ``export`` is not installed.
        TypeError: ``inputs`` is neither a tensor nor a tuple of tensors.
        ValueError: Parameters are not on their grids or not float32, the network does not run on ``inputs`` or cannot
            be exported with a dynamic batch, or the file would be larger than 2 GB.
        OSError: The file cannot be written.
    """
    for module in ("onnx", "onnxscript", "onnx_ir", "onnxruntime"):
        import_extra(module, "export")
    path = Path(path)
    examples = _check_inputs(inputs)
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    for name, parameter in model.named_parameters():
        if parameter.dtype is not torch.float32:
            raise ValueError(f"{name} is {parameter.dtype}; an ONNX file needs float32, so call model.float() first")
    grids = find_grids(model, layers, allow_partial)

    partial = path.with_name(path.name + ".partial")
    try:
        partial.touch()  # an export takes seconds: fail before it
        with _evaluating(model), _quietly():
            expected = _run(model, examples)
            program = _trace(model, examples)
            weights = _hide_weights(program.model.graph, model, grids)
            program.optimize()
        _insert_weights(program.model, weights, speed)
        _write(program.model, partial)
        difference = _difference(partial, examples, expected)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return difference


def session_options(mode: SessionMode = "exact") -> Any:
    """Make options for ``onnxruntime.InferenceSession`` on a file of :func:`export_onnx`.

    Args:
        mode: ``"exact"`` decodes the weights when the session is made; outputs are those of the network's float32 ONNX
            file, bit for bit (of recurrent and attention layers, up to rounding). ``"low-memory"`` keeps the codes in
            memory and decodes a layer each time it runs, which is slower; outputs differ by rounding. ``"fast"``
            decodes as ``"exact"`` does, counts denormal numbers as zero and multiplies matrices in bfloat16 where an
            ARM processor can.

    Returns:
        New ``onnxruntime.SessionOptions``, the rest at its defaults.

    Raises:
        ImportError: The extra ``export`` is not installed.
        ValueError: ``mode`` is none of the above.
    """
    if mode not in get_args(SessionMode):
        raise ValueError(f"mode must be one of {', '.join(get_args(SessionMode))}, got {mode!r}")
    options = import_extra("onnxruntime", "export").SessionOptions()
    for entry, setting in _SESSION_ENTRIES[mode].items():
        options.add_session_config_entry(entry, setting)
    return options


def _check_inputs(inputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    examples = (inputs,) if isinstance(inputs, Tensor) else inputs
    if not isinstance(examples, tuple) or not examples or not all(isinstance(x, Tensor) for x in examples):
        raise TypeError(f"inputs must be a tensor or a tuple of tensors, got {type(inputs).__name__}")
    batches = {x.shape[0] if x.dim() else None for x in examples}
    if len(batches) > 1 or batches & {None, 0}:
        shapes = ", ".join(str(tuple(x.shape)) for x in examples)
        raise ValueError(f"inputs must have the batch as their first dimension, the same and not 0; got {shapes}")
    return examples


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
    """Outputs of the network, in the order of the ONNX file's."""
    try:
        with torch.no_grad():
            outputs = model(*examples)
    except Exception as error:
        shapes = ", ".join(str(tuple(x.shape)) for x in examples)
        raise ValueError(f"the network does not run on inputs of shape {shapes}: {error}") from error
    leaves = torch.utils._pytree.tree_leaves(outputs)
    return [leaf.numpy(force=True) for leaf in leaves if isinstance(leaf, Tensor)]


def _trace(model: nn.Module, examples: tuple[Tensor, ...]) -> Any:
    """The network's graph as it is, no weight folded or renamed."""
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


def _hide_weights(graph: Any, model: nn.Module, grids: Mapping[str, PowerOfTwoGrid]) -> dict[str, _Weight]:
    """Turn the initializers of quantized weights into inputs, which no optimization can fold away.

    Returns:
        The weights by their name in the graph; tied ones come once, as torch.onnx stores them.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    quantized = {id(p): grids[n] for name, p in parameters.items() if (n := name.replace("_orig_mod.", "")) in grids}
    weights = {}
    for name in list(graph.initializers):
        grid = quantized.get(id(parameters.get(name)))
        if grid is not None:
            value = graph.initializers.pop(name)
            value.const_value = None
            graph.inputs.append(value)
            weights[name] = _Weight(encode(grid, parameters[name]).numpy(force=True), grid)
    return weights


def _insert_weights(model: Any, weights: dict[str, _Weight], speed: bool) -> None:
    """Give the graph its weights back, as codes and the nodes that decode them."""
    graph = model.graph
    values = [value for value in graph.inputs if value.name in weights]
    for value in values:
        graph.inputs.remove(value)
    _fold_batch_norms(graph, weights)
    for value in values:
        if speed:
            _multiply_codes(graph, value, weights[value.name])
        if value.uses():
            _decode(graph, value, weights[value.name])
    passes = import_extra("onnx_ir.passes.common", "export")
    passes.RemoveUnusedNodesPass()(model)
    # Stack traces of the user's code, what every reader infers, names that none needs: a tenth of a small file.
    passes.ClearMetadataAndDocStringPass()(model)
    inner = [value for node in graph for value in node.outputs if not value.is_graph_output()]
    inner += graph.initializers.values()
    for value in inner:
        value.shape = value.type = None
    for value in [*inner, *graph.inputs, *graph.outputs]:
        value.metadata_props.clear()
    for node in graph:
        node.name = None
        _drop_defaults(node)
    model.ir_version = IR_VERSION
    if any(weight.grid.bits == 2 for weight in weights.values()):
        model.ir_version = IR_VERSION_INT2
        graph.opset_imports[""] = OPSET_INT2
    model.metadata_props[METADATA_KEY] = json.dumps(
        {name: {"bits": weight.grid.bits, "n1": weight.grid.n1} for name, weight in weights.items()},
        separators=(",", ":"),
    )


def _drop_defaults(node: Any) -> None:
    """Remove attributes that say what their absence says."""
    ir, onnx = (import_extra(module, "export") for module in ("onnx_ir", "onnx"))
    if node.domain != "":
        return
    schema = onnx.defs.get_schema(node.op_type, OPSET).attributes
    for name, attribute in list(node.attributes.items()):
        default = schema[name].default_value
        # Those of strides and dilations are in the text of the standard only.
        ones = name in ("strides", "dilations") and set(attribute.value) == {1}
        if ones or (default.name and ir.from_proto(default).value == attribute.value):
            del node.attributes[name]


def _initializer(graph: Any, name: str, array: Array, dtype: str | None = None) -> Any:
    ir = import_extra("onnx_ir", "export")
    array = np.ascontiguousarray(array).reshape(array.shape)
    tensor = ir.tensor(array if dtype is None else array.astype(ir.DataType[dtype].numpy(), copy=False), name=name)
    value = ir.Value(name=name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype))
    graph.register_initializer(value)
    return value


def _decode(graph: Any, value: Any, weight: _Weight) -> None:
    """Compute ``value`` from codes."""
    ir = import_extra("onnx_ir", "export")
    name, bits, magnitudes = value.name, weight.grid.bits, weight.grid.magnitudes
    if bits in DEQUANTIZED:
        dtype, highest = DEQUANTIZED[bits]
        lowest = highest + 1 - magnitudes
        # Indexed by the code itself: a negative code counts from the end.
        table = np.ldexp(_integers(np.r_[0 : magnitudes + 1, -magnitudes:0]), lowest).astype(ir.DataType[dtype].numpy())
        codes = _initializer(graph, f"{name}.codes", table[weight.codes], dtype)
        scale = _initializer(graph, f"{name}.scale", weight.scale(lowest))
        nodes = [ir.node("DequantizeLinear", [codes, scale], {"axis": weight.axis}, outputs=[value])]
    else:
        levels = np.ldexp(_integers(np.arange(-magnitudes, magnitudes + 1)), weight.grid.n2 or 0)
        codes = _initializer(graph, f"{name}.codes", weight.codes + magnitudes, _LOOKED_UP[bits])
        table = _initializer(graph, f"{name}.levels", levels, "FLOAT")
        index = ir.node("Cast", [codes], {"to": ir.DataType.INT32})
        if weight.factors.ndim:
            level = ir.node("Gather", [table, index.outputs[0]])
            shape = [-1 if axis == weight.axis else 1 for axis in range(weight.codes.ndim)]
            factors = _initializer(graph, f"{name}.scale", weight.factors.reshape(shape))
            nodes = [index, level, ir.node("Mul", [level.outputs[0], factors], outputs=[value])]
        else:
            nodes = [index, ir.node("Gather", [table, index.outputs[0]], outputs=[value])]
    graph.insert_before(graph[0], nodes)


def _fold_batch_norms(graph: Any, weights: dict[str, _Weight]) -> None:
    """Turn batch normalizations behind quantized layers into the weights' scales and the layers' biases."""
    ir = import_extra("onnx_ir", "export")
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
            [layer.inputs[0], value, _initializer(graph, f"{value.name}.bias", shift)],
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
    return 0 if _is_linear(layer) else None


def _is_linear(node: Any) -> bool:
    """Whether the node is x @ weight.T + bias."""
    if node.op_type != "Gemm":
        return False
    attributes = node.attributes
    factors, transposed = [attributes.get_float(a, 1.0) for a in ("alpha", "beta")], attributes.get_int("transA", 0)
    return factors == [1.0, 1.0] and not transposed and bool(attributes.get_int("transB", 0))


def _multiply_codes(graph: Any, value: Any, weight: _Weight) -> None:
    """Let linear layers with the weight ``value`` multiply by its codes; other users of it stay."""
    ir = import_extra("onnx_ir", "export")
    if weight.grid.bits not in _PLANES or weight.codes.ndim != 2:
        return
    products = [node for node in value.consumers() if _is_linear(node) and node.inputs[1] is value]
    transposes = [node for node in value.consumers() if node.op_type == "Transpose"]
    for transposed in (node.outputs[0] for node in transposes):  # for inputs of more than two dimensions
        products += [n for n in transposed.consumers() if n.op_type == "MatMul" and n.inputs[1] is transposed]
    planes = _planes(graph, value.name, weight) if products else []
    outputs, columns = weight.codes.shape
    bits, block = _PLANES[weight.grid.bits]
    attributes = {"N": outputs, "K": columns, "bits": bits, "block_size": block, "accuracy_level": _INT8_ACTIVATIONS}
    for product in products:
        nodes = [
            ir.node("MatMulNBits", [product.inputs[0], *plane], attributes, domain="com.microsoft") for plane in planes
        ]
        terms = [node.outputs[0] for node in nodes] + [bias for bias in product.inputs[2:] if bias is not None]
        while len(terms) > 1:
            nodes.append(ir.node("Add", [terms.pop(), terms.pop()]))
            terms.append(nodes[-1].outputs[0])
        ir.convenience.replace_nodes_and_values(graph, product, [product], nodes, [product.outputs[0]], terms)
    graph.remove([node for node in transposes if not node.outputs[0].uses()], safe=True)
    if products:
        graph.opset_imports["com.microsoft"] = 1


def _planes(graph: Any, name: str, weight: _Weight) -> list[list[Any]]:
    """Inputs of the MatMulNBits whose sum is the product with a weight: integers, scales, zero points."""
    outputs, columns = weight.codes.shape
    bits, block = _PLANES[weight.grid.bits]
    blocks = -(-columns // block)
    integers = np.zeros((outputs, blocks * block), np.int64)
    integers[:, :columns] = _integers(weight.codes)
    if weight.grid.bits == 5:  # ±128 fits no plane: 17·high + low, with low from -6 to 9 and high from -8 to 7
        low = (integers + 6) % 17 - 6
        planes = [(low, 1, 6), ((integers - low) // 17, 17, 8)]
    else:
        planes = [(integers, 1, 1 << bits - 1)]
    inputs = []
    for i, (plane, unit, zero_point) in enumerate(planes):
        parts = (plane + zero_point).reshape(outputs, blocks, -1, 8 // bits) << np.arange(0, 8, bits)
        scale = np.broadcast_to((weight.scale() * np.float32(unit))[..., None], (outputs, blocks))
        zero_points = np.full((outputs, -(-blocks * bits // 8)), zero_point * (255 // ((1 << bits) - 1)))
        inputs.append(
            [
                _initializer(graph, f"{name}.plane{i}", parts.sum(-1), "UINT8"),
                _initializer(graph, f"{name}.plane{i}.scale", scale),
                _initializer(graph, f"{name}.plane{i}.zero", zero_points, "UINT8"),
            ]
        )
    return inputs


def _write(model: Any, path: Path) -> None:
    ir = import_extra("onnx_ir", "export")
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    if size > 2**31 - 2**20:
        raise ValueError(f"the file would have {size / 2**30:.1f} GB, ONNX allows 2 GB; quantize more of the network")
    path.write_bytes(ir.to_proto(model).SerializeToString())


def _difference(path: Path, examples: tuple[Tensor, ...], expected: list[Array]) -> float:
    """The largest difference between outputs of the file and those expected; equal infinities do not differ."""
    ort = import_extra("onnxruntime", "export")
    session = ort.InferenceSession(str(path), session_options("exact"), providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]
    found = session.run(None, {name: x.numpy(force=True) for name, x in zip(names, examples, strict=True)})
    largest = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        different = (ours != theirs) & ~(np.isnan(ours) & np.isnan(theirs))
        differences = np.abs(ours[different].astype(np.float64) - theirs[different].astype(np.float64))
        largest = max(largest, float(differences.max(initial=0)))
    return largest
