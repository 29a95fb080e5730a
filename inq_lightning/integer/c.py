"""An integer network as C without a multiplier: fixed kernels, a person can read them, and generated tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor

from inq_lightning._common import one_of
from inq_lightning.integer.memory import Block, place
from inq_lightning.integer.network import IntegerNetwork
from inq_lightning.integer.operations import (
    Average,
    Concat,
    Max,
    Operation,
    Pad,
    Product,
    Reshape,
    Scale,
    Slice,
    Sum,
)
from inq_lightning.integer.scaling import Scaling
from inq_lightning.integer.weights import Table, code_bits, list_inputs, pack, planes_of, rows_of

Layout = Literal["packed", "lists"]

_KERNELS = Path(__file__).parent / "firmware"
_FIXED = ("inq_kernels.h", "inq_lanes.h", "inq_product.h", "inq_test.c", "Makefile", "README.md")
_VECTORS = 4  # made up where there are no images
_DIMENSIONS = 4  # of what is moved
_WORD = 1 << 32
_COLUMN = {"packed": 4, "lists": 8}  # bytes
_CODE = {"packed": 4, "lists": 2}
_NARROW = 256  # inputs that one byte tells apart


@dataclass(frozen=True)
class CExport:
    """What was written.

    Attributes:
        folder: Where.
        table_bytes: Weights, biases and shifts, which the firmware keeps in flash.
        buffer_bytes: The static buffer, which it keeps in RAM; a stack of some hundred bytes comes to it.
    """

    folder: Path
    table_bytes: int
    buffer_bytes: int


def export_c(
    network: IntegerNetwork, folder: str | Path, layout: Layout = "packed", images: Tensor | None = None
) -> CExport:
    """Write a network as a folder of C99 that has no multiplication, division, floating point, malloc or library.

    `inq_predict` of `inq_network.c` gives the logits that :meth:`IntegerNetwork.run` gives, every one.

    Args:
        network: What :func:`~inq_lightning.lower` has made.
        folder: What to write; one of an earlier export is replaced.
        layout: ``"packed"``: weights as codes packed into words, the smallest. ``"lists"``: for each output the inputs
            that take each magnitude, the fastest.
        images: Inputs for the test vectors, as for :meth:`IntegerNetwork.run`; left out, a few at random.

    Raises:
        ValueError: ``layout`` is none of the two, there are no images or some of another shape or beyond the steps of
            an input, or the network is larger than the tables can say; the message names the layer.
        FileExistsError: ``folder`` is there and holds something else.
    """
    one_of("layout", layout, Layout)
    target = Path(folder).absolute()
    if images is None:
        generator = torch.Generator().manual_seed(0)
        shape = (_VECTORS, *network.shape)
        images = torch.randint(network.input_low, network.input_high + 1, shape, generator=generator)
    program = Program(network, layout)
    write(program, target, images, _KERNELS / f"{layout}.h")
    return CExport(target, program.table_bytes, program.buffer_bytes)


def write(program: Program, target: Path, images: Tensor, weights: Path) -> None:
    """Write a program, its test vectors, and the kernels.

    Args:
        program: What is generated.
        target: The folder.
        images: See :func:`export_c`.
        weights: The kernel that reads the weights.
    """
    network = program.network
    steps = network.round_input(images) if images.is_floating_point() else images
    low, high = network.input_low, network.input_high
    if tuple(steps.shape[1:]) != network.shape or not len(steps) or int(steps.min()) < low or int(steps.max()) > high:
        raise ValueError(
            f"images must be at least one input of shape {network.shape}, in steps from {low} to {high} where they are "
            f"whole numbers, got {tuple(images.shape)}"
        )
    files = {
        "inq_network.h": _header(network, program),
        "inq_network.c": program.source(),
        "inq_vectors.h": _vectors(steps + program.values[0].zero, network.run(steps).flatten(1)),
        "inq_weights.h": weights.read_text(),
    } | {name: (_KERNELS / name).read_text() for name in _FIXED}
    with _whole_folder(target) as partial:
        for name, text in files.items():
            (partial / name).write_text(text)


@contextmanager
def _whole_folder(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` to write to, which takes its name once it is complete."""
    if target.exists() and not (target / "inq_network.h").exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} is there and is not what export_c wrote; give another folder, or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        partial = Path(scratch) / "new"
        partial.mkdir()
        yield partial
        if target.exists():
            target.rename(Path(scratch) / "old")
        partial.rename(target)


