"""The artifact: a quantized network in one safetensors file, with b bits a weight.

Tensors of the file, for each quantized parameter and for everything else in the network's state_dict::

    codes/<name>    uint8, as :mod:`inq_lightning.formats.codec` packs them
    tensor/<name>   as it is, or in the narrower type that was asked for; of a type that safetensors lacks, its bytes
    integer/<name>  what the network in whole numbers needs besides the weights, where there is one

Its metadata is one JSON text under the key ``inq_lightning``: format version, per layer the grid's spec, shape, dtype
and coding, aliases of tied weights, dtypes before narrowing, the weights that are on no grid, the schedule, library
versions, and the SHA-256 of all of it; where there are such, ``bytes`` with dtype and shape of what is stored as bytes,
and ``values`` with what is no tensor, as :mod:`inq_lightning.formats.values` packs it. In version 1, which is still
read, layers had ``bits`` in the place of the spec and a tensor ``n1/<name>``: int32, the exponent of the largest level;
of shape (0,) for a layer of zeros, else (1,).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor, nn

from inq_lightning._common import atomic, one_of
from inq_lightning._version import __version__
from inq_lightning.core.activations import is_saved_activation, saved_activations
from inq_lightning.core.layer import Layer, plain_name
from inq_lightning.core.schedule import Schedule
from inq_lightning.core.size import bytes_at
from inq_lightning.formats.codec import layout_of, pack, pack_entropy, unpack, unpack_entropy
from inq_lightning.formats.contents import Contents, Record, Recordable
from inq_lightning.formats.layers import candidate_grids, check_complete, grids_in_state, off_grid
from inq_lightning.formats.tensors import (
    DTYPES,
    MAX_HEADER,
    NAMES,
    RAW,
    STORED,
    as_bytes,
    common_prefix,
    dtype_name,
    from_bytes,
    memory,
    place,
    plain_tensors,
    untie,
)
from inq_lightning.formats.values import pack_value, unpack_value
from inq_lightning.grid import Grid, from_spec
from inq_lightning.grid.base import FLOATS
from inq_lightning.grid.recognize import encode

VERSION = 2

_KEY = "inq_lightning"
_Header = dict[str, tuple[str, tuple[int, ...]]]  # dtype and shape of every stored tensor
_CHUNK = 1 << 16  # weights at a time: intermediate results stay in the cache
# Entropy-coded weights that are all alike take no bytes: a tiny file could ask for any amount of memory.
_ALWAYS_ALLOWED, _MAX_EXPANSION = 1 << 30, 1024


class ArtifactError(ValueError):
    """The file is no artifact that this release reads, is damaged, or does not fit the network."""


class Saved(NamedTuple):
    """What :func:`save_packed` has written.

    Attributes:
        bytes_before: Size of the network's tensors in memory, tied ones counted once.
        bytes_after: Size of the file.
        weights: Number of quantized weights.
        bits_per_weight: Codes, exponents and metadata, in bits a quantized weight; nan without any.
        float_error: The largest absolute difference that ``float_dtype`` has made to any other tensor.
        off_grid: Names of the network's matrices of weights that are on no grid.
    """

    bytes_before: int
    bytes_after: int
    weights: int
    bits_per_weight: float
    float_error: float
    off_grid: list[str]


# ---- writing ---------------------------------------------------------------------------------------------------------


def save_packed(
    source: nn.Module | Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    layers: Iterable[Layer] | None = None,
    allow_partial: bool = False,
    float_dtype: torch.dtype | None = None,
    entropy_coded: bool = False,
    schedule: Schedule | None = None,
    integer: Recordable | None = None,
) -> Saved:
    """Save a quantized network as one file of b bits a weight.

    Everything comes back bit for bit, but for the sign of a zero weight, and for what ``float_dtype`` rounds: tensors
    of real and complex numbers, integers and truth values of whole bytes, and extra state (``get_extra_state``) of
    numbers, texts, bytes, None, small tensors, and lists, tuples and dicts of them.

    Args:
        source: The network, on any device, or its state_dict.
        path: The file, such as ``network.safetensors``; it appears only once it is complete.
        layers: `INQCallback.layers`. Left out, the weights tell by themselves which grids they are on; of a state_dict
            every tensor that looks like a layer's weights has to be on one, see
            :func:`~inq_lightning.formats.layers.candidate_grids`.
        allow_partial: Whether to save weights that are on no grid as they are, rather than refuse the network.
        float_dtype: torch.float16 or torch.bfloat16 to store all other floating-point tensors in it; they come back in
            their own dtype, rounded.
        entropy_coded: Whether to compress the codes to nearly their entropy (needs the extra ``export``).
        schedule: What the network was quantized under, for the record.
        integer: The same network in whole numbers, which :func:`~inq_lightning.lower` makes, to be kept with it.

    Raises:
        ValueError: The network is not fully quantized, has a state that cannot be stored, or does not fit into
            ``float_dtype``; the message names the parameter. Or ``integer`` is of other weights.
        ImportError: ``entropy_coded`` without constriction.
    """
    one_of("float_dtype", float_dtype, (None, torch.float16, torch.bfloat16))
    module, everything = (source, source.state_dict()) if isinstance(source, nn.Module) else (None, source)
    values = {plain_name(n): pack_value(n, v) for n, v in everything.items() if not isinstance(v, Tensor)}
    state = plain_tensors({n: v for n, v in everything.items() if isinstance(v, Tensor)}, STORED)
    grids = candidate_grids(module or state, layers)
    check_complete(grids, allow_partial)
    off = off_grid(module or state, grids)
    if module is not None:
        grids = grids_in_state(module, state, grids)
    own, aliases = untie(state, grids)
    tensors: dict[str, Tensor] = {}
    coded: dict[str, dict[str, Any]] = {}
    narrowed, raw, error = {}, {}, 0.0
    for name, value in own.items():
        grid = grids.get(name)
        if grid is not None:
            tensors[f"codes/{name}"], coded[name] = _code(value, grid, entropy_coded)
            continue
        stored = value
        if float_dtype is not None and value.dtype in FLOATS and value.element_size() > float_dtype.itemsize:
            stored, narrowed[name] = value.to(float_dtype), dtype_name(value.dtype)
            error = max(error, _rounding(name, value, stored))
        elif dtype_name(value.dtype) in RAW:
            stored, raw[name] = as_bytes(value), [dtype_name(value.dtype), list(value.shape)]
        # A copy: safetensors refuses tensors that are views of one memory.
        tensors[f"tensor/{name}"] = stored.cpu().clone(memory_format=torch.contiguous_format)
    record = None if integer is None else integer.record()
    if record is not None:
        _check_weights(record, state, grids)
        tensors |= {f"integer/{name}": tensor.contiguous() for name, tensor in record.tensors.items()}
    metadata: dict[str, Any] = {
        "version": VERSION,
        "layers": coded,
        "aliases": aliases,
        "narrowed": narrowed,
        "off_grid": off,
        "schedule": None if schedule is None else asdict(schedule),
        "libraries": {
            "inq-lightning": __version__,
            "torch": torch.__version__,
            "safetensors": safetensors.__version__,
        },
    }
    metadata |= ({"bytes": raw} if raw else {}) | ({"values": values} if values else {})
    metadata |= {} if record is None else {"integer": record.program}
    metadata["sha256"] = _checksum(metadata, sorted(tensors.items(), key=itemgetter(0)))
    with atomic(Path(path)) as partial:
        size = partial.write_bytes(save(tensors, {_KEY: json.dumps(metadata)}))  # save_file would make it private
    weights = sum(own[name].numel() for name in coded)
    others = memory(tensor for name, tensor in tensors.items() if name.startswith("tensor/"))
    return Saved(
        bytes_before=memory(own.values()),
        bytes_after=size,
        weights=weights,
        bits_per_weight=(size - others) * 8 / weights if weights else math.nan,
        float_error=error,
        off_grid=metadata["off_grid"],
    )


def _check_weights(record: Record, state: Mapping[str, Tensor], grids: Mapping[str, Grid | None]) -> None:
    """Refuse a network in whole numbers that was made of other weights."""
    for name, weight in record.weights.items():
        if grids.get(name) is None or not torch.equal(state[name].cpu().to(weight.dtype), weight):
            raise ValueError(f"the integer network was not made of this network's {name}; lower this network")


def _code(weight: Tensor, grid: Grid, entropy_coded: bool) -> tuple[Tensor, dict[str, Any]]:
    """The bytes of a weight's codes, and what the metadata say of it."""
    codes = encode(grid, weight)
    record = {"grid": grid.spec(), "shape": list(weight.shape), "dtype": dtype_name(weight.dtype)}
    if not entropy_coded:
        return pack(codes, grid.bits, layout_of(grid.codes, grid.bits)).cpu(), record
    digest = hashlib.sha256(_bytes(codes.cpu())).hexdigest()
    return pack_entropy(codes, grid.bits, layout_of(grid.codes, grid.bits)), record | {"codes_sha256": digest}


