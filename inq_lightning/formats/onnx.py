"""ONNX files whose quantized weights stay small: codes in the smallest type that ONNX Runtime executes.

The metadata of a file have, as JSON under ``inq_lightning``, the spec of each quantized weight's grid; files of the
first releases, which are still read, have its ``bits`` and ``n1``.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from inq_lightning._common import LazyExtra, atomic, import_extra, one_of
from inq_lightning.core.layer import Layer
from inq_lightning.formats.contents import Contents
from inq_lightning.formats.graph import OPSET, Array, Weight, as_examples, initializer, is_linear, trace
from inq_lightning.formats.layers import find_grids
from inq_lightning.grid import Grid, from_spec
from inq_lightning.grid.base import largest_multiple, table_order

SessionMode = Literal["exact", "low-memory", "fast"]
Activations = Literal["float", "int8"]

IR_VERSION = 10  # of OPSET
OPSET_INT2, IR_VERSION_INT2 = 25, 13
METADATA_KEY = "inq_lightning"

# Bits of a type → the types that DequantizeLinear takes, and that of the codes where none of these holds the multiples
# and a table has the levels.
DEQUANTIZED = {2: ["INT2"], 4: ["INT4"], 8: ["FLOAT8E4M3FN", "FLOAT8E5M2"]}
LOOKED_UP = {2: "UINT2", 4: "UINT4", 8: "UINT8"}
# Exponent of the largest power of two that is used of a floating-point type. The magnitudes of 5 to 7 bits are its
# powers of two, down to its subnormal numbers.
_HIGHEST = {"FLOAT8E4M3FN": 8, "FLOAT8E5M2": 15}


class _Plane(NamedTuple):
    """Integers that MatMulNBits multiplies: their bits, the fastest block of them, the largest multiple they hold."""

    bits: int
    block: int
    largest: int


# The last one twice: ±128 is 17·high + low, with low from -6 to 9 and high from -8 to 7.
_TWICE = _Plane(4, 256, 128)
_PLANES = (_Plane(2, 128, 1), _Plane(4, 256, 7), _Plane(8, 128, 127), _TWICE)
_INT8_ACTIVATIONS = 4  # its accuracy_level

ir, onnx, ort = (LazyExtra(module, "export") for module in ("onnx_ir", "onnx", "onnxruntime"))
passes = LazyExtra("onnx_ir.passes.common", "export")

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


def export_onnx(
    model: nn.Module,
    path: str | Path,
    inputs: Tensor | tuple[Any, ...] | Mapping[str, Any],
    *,
    layers: Iterable[Layer] | None = None,
    allow_partial: bool = False,
    activations: Activations = "float",
    fixed_batch: bool = False,
) -> float:
    """Write a quantized network as one ONNX file, and check the file in ONNX Runtime.

    Quantized weights are stored as codes that nodes of the graph decode without loss (docs/reference/onnx.md has the
    types); the rest stays float32. A batch normalization behind a quantized layer becomes scales of the decoding. The
    first dimension of the inputs is dynamic. The network is exported in eval mode and left as it was. Outputs are the
    tensors that it returns, in tuples, lists, dicts or dataclasses; a warning names what else it returns.

    Args:
        model: Trained network with float32 parameters.
        path: File to write; replaced if it exists.
        inputs: Example input of ``model.forward``, a tuple of its positional inputs, or a dict of those by name, on the
            model's device; the first dimension of each tensor is the batch. Numbers, truth values, texts and None in
            a tuple or dict become part of the graph.
        layers: `INQCallback.layers`; left out, the weights tell which grids they are on.
        allow_partial: Whether to keep parameters that are not on a grid in float32, rather than refuse the network.
        activations: ``"int8"`` makes linear layers whose largest level is at most 128 times the smallest (up to 5 bits,
            by default) MatMulNBits, an operator of ONNX Runtime alone, with inputs rounded to 8 bits: faster at batch
            1, with outputs that are off by about a percent.
            ``"float"`` leaves inputs as they are.
        fixed_batch: Whether the file takes batches of the example's size only, for networks that torch cannot trace
            with a dynamic one; inputs may then have any shape.

    Returns:
        The largest absolute difference between the outputs of torch and of ONNX Runtime (mode ``"exact"``).

    Raises:
        ImportError: The extra ``export`` is not installed.
        TypeError: ``inputs`` is no tensor, nor a tuple or dict of tensors.
        ValueError: ``activations`` is unknown, parameters are not on their grids or not float32, the network does not
            run on ``inputs``, returns no tensor or cannot be exported, or the file would be larger than 2 GB.
        OSError: The file cannot be written.
    """
    for module in ("onnx", "onnxscript", "onnx_ir", "onnxruntime"):
        import_extra(module, "export")
    one_of("activations", activations, Activations)
    path = Path(path)
    examples = as_examples(inputs, fixed_batch)
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype is not torch.float32:
            raise ValueError(f"{name} is {parameter.dtype}; an ONNX file needs float32, so call model.float() first")
    grids = find_grids(model, layers, allow_partial)
    with atomic(path) as partial:
        partial.touch()  # an export takes seconds: fail before it
        graph = trace(model, examples, grids, fixed_batch)
        for weight in graph.weights.values():
            if activations == "int8":
                _multiply_codes(graph.model.graph, weight)
            if weight.value.uses():
                _decode(graph.model.graph, weight)
        _slim(graph.model)
        _describe(graph.model, {name: weight.grid for name, weight in graph.weights.items()})
        _write(graph.model, partial)
        return _difference(partial, examples.tensors, graph.outputs)


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
    one_of("mode", mode, SessionMode)
    options = ort.SessionOptions()
    for entry, setting in _SESSION_ENTRIES[mode].items():
        options.add_session_config_entry(entry, setting)
    return options


def _slim(model: Any) -> None:
    """Leave out what readers infer or know: unused nodes, shapes, names, stack traces of the user's code, defaults."""
    passes.RemoveUnusedNodesPass()(model)
    passes.ClearMetadataAndDocStringPass()(model)
    graph = model.graph
    inner = [value for node in graph for value in node.outputs if not value.is_graph_output()]
    inner += graph.initializers.values()
    for value in inner:
        value.shape = value.type = None
    for value in [*inner, *graph.inputs, *graph.outputs]:
        value.metadata_props.clear()
    for node in graph:
        node.name = None
        _drop_defaults(node)