@dataclass(frozen=True)
class _Value:
    """A value in C.

    Attributes:
        wide: Whether its numbers are int32_t; else they are bytes.
        zero: What stands for 0 in a byte.
        low: Least number.
        high: Largest number.
        size: How many numbers.
    """

    wide: bool
    zero: int
    low: int
    high: int
    size: int

    @property
    def bytes(self) -> int:
        return self.size * (4 if self.wide else 1)


class Program:
    """The generated source, and what it takes.

    Attributes:
        code_bytes: Of one number of a convolution's weights.
        row_code_bytes: Of one number of a linear layer's weights.
        table_bytes: See :class:`CExport`.
        buffer_bytes: Likewise.
    """

    def __init__(self, network: IntegerNetwork, layout: Layout) -> None:
        self.network, self.layout, self.code_bytes = network, layout, _CODE[layout]
        self.tables: list[str] = []
        self.calls: list[str] = []
        self.alike: dict[str, set[object]] = {}  # what fields of descriptors hold, by the macro that reads them
        self.table_bytes = 0
        rows = [op.weight.shape[1] for op in network.products if op.weight.dim() == 2]
        self.row_code_bytes = 1 if layout == "lists" and max(rows, default=0) <= _NARROW else self.code_bytes
        self.bits = self._code_lengths()
        self.roots = [0]  # a reshaped value lies where it lay
        for k, operation in enumerate(network.operations, 1):
            self.roots.append(self.roots[operation.sources[0]] if isinstance(operation, Reshape) else k)
        self.pooled = {k: pool for k in range(1, len(self.roots)) if (pool := self._pool(k))}
        for k, pool in self.pooled.items():
            self.roots = [k if root == pool else root for root in self.roots]
        self.last = self.roots[-1]
        if self.last == 0:
            raise ValueError("the network computes nothing: its result is its input")
        self.values = [_value("the input", network.input_low, network.input_high, network.shape)]
        self.values += [
            _value(op.name, op.low, op.high, self._shape(self.pooled.get(k, k)), wide=k == self.last)
            for k, op in enumerate(network.operations, 1)
        ]
        self.encoded = {id(op): self.encode(op) for op in network.products}
        self.starts, self.scratch, self.buffer_bytes = self._memory()
        for k, operation in enumerate(network.operations, 1):
            if self.roots[k] == k:
                self._emit(k, operation)

    def _pool(self, k: int) -> int | None:
        """The maximum over the tiles of a convolution that nothing else reads, which it takes itself."""
        operations = self.network.operations
        users = [j for j, op in enumerate(operations, 1) if k in op.sources]
        product, pool = operations[k - 1], operations[users[0] - 1] if len(users) == 1 else None
        if not isinstance(product, Product) or product.weight.dim() == 2 or not isinstance(pool, Max):
            return None
        tiles = pool.kernel == pool.stride == (2, 2) and pool.padding == (0, 0) and pool.dilation == (1, 1)
        return users[0] if tiles else None

    def _code_lengths(self) -> dict[int, int]:
        """Code length of each product, by identity; where grids have one, the kernel unrolls by it."""
        lengths = {id(op): code_bits(rows_of(op)) for op in self.network.products}
        if len({op.bits for op in self.network.products}) == 1:
            lengths = dict.fromkeys(lengths, max(lengths.values()))
        return lengths

    def _memory(self) -> tuple[dict[int, int], dict[int, int], int]:
        """Where values and the scratch space of operations begin, in bytes, and the size of all."""
        operations = self.network.operations
        used = {k: k for k in self.roots}
        for k, operation in enumerate(operations, 1):
            for source in operation.sources:
                used[self.roots[source]] = k
        values = [k for k in used if k not in (0, self.last)]
        blocks = [Block(self.values[k].bytes, k, used[k]) for k in values]
        scratch = {k: self._scratch(op) for k, op in enumerate(operations, 1) if isinstance(op, Product)}
        scratch = {k: size for k, size in scratch.items() if size}
        starts, total = place(blocks + [Block(size, k, k) for k, size in scratch.items()])
        _check("the network", "bytes of RAM", total, (1 << 31) - 1)
        return dict(zip(values, starts, strict=False)), dict(zip(scratch, starts[len(values) :], strict=True)), total

    def _scratch(self, product: Product) -> int:
        """Bytes that a product works in: columns of four pixels, then the bytes of wide inputs."""
        source = self.values[self.roots[product.sources[0]]]
        planes, _ = self._planes(source)
        return self._columns(product, planes) + (planes * source.size if source.wide else 0)

    def _columns(self, product: Product, planes: int) -> int:
        """Bytes of the columns of a convolution."""
        return _COLUMN[self.layout] * planes * self.encoded[id(product)].fields[0] if product.weight.dim() == 4 else 0

    def _planes(self, source: _Value) -> tuple[int, int]:
        return planes_of(source.low, source.high) if source.wide else (1, source.zero)

    # ---- text --------------------------------------------------------------------------------------------------------

    def source(self) -> str:
        """The file."""
        memory = [f"static uint32_t inq_memory[{-(-self.buffer_bytes // 4)}];", ""] if self.buffer_bytes else []
        return "\n".join(
            [
                "/* Generated by inq-lightning: the tables of a network, and what is done with them. */",
                "",
                '#include "inq_network.h"',
                "",
                *self._common(),
                "",
                '#include "inq_kernels.h"',
                *(['#include "inq_product.h"'] if self.bits else []),
                "",
                *memory,
                *self.tables,
                "void inq_predict(const uint8_t *image, int32_t *logits)",
                "{",
                *self._declared(),
                *self.calls,
                "}",
                "",
            ]
        )

    def _common(self) -> list[str]:
        """What is the same in all layers: numbers in place of fields."""
        lengths = set(self.bits.values())
        defines: dict[str, object] = {"INQ_WIDE": int(any(self.values[self.roots[k]].wide for k in self._read()))}
        if self.layout == "packed" and lengths:
            one = len(lengths) == 1
            defines["INQ_BITS"] = max(lengths) if one else "weights->bits"
            defines["INQ_EACH"] = 32 // max(lengths) if one else "weights->each"
            defines["INQ_CODES"] = 1 << max(lengths)
            defines["INQ_BLOCKS"] = max(table.blocks for table in self.encoded.values())
        if self.row_code_bytes == 1:
            defines["INQ_NARROW"] = ""
        for macro, found in self.alike.items():
            if len(found) == 1:
                defines[macro] = found.pop()
        return [f"#define {name} {value}".rstrip() for name, value in defines.items()]

    def _read(self) -> Iterator[int]:
        """Places of values that operations read."""
        for k, op in enumerate(self.network.operations, 1):
            if self.roots[op.sources[0]] != self.roots[k]:
                yield from op.sources

    def _declared(self) -> list[str]:
        """Values as the kernels know them, those alone that a call names."""
        lines = []
        for k in sorted({*self.roots}):
            value = self.values[k]
            data = {0: "(void *)image", self.last: "logits"}.get(k) or f"inq_memory + {self.starts[k] // 4}"
            storage = "const" if k in (0, self.last) else "static const"
            if any(re.search(rf"&value_{k}\b", call) for call in self.calls):
                lines.append(f"    {storage} inq_value value_{k} = {{{data}, {value.zero}, {int(value.wide)}}};")
        return lines

    def _value_at(self, place: int) -> str:
        return f"&value_{self.roots[place]}"

    def _bytes_at(self, place: int) -> str:
        """Bytes of a value."""
        root = self.roots[place]
        return "image" if root == 0 else f"(const uint8_t *)(inq_memory + {self.starts[root] // 4})"

    def _table(self, kind: str, name: str, numbers: Iterable[int]) -> str:
        """Define an array; returns its name."""
        numbers = list(numbers) or [0]
        width = {"uint8_t": 1, "uint32_t": 4, "inq_code": self.code_bytes, "inq_row_code": self.row_code_bytes}[kind]
        self.table_bytes += width * len(numbers)
        texts = [f"0x{n:08x}" if width == 4 else str(n) for n in numbers]
        per = 10 if width == 4 else 24
        lines = [", ".join(texts[i : i + per]) for i in range(0, len(texts), per)]
        self.tables += [f"static const {kind} {name}[] = {{", *(f"    {line}," for line in lines), "};", ""]
        return name

    def _describe(self, kind: str, k: int, fields: list[tuple[str, object]], part: str = "") -> str:
        """Define an operation's descriptor; returns a pointer to it."""
        lines = [f"    .{field} = {_initializer(value)}," for field, value in fields]
        self.tables += [f"static const {kind} operation_{k}{part} = {{", *lines, "};", ""]
        return f"&operation_{k}{part}"

    def _scaling(self, k: int, op: Operation, scaling: Scaling, excess: Tensor) -> str:
        """Tables of a scaling, whose sums have ``excess`` too much, channel by channel; returns an initializer."""
        if not scaling.low <= 0 <= scaling.high:
            raise ValueError(
                f"{op.name}: its results, {scaling.low} to {scaling.high}, leave out 0, which C code needs"
            )
        factors = scaling.factors
        bias = [int(b) - int(f) * int(e) for b, f, e in zip(scaling.bias, factors, excess, strict=True)]
        shifts: list[int] = []
        for c in range(len(factors)):
            shifts.append(int(scaling.rights[c]))
            for sign, left in zip(scaling.signs[:, c].tolist(), scaling.lefts[:, c].tolist(), strict=True):
                shifts.append({1: 0, -1: 32, 0: 64}[sign] + left)
        biases = self._table("uint32_t", f"bias_{k}", (b % _WORD for b in bias))
        rights = self._table("uint8_t", f"terms_{k}", shifts)
        shared = int(len(factors) == 1)
        return f"{{{biases}, {rights}, {scaling.terms}, {shared}, {_int32(scaling.low)}, {_int32(scaling.high)}}}"

    # ---- operation by operation --------------------------------------------------------------------------------------

    def _emit(self, k: int, op: Operation) -> None:
        shape = " x ".join(map(str, op.shape))
        self.tables += [f"/* {_comment(op.name)}: {type(op).__name__.lower()} of {shape} */", ""]
        self.calls.append(f"    /* {_comment(op.name)} */")
        for size in op.shape:
            _check(op.name, "numbers in a dimension", size)
        if isinstance(op, Product):
            self._product(k, op)
        elif isinstance(op, (Scale, Sum)):
            self._sum(k, op)
        elif isinstance(op, (Average, Max)):
            self._window(k, op)
        elif isinstance(op, (Concat, Pad, Slice)):
            self._move(k, op)
        else:
            raise ValueError(f"{op.name}: C code has no {type(op).__name__}")

    def _shape(self, place: int) -> tuple[int, ...]:
        return self.network.operations[place - 1].shape if place else self.network.shape

    def _product(self, k: int, op: Product) -> None:
        source, shape = self.values[self.roots[op.sources[0]]], self._shape(op.sources[0])
        planes, zero = self._planes(source)
        rows, convolution = rows_of(op), op.weight.dim() == 4
        table = self.encoded[id(op)]
        # In whole numbers: what stands for 0 in the inputs, and what each byte of them has too much.
        excess = rows.sum(1) * zero + table.excess * sum(1 << 8 * p for p in range(planes))
        name = self._table("inq_code" if convolution else "inq_row_code", f"weights_{k}", table.numbers)
        shifts = self._table("uint8_t", f"shifts_{k}", table.shifts)
        weights = f"{{{name}, {shifts}, {', '.join(map(str, table.fields))}}}"
        scaling = self._scaling(k, op, op.scaling, excess)
        scratch = self.scratch.get(k, 0) // 4
        if source.wide:
            value = self._value_at(op.sources[0])
            bytes_ = f"(uint8_t *)(inq_memory + {scratch + self._columns(op, planes) // 4})"
            self.calls.append(f"    inq_split({value}, {source.size}u, {zero}u, {planes}, {bytes_});")
        else:
            bytes_ = self._bytes_at(op.sources[0])
        fields: list[tuple[str, object]] = [("weights", weights), ("scaling", scaling)]
        self._compare("INQ_", {"planes": planes}, "planes")
        if not convolution:
            at = self._describe("inq_linear_t", k, [*fields, ("outputs", len(rows)), ("planes", planes)])
            self.calls.append(f"    inq_linear({at}, {bytes_}, {self._value_at(k)});")
            return
        channels, height, width = shape
        pooled = int(k in self.pooled)
        rows_, columns = (n & -2 if pooled else n for n in op.shape[1:])  # an odd one is left over by the pool
        left, _, top, _ = op.padding
        numbers: dict[str, Any] = {
            "groups": op.groups,
            "outputs": len(rows) // op.groups,
            "channels": channels // op.groups,
            "height": height,
            "width": width,
            "rows": rows_,
            "columns": columns,
            "kernel": op.weight.shape[2:],
            "stride": op.stride,
            "dilation": op.dilation,
            "padding": (top, left),
        }
        self._check_all(op.name, numbers)
        numbers |= {
            "pooled": pooled,
            "planes": planes,
            "zeros": [zero >> 8 * p & 255 for p in range(planes)],
            "plane": height * width,
            "group": channels // op.groups * height * width,
            "all": channels * height * width,
            "result": rows_ * columns >> 2 * pooled,
            "tiles": columns // 2 if pooled else 2 * columns,
            "first": f"{-top * width % _WORD}u",
            "row_stride": op.stride[0] * width,
            "row_step": op.dilation[0] * width,
        }
        self._compare("INQ_", numbers, "kernel", "stride", "dilation", "padding", "groups", "pooled")
        at = self._describe("inq_convolution_t", k, [*fields, *numbers.items()])
        self.calls.append(
            f"    inq_convolution({at}, {bytes_}, {self._value_at(k)}, (inq_column *)(inq_memory + {scratch}));"
        )

    def encode(self, op: Product) -> Table:
        """A product's weights as tables."""
        source, rows = self.values[self.roots[op.sources[0]]], rows_of(op)
        largest = None if op.weight.dim() == 2 else 255 if source.wide else source.high + source.zero
        if self.layout == "packed":
            table = pack(rows, self.bits[id(op)], largest)
        else:
            table = list_inputs(rows, largest, 1 if largest is None else _COLUMN["lists"])
            _check(op.name, "lists of one output", table.fields[-1], 255)
            _check(op.name, "bytes of inputs that a list tells apart", max(table.numbers, default=0), 65535)
        _check(op.name, "inputs of one output", rows.shape[1])
        return table

    def _sum(self, k: int, op: Scale | Sum) -> None:
        channels = 1 if len(op.scaling.bias) == 1 else op.shape[0]
        scaling = self._scaling(k, op, op.scaling, torch.zeros(channels, dtype=torch.int64))
        lefts = op.lefts if isinstance(op, Sum) else (0, 0)
        fields = {"scaling": scaling, "channels": channels, "size": op.elements // channels, "lefts": lefts}
        at = self._describe("inq_sum_t", k, list(fields.items()))
        a, b = (self._value_at(op.sources[0]), self._value_at(op.sources[1]) if isinstance(op, Sum) else "0")
        self.calls.append(f"    inq_sum({at}, {a}, {b}, {self._value_at(k)});")

    def _window(self, k: int, op: Average | Max) -> None:
        channels, height, width = self._shape(op.sources[0])
        scaling = "0"
        if isinstance(op, Average):
            scaling = f"&scaling_{k}"
            text = self._scaling(k, op, op.scaling, torch.zeros(len(op.scaling.bias), dtype=torch.int64))
            self.tables += [f"static const inq_scaling scaling_{k} = {text};", ""]
        dilation = op.dilation if isinstance(op, Max) else (1, 1)
        numbers: dict[str, Any] = {
            "channels": channels,
            "height": height,
            "width": width,
            "rows": op.shape[1],
            "columns": op.shape[2],
            "kernel": op.kernel,
            "stride": op.stride,
            "dilation": dilation,
            "padding": op.padding,
        }
        self._check_all(op.name, numbers)
        numbers |= {
            "plane": height * width,
            "first": f"{(-op.padding[0] * width - op.padding[1]) % _WORD}u",
            "row_stride": op.stride[0] * width,
            "row_step": dilation[0] * width,
        }
        self._compare("INQ_WINDOW_", numbers, "kernel", "stride", "dilation", "padding")
        self.alike.setdefault("INQ_WINDOW_SCALING", set()).update({scaling, "0"})  # for all only where there is none
        fields = [("scaling", scaling), ("least", _int32(op.low)), *numbers.items()]
        at = self._describe("inq_window_t", k, fields)
        self.calls.append(f"    inq_window({at}, {self._value_at(op.sources[0])}, {self._value_at(k)});")

    def _move(self, k: int, op: Concat | Pad | Slice) -> None:
        zeros, ones = [0] * len(op.shape), [1] * len(op.shape)
        if isinstance(op, Slice):
            begins, _, steps = (list(numbers) for numbers in zip(*op.slices, strict=True))
            self._copy(k, op, 0, op.shape, begins, zeros, steps)
        elif isinstance(op, Pad):
            before, behind = zeros.copy(), zeros.copy()
            for d in range(len(op.amounts) // 2):
                before[-1 - d], behind[-1 - d] = op.amounts[2 * d : 2 * d + 2]
            shape = self._shape(op.sources[0])
            counts = [n + min(a, 0) + min(b, 0) for n, a, b in zip(shape, before, behind, strict=True)]
            self.calls.append(f"    inq_clear({self._value_at(k)}, {op.elements}u);")
            self._copy(k, op, 0, counts, [max(-a, 0) for a in before], [max(a, 0) for a in before], ones)
        else:
            to = zeros.copy()
            for source, left in enumerate(op.lefts):
                shape = self._shape(op.sources[source])
                self._copy(k, op, source, shape, zeros, to, ones, left)
                to[op.axis - 1] += shape[op.axis - 1]

    def _copy(
        self,
        k: int,
        op: Operation,
        source: int,
        counts: Sequence[int],
        begins: list[int],
        to: list[int],
        steps: list[int],
        left: int = 0,
    ) -> None:
        """Copy a box of a source into the result: where it begins in either, and the steps in the source."""
        _check(op.name, "dimensions", len(op.shape), _DIMENSIONS)
        here, there = _strides(self._shape(op.sources[source])), _strides(op.shape)
        more = _DIMENSIONS - len(op.shape)
        for count in counts:
            _check(op.name, "numbers in a dimension", count)
        fields = {
            "counts": [1] * more + list(counts),
            "from": sum(a * b for a, b in zip(begins, here, strict=True)),
            "to": sum(a * b for a, b in zip(to, there, strict=True)),
            "from_steps": [0] * more + [a * b for a, b in zip(steps, here, strict=True)],
            "to_steps": [0] * more + there,
            "left": left,
        }
        at = self._describe("inq_copy_t", k, list(fields.items()), f"_{source}" if len(op.sources) > 1 else "")
        self.calls.append(f"    inq_copy({at}, {self._value_at(op.sources[source])}, {self._value_at(k)});")

    def _compare(self, prefix: str, numbers: Mapping[str, Any], *fields: str) -> None:
        """Keep what the fields of a descriptor hold; of a pair, both numbers."""
        for field in fields:
            value = numbers[field]
            pair = isinstance(value, (tuple, list))
            macro = prefix + field.upper() + ("(axis)" if pair else "")
            self.alike.setdefault(macro, set()).update(value if pair else [value])

    def _check_all(self, name: str, numbers: Mapping[str, Any]) -> None:
        """Refuse what 16 bits do not hold."""
        for what, value in numbers.items():
            for number in value if isinstance(value, (tuple, list)) else [value]:
                _check(name, what, number)


def _value(name: str, low: int, high: int, shape: tuple[int, ...], wide: bool = False) -> _Value:
    size = int(torch.Size(shape).numel())
    _check(name, "numbers", size, (1 << 29) - 1)
    signed = low < 0
    wide = wide or not (low >= -128 and high <= (127 if signed else 255))
    return _Value(wide, 128 if signed and not wide else 0, low, high, size)


def _strides(shape: tuple[int, ...]) -> list[int]:
    return [int(torch.Size(shape[d + 1 :]).numel()) for d in range(len(shape))]


def _check(name: str, what: str, number: int, most: int = (1 << 16) - 1) -> None:
    if number > most:
        raise ValueError(
            f"{name}: {number} {what}, C code takes at most {most}; make the layer smaller"
            + (", or take layout='packed'" if "list" in what else "")
        )


def _comment(name: str) -> str:
    """A layer's name for a comment, whatever it is called."""
    return re.sub(r"[^A-Za-z0-9_.\[\]-]", "_", name) or "-"


def _int32(number: int) -> str:
    return str(number) if number > -(1 << 31) else "-2147483647 - 1"


def _initializer(value: object) -> str:
    return "{" + ", ".join(map(str, value)) + "}" if isinstance(value, (tuple, list)) else str(value)


def _header(network: IntegerNetwork, program: Program) -> str:
    entry, low, high = network.input_exponent, network.input_low, network.input_high
    zero, outputs = program.values[0].zero, program.values[program.last].size
    shape, last = (" x ".join(map(str, s)) for s in (network.shape, network.operations[-1].shape))
    return f"""/* Generated by inq-lightning: a network of whole numbers, without a multiplication.
 *
 * image: {shape} numbers, channels first, then rows, then columns. A byte of b stands for (b - {zero}) * 2^{entry}:
 * the real number r becomes round(r * 2^{-entry}), half to even, at least {low}, at most {high}, plus {zero}.
 * logits: {last} numbers; one of q stands for q * 2^{network.exponent}. The largest is the prediction.
 *
 * Tables: {program.table_bytes} bytes, only read. Static buffer: {program.buffer_bytes} bytes, so one call at a time.
 */

#ifndef INQ_NETWORK_H
#define INQ_NETWORK_H

#include <stdint.h>

#define INQ_INPUTS {program.values[0].size}
#define INQ_ZERO {zero}
#define INQ_OUTPUTS {outputs}

void inq_predict(const uint8_t *image, int32_t *logits);

#endif
"""


def _vectors(images: Tensor, logits: Tensor) -> str:
    """Inputs as bytes and their logits."""

    def rows(values: Tensor) -> str:
        return ",\n".join("    {" + ", ".join(_int32(n) for n in row) + "}" for row in values.tolist())

    return f"""/* Generated by inq-lightning: inputs and their logits. */

#ifndef INQ_VECTORS_H
#define INQ_VECTORS_H

#include "inq_network.h"

#define INQ_VECTORS {len(images)}

static const uint8_t inq_images[INQ_VECTORS][INQ_INPUTS] = {{
{rows(images.flatten(1))}
}};

static const int32_t inq_logits[INQ_VECTORS][INQ_OUTPUTS] = {{
{rows(logits)}
}};

#endif
"""