def _rounding(name: str, value: Tensor, stored: Tensor) -> float:
    """The largest difference between a tensor and its narrower copy."""
    finite = value.isfinite()
    if bool((finite & ~stored.isfinite()).any()):
        raise ValueError(f"{name} holds values beyond {stored.dtype}, whose largest is {torch.finfo(stored.dtype).max}")
    difference = (value[finite].double() - stored[finite].double()).abs()
    return float(difference.max()) if difference.numel() else 0.0


def _checksum(metadata: Mapping[str, Any], tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of the metadata but for the checksum itself, and of the tensors, in the order of their names."""
    covered = {key: value for key, value in metadata.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(covered, sort_keys=True).encode())
    for name, tensor in tensors:
        digest.update(json.dumps([name, dtype_name(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    return tensor.reshape(-1).view(torch.uint8).numpy()


# ---- reading ---------------------------------------------------------------------------------------------------------


def recognizes(head: bytes) -> bool:
    """Whether a file with this header is an artifact."""
    return head[8:9] == b"{" and f'"{_KEY}"'.encode() in head


def load_packed(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Load an artifact into a network of the same architecture; no code is run and Lightning is not needed.

    What was saved from a LightningModule that holds the network (``net.conv1.weight``) also loads into the network
    itself (``conv1.weight``).

    Args:
        path: The file.
        model: A network whose names, shapes and dtypes are those of the file; on any device, in any memory format.
            Rounded activations are put in place as they were.

    Returns:
        ``model``.

    Raises:
        ArtifactError: The file is damaged, of another version, or does not fit; ``model`` is as it was then.
        OSError: There is no such file.
    """
    with _opened(path) as file:
        grids = {n: file.stored(n) for n in file.declared if is_saved_activation(n)}
        own = {plain_name(n) for n in model.state_dict() if not is_saved_activation(n)}
        prefix = common_prefix((file.declared.keys() | file.values.keys()) - grids.keys(), own)
        with saved_activations(model, {name.removeprefix(prefix): grid for name, grid in grids.items()}):
            targets = {plain_name(name): (name, t) for name, t in model.state_dict().items()}
            _check_fits(file, {prefix + name: target for name, (_, target) in targets.items()})
            state = file.decode() | file.values
            model.load_state_dict({key: state[prefix + name] for name, (key, _) in targets.items()})
    return model


def read_packed(path: str | os.PathLike[str]) -> Contents:
    """Read an artifact without a network.

    Args:
        path: The file.

    Raises:
        ArtifactError: The file is damaged or of another version.
        OSError: There is no such file.
    """
    with _opened(path) as file:
        schedule = file.metadata.get("schedule")
        return Contents(
            kind="packed",
            state_dict=file.decode(),
            layers=[Layer(name, x.shape, x.grid.bits, x.grid, math.prod(x.shape)) for name, x in file.coded.items()],
            off_grid=file.metadata["off_grid"],
            stored={name: file.header[f"codes/{name}"][1][0] for name in file.coded},
            schedule=Schedule(**schedule) if schedule else None,
            metadata=file.metadata,
            extra_state=file.values,
            integer=file.integer(),
        )


class _Coded(NamedTuple):
    """What the metadata say of one quantized tensor; ``sha256`` is that of entropy-coded codes."""

    grid: Grid
    shape: tuple[int, ...]
    dtype: torch.dtype
    sha256: str | None

    @classmethod
    def parse(cls, name: str, record: Any) -> _Coded:
        _require(isinstance(record, dict) and isinstance(record.get("grid"), dict), f"{name} is no record of a layer")
        dtype = NAMES.get(record.get("dtype"))
        if dtype not in FLOATS:
            raise ValueError(f"{name} has no dtype of weights")
        shape = _checked_shape(name, record.get("shape"))
        return cls(from_spec(record["grid"]), shape, dtype, record.get("codes_sha256"))


class _File:
    """An open artifact whose header and metadata have been checked; no weight has been decoded yet.

    Attributes:
        header: Dtype and shape of every stored tensor.
        metadata: The metadata.
        coded: The quantized tensors.
        declared: Shape and dtype of every tensor of the network, aliases included.
        values: What its state_dict holds besides tensors.
    """

    def __init__(self, header: _Header, metadata: dict[str, Any], size: int, handle: Any) -> None:
        self.header, self.metadata, self._handle = header, metadata, handle
        _check_metadata(metadata)
        layers = metadata["layers"]
        if metadata["version"] == 1:
            layers = {name: self._from_version_1(name, record) for name, record in layers.items()}
        self.coded = {name: _Coded.parse(name, record) for name, record in layers.items()}
        for name, layer in self.coded.items():
            dtype, shape = header.get(f"codes/{name}", ("no type", ()))
            expected = (bytes_at(math.prod(layer.shape), layer.grid.bits),)
            fits = len(shape) == 1 if layer.sha256 is not None else shape == expected
            _require(dtype == "U8" and fits, f"codes of {name} are {dtype} of shape {list(shape)}")
        self.declared = {name: (layer.shape, layer.dtype) for name, layer in self.coded.items()}
        kinds = ("codes", "n1") if metadata["version"] == 1 else ("codes",)
        known = {f"{kind}/{name}" for kind in kinds for name in self.coded}
        others = [key for key in header if key not in known]
        self._integer = [key for key in others if key.startswith("integer/")]
        _require(isinstance(metadata.get("integer"), dict) or not self._integer, "it has tensors integer/… too many")
        self._declare_others(key for key in others if not key.startswith("integer/"))
        total = sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.declared.values())
        _require(
            total <= max(_ALWAYS_ALLOWED, _MAX_EXPANSION * size), f"its {size} bytes ask for {total} bytes of memory"
        )
        self.declared |= {alias: self.declared[name] for alias, name in metadata["aliases"].items()}
        self.values = {name: unpack_value(value) for name, value in metadata.get("values", {}).items()}
        twice = self.values.keys() & self.declared.keys()
        _require(not twice, f"{', '.join(sorted(twice))} is there twice")

    def stored(self, name: str) -> Tensor:
        """A tensor that is stored as it is."""
        tensor: Tensor = self._handle.get_tensor(f"tensor/{name}")
        return tensor

    def integer(self) -> Record | None:
        """The network in whole numbers, without its weights."""
        if "integer" not in self.metadata:
            return None
        tensors = {key.removeprefix("integer/"): self._handle.get_tensor(key) for key in self._integer}
        return Record(self.metadata["integer"], tensors)

    def decode(self) -> dict[str, Tensor]:
        """All tensors of the network; tied ones share their memory."""
        stored = ((key, self._handle.get_tensor(key)) for key in sorted(self.header))
        _require(_checksum(self.metadata, stored) == self.metadata["sha256"], "its checksum is another one")
        tensors, aliases = {}, self.metadata["aliases"]
        for name, (shape, dtype) in self.declared.items():
            if name in self.coded:
                tensors[name] = self._weights(name).view(shape)
            elif name in self.metadata.get("bytes", {}):
                tensors[name] = from_bytes(self._handle.get_tensor(f"tensor/{name}"), dtype_name(dtype), shape)
            elif name not in aliases:
                tensors[name] = self._handle.get_tensor(f"tensor/{name}").to(dtype)
        return tensors | {alias: tensors[name] for alias, name in aliases.items()}

    def _from_version_1(self, name: str, record: dict[str, Any]) -> dict[str, Any]:
        """A layer's record, with the spec that version 1 had in a tensor."""
        dtype, shape = self.header.get(f"n1/{name}", ("no type", ()))
        _require(dtype == "I32" and shape in ((0,), (1,)), f"n1 of {name} is {dtype} of shape {list(shape)}")
        n1 = self._handle.get_tensor(f"n1/{name}").tolist()
        return record | {"grid": {"kind": "power_of_two", "n1": n1[0] if n1 else None, "bits": record.get("bits")}}

    def _declare_others(self, keys: Iterable[str]) -> None:
        """Add the tensors that are stored as they are, or in a narrower type."""
        narrowed, raw = self.metadata["narrowed"], self.metadata.get("bytes", {})
        for key in keys:
            name, (dtype, shape) = key.removeprefix("tensor/"), self.header[key]
            _require(name != key, f"it has a tensor {key} too many")
            _require(name not in self.declared, f"{name} is there twice")
            _require(name not in narrowed or dtype in ("F16", "BF16"), f"{name} is narrowed to {dtype}")
            self.declared[name] = (shape, NAMES[narrowed[name]] if name in narrowed else DTYPES[dtype])
            if name in raw:
                self.declared[name] = self._from_bytes(name, dtype, shape, raw[name])
        _require({*narrowed, *raw} <= self.declared.keys(), "it narrows, or has as bytes, tensors that it lacks")
        for alias, name in self.metadata["aliases"].items():
            _require(alias not in self.declared, f"{alias} is there twice")
            _require(name in self.declared, f"{alias} is tied to {name}, which is missing")

    def _from_bytes(
        self, name: str, dtype: str, shape: tuple[int, ...], record: Any
    ) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of a tensor that is stored as its bytes."""
        _require(isinstance(record, list) and len(record) == 2, f"{name} is no record of a tensor")
        kind, own = RAW.get(record[0]), _checked_shape(name, record[1])
        if kind is None:
            raise ArtifactError(f"{name} is {record[0]!r:.40}, which this release of torch lacks")
        expected = math.prod(own) * kind.itemsize
        _require(dtype == "U8" and shape == (expected,), f"bytes of {name} are {dtype} of shape {list(shape)}")
        return own, kind

    def _weights(self, name: str) -> Tensor:
        layer, packed = self.coded[name], self._handle.get_tensor(f"codes/{name}")
        weights = torch.empty(math.prod(layer.shape), dtype=layer.dtype)
        try:
            layer.grid.check_dtype(layer.dtype)
            unpacked, bits = unpack if layer.sha256 is None else unpack_entropy, layer.grid.bits
            codes = unpacked(packed, bits, weights.numel(), layout_of(layer.grid.codes, bits))
            digest = None if layer.sha256 is None else hashlib.sha256(_bytes(codes)).hexdigest()
            _require(digest == layer.sha256, "other codes than were saved")
            for part, chunk in zip(torch.split(weights, _CHUNK), torch.split(codes, _CHUNK), strict=True):
                part.copy_(layer.grid.decode(chunk, layer.dtype))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        return weights


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[_File]:
    """Open an artifact; whatever is wrong with it becomes one error."""
    try:
        header, metadata, size = _read_header(Path(path))
        with safetensors.safe_open(path, framework="pt") as handle:  # checks all offsets
            yield _File(header, metadata, size, handle)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error
    # A hostile file finds many ways to fail: text that is none, nesting, numbers that overflow, too much memory.
    except (safetensors.SafetensorError, ValueError, TypeError, RuntimeError, ArithmeticError, MemoryError) as error:
        raise ArtifactError(f"{path} is damaged: {error}; copy or export it again") from error


def _read_header(path: Path) -> tuple[_Header, dict[str, Any], int]:
    """Dtype and shape of every tensor, the metadata, and the size of the file.

    Read by hand: :func:`safetensors.safe_open` accepts a header in which a key comes twice, and takes one of the two.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        _require(size >= 8 and length <= min(size - 8, MAX_HEADER), f"its header would take {length} bytes")
        header = _parse(file.read(length).decode())
    texts = header.pop("__metadata__", None)
    if not isinstance(texts, dict) or texts.keys() != {_KEY} or not isinstance(texts[_KEY], str):
        raise ArtifactError("this is a safetensors file, but not one of save_packed")
    entries = {}
    for name, entry in header.items():
        _require(isinstance(entry, dict) and entry.get("dtype") in DTYPES, f"{name} is of no type that is saved")
        entries[name] = (entry["dtype"], _checked_shape(name, entry.get("shape")))
    return entries, _parse(texts[_KEY]), size