def _drop_defaults(node: Any) -> None:
    """Remove attributes that say what their absence says."""
    if node.domain != "":
        return
    schema = onnx.defs.get_schema(node.op_type, OPSET).attributes
    for name, attribute in list(node.attributes.items()):
        default = schema[name].default_value
        # Those of strides and dilations are in the text of the standard only.
        ones = name in ("strides", "dilations") and set(attribute.value) == {1}
        if ones or (default.name and ir.from_proto(default).value == attribute.value):
            del node.attributes[name]


def _describe(model: Any, grids: Mapping[str, Grid]) -> None:
    """Say in the file what it takes to run it, and what its codes stand for."""
    model.ir_version = IR_VERSION
    if any(grid.bits == 2 for grid in grids.values()):
        model.ir_version = IR_VERSION_INT2
        model.graph.opset_imports[""] = OPSET_INT2
    specs = {name: grid.spec() for name, grid in grids.items()}
    model.metadata_props[METADATA_KEY] = json.dumps(specs, separators=(",", ":"))


def _decode(graph: Any, weight: Weight) -> None:
    """Compute a weight from codes."""
    value, codes, grid = weight.value, weight.codes, weight.grid
    if (holding := _type_that_holds(grid)) is not None:
        dtype, table = holding
        stored = initializer(graph, f"{value.name}.codes", table[codes], dtype)
        scale = initializer(graph, f"{value.name}.scale", weight.scale(_unit(grid, dtype)))
        nodes = [ir.node("DequantizeLinear", [stored, scale], {"axis": weight.axis}, outputs=[value])]
    else:
        dtype = next(LOOKED_UP[bits] for bits in LOOKED_UP if 1 << bits >= len(grid.codes))
        stored = initializer(graph, f"{value.name}.codes", np.searchsorted(grid.codes, codes), dtype)
        table = np.ldexp(grid.multiples(torch.tensor(grid.codes)).numpy(), grid.step)
        levels = initializer(graph, f"{value.name}.levels", table, "FLOAT")
        index = ir.node("Cast", [stored], {"to": ir.DataType.INT32})
        if weight.factors.ndim:
            level = ir.node("Gather", [levels, index.outputs[0]])
            shape = [-1 if axis == weight.axis else 1 for axis in range(codes.ndim)]
            factors = initializer(graph, f"{value.name}.scale", weight.factors.reshape(shape))
            nodes = [index, level, ir.node("Mul", [level.outputs[0], factors], outputs=[value])]
        else:
            nodes = [index, ir.node("Gather", [levels, index.outputs[0]], outputs=[value])]
    graph.insert_before(graph[0], nodes)


def _type_that_holds(grid: Grid) -> tuple[str, Array] | None:
    """The type for DequantizeLinear that holds a grid's multiples exactly, and these in it, indexed by the code."""
    multiples = grid.multiples(torch.tensor(table_order(grid.codes))).numpy()
    for dtype in next(DEQUANTIZED[bits] for bits in DEQUANTIZED if bits >= grid.bits):
        exact = np.ldexp(multiples, _unit(grid, dtype))
        table: Array = exact.astype(ir.DataType[dtype].numpy())
        if np.array_equal(table.astype(np.float64), exact):
            return dtype, table
    return None


def _unit(grid: Grid, dtype: str) -> int:
    """Exponent of the grid's unit in a type of the file: 0, or what makes its largest multiple the highest power."""
    highest = _HIGHEST.get(dtype)
    return 0 if highest is None else highest - max(largest_multiple(grid).bit_length() - 1, 0)


def _multiply_codes(graph: Any, weight: Weight) -> None:
    """Let linear layers multiply by a weight's codes; other users of it stay."""
    value = weight.value
    plane = _plane_that_holds(weight.grid)
    if weight.codes.ndim != 2 or plane is None:
        return
    products = [node for node in value.consumers() if is_linear(node) and node.inputs[1] is value]
    transposes = [node for node in value.consumers() if node.op_type == "Transpose"]
    for transposed in (node.outputs[0] for node in transposes):  # for inputs of more than two dimensions
        products += [n for n in transposed.consumers() if n.op_type == "MatMul" and n.inputs[1] is transposed]
    inputs = _planes(graph, weight, plane) if products else []
    outputs, columns = weight.codes.shape
    attributes = {"N": outputs, "K": columns, "bits": plane.bits, "block_size": plane.block}
    attributes["accuracy_level"] = _INT8_ACTIVATIONS
    for product in products:
        nodes = [ir.node("MatMulNBits", [product.inputs[0], *i], attributes, domain="com.microsoft") for i in inputs]
        terms = [node.outputs[0] for node in nodes] + [bias for bias in product.inputs[2:] if bias is not None]
        while len(terms) > 1:
            nodes.append(ir.node("Add", [terms.pop(), terms.pop()]))
            terms.append(nodes[-1].outputs[0])
        ir.convenience.replace_nodes_and_values(graph, product, [product], nodes, [product.outputs[0]], terms)
    graph.remove([node for node in transposes if not node.outputs[0].uses()], safe=True)
    if products:
        graph.opset_imports["com.microsoft"] = 1


def _plane_that_holds(grid: Grid) -> _Plane | None:
    """The narrowest integers that hold a grid's multiples; None where none does."""
    return next((plane for plane in _PLANES if largest_multiple(grid) <= plane.largest), None)