def _parse(text: str) -> dict[str, Any]:
    """JSON of an object, in which no key comes twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _require(len(dict(pairs)) == len(pairs), "its header has a key twice")
        return dict(pairs)

    parsed = json.loads(text, object_pairs_hook=unique)
    _require(isinstance(parsed, dict), "its header is no JSON object")
    return parsed  # type: ignore[no-any-return]


def _check_metadata(metadata: Mapping[str, Any]) -> None:
    version = metadata.get("version")
    if version not in (1, VERSION) or isinstance(version, bool):
        raise ArtifactError(
            f"it has format version {version!r:.40}, this release reads versions 1 and {VERSION}; read it with the one "
            "that wrote it"
        )
    kinds = {"layers": dict, "aliases": dict, "narrowed": dict, "off_grid": list, "sha256": str}
    for key, kind in kinds.items():
        _require(isinstance(metadata.get(key), kind), f"its {key} is missing or no {kind.__name__}")
    for key in ("bytes", "values", "integer"):
        _require(isinstance(metadata.get(key, {}), dict), f"its {key} are no dict")
    names = [*metadata["aliases"].values(), *metadata["off_grid"]]
    _require(all(isinstance(name, str) for name in names), "its aliases or off_grid are no names")
    _require(all(isinstance(layer, dict) for layer in metadata["layers"].values()), "its layers are no records")
    _require(all(dtype in NAMES for dtype in metadata["narrowed"].values()), "it narrows unknown types")


def _checked_shape(name: str, shape: Any) -> tuple[int, ...]:
    numbers = isinstance(shape, list) and len(shape) <= 64 and all(type(n) is int and n >= 0 for n in shape)
    _require(numbers and math.prod(n or 1 for n in shape) < 1 << 48, f"{name} has no possible shape")
    return tuple(shape)


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)


def _check_fits(file: _File, targets: Mapping[str, Tensor]) -> None:
    """Refuse a network that differs from the file in names, shapes, dtypes or tied weights."""
    held = file.declared | file.values
    lines = [f"{name} is in the file, not in the network" for name in held if name not in targets]
    lines += [f"{name} is in the network, not in the file" for name in targets if name not in held]
    own_names: dict[Any, str] = {}
    for name, target in targets.items():
        if name not in file.declared or not isinstance(target, Tensor):
            continue
        shape, dtype = file.declared[name]
        if (shape, dtype) != (tuple(target.shape), target.dtype):
            there, here = f"{dtype_name(dtype)}{list(shape)}", f"{dtype_name(target.dtype)}{list(target.shape)}"
            lines.append(f"{name} is {there} in the file, {here} in the network")
        if target.is_meta:
            lines.append(f"{name} has no memory in the network; call its to_empty(device=...) first")
        aliases = file.metadata["aliases"]
        tied = own_names.setdefault(place(name, target), name)
        if aliases.get(tied, tied) != aliases.get(name, name):
            lines.append(f"{name} and {tied} are tied in the network, not in the file")
    if lines:
        more = [f"and {len(lines) - 10} more"] if len(lines) > 10 else []
        raise ArtifactError("the file does not fit the network:\n  " + "\n  ".join(lines[:10] + more))