def _planes(graph: Any, weight: Weight, plane: _Plane) -> list[list[Any]]:
    """Inputs of the MatMulNBits whose sum is the product with a weight: integers, scales, zero points."""
    name, (outputs, columns) = weight.value.name, weight.codes.shape
    bits, block, _ = plane
    blocks = -(-columns // block)
    integers = np.zeros((outputs, blocks * block), np.int64)
    integers[:, :columns] = weight.multiples
    if plane is _TWICE:
        low = (integers + 6) % 17 - 6
        planes = [(low, 1, 6), ((integers - low) // 17, 17, 8)]
    else:
        planes = [(integers, 1, 1 << bits - 1)]
    inputs = []
    for i, (digits, unit, zero_point) in enumerate(planes):
        parts = (digits + zero_point).reshape(outputs, blocks, -1, 8 // bits) << np.arange(0, 8, bits)
        scale = np.broadcast_to((weight.scale() * np.float32(unit))[..., None], (outputs, blocks))
        zero_points = np.full((outputs, -(-blocks * bits // 8)), zero_point * (255 // ((1 << bits) - 1)))
        inputs.append(
            [
                initializer(graph, f"{name}.plane{i}", parts.sum(-1), "UINT8"),
                initializer(graph, f"{name}.plane{i}.scale", scale),
                initializer(graph, f"{name}.plane{i}.zero", zero_points, "UINT8"),
            ]
        )
    return inputs


def _write(model: Any, path: Path) -> None:
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    if size > 2**31 - 2**20:
        raise ValueError(f"the file would have {size / 2**30:.1f} GB, ONNX allows 2 GB; quantize more of the network")
    path.write_bytes(ir.to_proto(model).SerializeToString())


def _difference(path: Path, examples: tuple[Tensor, ...], expected: list[Array]) -> float:
    """The largest difference between outputs of the file and those expected; equal infinities do not differ."""
    session = ort.InferenceSession(str(path), session_options("exact"), providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]
    found = session.run(None, {name: x.numpy(force=True) for name, x in zip(names, examples, strict=True)})
    largest = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        different = (ours != theirs) & ~(np.isnan(ours) & np.isnan(theirs))
        differences = np.abs(ours[different].astype(np.float64) - theirs[different].astype(np.float64))
        largest = max(largest, float(differences.max(initial=0)))
    return largest


# ---- reading ---------------------------------------------------------------------------------------------------------


def recognizes(head: bytes) -> bool:
    """Whether a file that begins like this may be an ONNX file."""
    return head[:1] == b"\x08"  # protobuf's field 1, ONNX's IR version


def read_onnx(path: str | os.PathLike[str]) -> Contents:
    """Read the weights of an ONNX file, those of :func:`export_onnx` from their codes; nothing in it is run.

    Raises:
        ImportError: The extra ``export`` is not installed.
        ValueError: It is no ONNX file, or is damaged.
        OSError: There is no such file.
    """
    load = onnx.load  # outside: that onnx is missing is not the file's fault
    state, layers, stored = {}, [], {}
    try:
        model = load(path)
        arrays = {x.name: onnx.numpy_helper.to_array(x) for x in model.graph.initializer}
        sizes = {x.name: len(x.raw_data) or arrays[x.name].nbytes for x in model.graph.initializer}
        texts = {entry.key: entry.value for entry in model.metadata_props}
        metadata = json.loads(texts.get(METADATA_KEY, "{}"))
        for name, spec in metadata.items():
            grid = from_spec({"kind": "power_of_two"} | spec)  # the first files had n1 and bits alone
            state[name] = _decoded(name, grid, arrays, model.graph.node)
            layers.append(Layer(name, tuple(state[name].shape), grid.bits, grid, state[name].numel()))
            parts = [x for x in sizes if re.fullmatch(re.escape(name) + r"\.(codes|levels|scale|plane.*)", x)]
            stored[name] = sum(sizes.pop(part) for part in parts)
    except OSError:
        raise
    except Exception as error:  # of protobuf, of JSON, or whatever a foreign hand has made of our file
        raise ValueError(f"{path} cannot be read as an ONNX file: {error}") from error
    rest = {name: torch.from_numpy(arrays[name].copy()) for name in sizes if arrays[name].dtype.kind in "fiub"}
    return Contents("onnx", state | rest, layers, stored=stored, metadata=metadata)


def _decoded(name: str, grid: Grid, arrays: Mapping[str, Array], nodes: Iterable[Any]) -> Tensor:
    """A weight from its codes, without the factors of a folded norm; float32."""
    if f"{name}.levels" in arrays:
        return torch.from_numpy(arrays[f"{name}.levels"][arrays[f"{name}.codes"].astype(int)])
    if f"{name}.codes" in arrays:
        codes = arrays[f"{name}.codes"]
        types = itertools.chain(*DEQUANTIZED.values())
        dtype = next(dtype for dtype in types if ir.DataType[dtype].numpy() == codes.dtype)
        multiples = np.ldexp(codes.astype(np.float64), -_unit(grid, dtype))
    elif f"{name}.plane0" in arrays:
        multiples = _sum_of_planes(name, arrays, nodes)
    else:
        raise ValueError(f"the file has no codes of {name}")
    return torch.from_numpy(np.ldexp(multiples, grid.step).astype(np.float32))


def _sum_of_planes(name: str, arrays: Mapping[str, Array], nodes: Iterable[Any]) -> Array:
    """The integers that MatMulNBits multiplies: the sum of its planes, each in units of its scale."""
    node = next(node for node in nodes if f"{name}.plane0" in node.input)
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    bits, integers = attributes["bits"], np.zeros(())
    for part in (part for part in arrays if re.fullmatch(re.escape(name) + r"\.plane\d+", part)):
        plane, unit = arrays[part], arrays[f"{part}.scale"].flat[0] / arrays[f"{name}.plane0.scale"].flat[0]
        digits = np.stack([plane >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)], -1)
        digits = digits.reshape(len(plane), -1)[:, : attributes["K"]].astype(np.float64)
        integers = integers + unit * (digits - (int(arrays[f"{part}.zero"].flat[0]) & (1 << bits) - 1))
    return integers
