"""The artifact: a quantized network in one safetensors file, with b bits a weight.

Tensors of the file, for each quantized parameter and for everything else in the network's state_dict::

    codes/<name>    uint8, as :mod:`inq_lightning.formats.codec` packs them
    n1/<name>       int32, the exponent of the largest level; of shape (0,) for a layer of zeros, else (1,)
    tensor/<name>   as it is, or in the narrower type that was asked for

Its metadata is one JSON text under the key ``inq_lightning``: format version, per layer bits, shape, dtype and coding,
aliases of tied weights, dtypes before narrowing, the weights that are on no grid, the schedule, library versions, and
the SHA-256 of all of it.
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

import inq_lightning
from inq_lightning.core.schedule import Schedule
from inq_lightning.formats.codec import pack, pack_entropy, packed_size, unpack, unpack_entropy
from inq_lightning.formats.layers import LayerGrid, candidate_grids, check_complete, encode
from inq_lightning.grid import MAX_BITS, MIN_BITS, PowerOfTwoGrid

VERSION = 1

_KEY = "inq_lightning"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in _DTYPES.values()}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_Header = dict[str, tuple[str, tuple[int, ...]]]  # dtype and shape of every stored tensor
_CHUNK = 1 << 16  # weights at a time: intermediate results stay in the cache
_MAX_HEADER = 1 << 24  # bytes
# Entropy-coded weights that are all alike take no bytes: a tiny file could ask for any amount of memory.
_ALWAYS_ALLOWED, _MAX_EXPANSION = 1 << 30, 1024


class ArtifactError(ValueError):
    """The file is no artifact that this release reads, is damaged, or does not fit the network."""


class PackedLayer(NamedTuple):
    """One quantized parameter of an artifact.

    Attributes:
        name: Name of the parameter.
        shape: Its shape.
        bits: Code length of one weight.
        n1: Exponent of the largest level; None for a layer of zeros.
        stored_bytes: Size of its codes in the file.
    """

    name: str
    shape: tuple[int, ...]
    bits: int
    n1: int | None
    stored_bytes: int


class Artifact(NamedTuple):
    """What :func:`read_packed` returns.

    Attributes:
        state_dict: The network's tensors, weights decoded, tied ones sharing their memory.
        layers: One record for each quantized parameter; serves as ``layers`` wherever `INQCallback.layers` does.
        metadata: ``version``, ``off_grid`` (names of the weights that are on no grid), ``schedule``, ``libraries``…
    """

    state_dict: dict[str, Tensor]
    layers: list[PackedLayer]
    metadata: dict[str, Any]


class Saved(NamedTuple):
    """What :func:`save_packed` has written.

    Attributes:
        bytes_before: Size of the network's tensors in memory, tied ones counted once.
        bytes_after: Size of the file.
        weights: Number of quantized weights.
        bits_per_weight: Codes, exponents and metadata, in bits a quantized weight; nan without any.
        float_error: The largest absolute difference that ``float_dtype`` has made to any other tensor.
        off_grid: Names of the weights that are on no grid.
    """

    bytes_before: int
    bytes_after: int
    weights: int
    bits_per_weight: float
    float_error: float
    off_grid: list[str]


def save_packed(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    layers: Iterable[LayerGrid] | None = None,
    allow_partial: bool = False,
    float_dtype: torch.dtype | None = None,
    entropy_coded: bool = False,
    schedule: Schedule | None = None,
) -> Saved:
    """Save a quantized network as one file of b bits a weight.

    Everything comes back bit for bit, but for the sign of a zero weight, and for what ``float_dtype`` rounds.

    Args:
        model: The network; on any device.
        path: The file, such as ``network.safetensors``; it appears only once it is complete.
        layers: `INQCallback.layers`. Left out, the weights tell by themselves which grids they are on.
        allow_partial: Whether to save weights that are on no grid as they are, rather than refuse the network.
        float_dtype: torch.float16 or torch.bfloat16 to store all other floating-point tensors in it; they come back in
            their own dtype, rounded.
        entropy_coded: Whether to compress the codes to nearly their entropy (needs the extra ``export``).
        schedule: What the network was quantized under, for the record.

    Raises:
        ValueError: The network is not fully quantized, has a state that is no plain tensor, or does not fit into
            ``float_dtype``; the message names the parameter.
        ImportError: ``entropy_coded`` without constriction.
    """
    tensors = plain_tensors(model.state_dict())
    _check_float_dtype(float_dtype)
    grids = candidate_grids(model, layers)
    check_complete(grids, allow_partial)
    return _save(tensors, Path(path), grids, float_dtype, entropy_coded, schedule)


def save_state_dict(
    state_dict: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    layers: Iterable[LayerGrid] | None = None,
    allow_partial: bool = False,
    float_dtype: torch.dtype | None = None,
    entropy_coded: bool = False,
    schedule: Schedule | None = None,
) -> Saved:
    """:func:`save_packed` for who has only the tensors of a network, see there.

    Raises:
        ValueError: See :func:`save_packed`. Without ``layers``, every tensor that looks like a layer's weights has to
            be on a grid, see :func:`~inq_lightning.formats.layers.candidate_grids`.
        ImportError: ``entropy_coded`` without constriction.
    """
    tensors = plain_tensors(state_dict)
    _check_float_dtype(float_dtype)
    grids = candidate_grids(tensors, layers)
    check_complete(grids, allow_partial)
    return _save(tensors, Path(path), grids, float_dtype, entropy_coded, schedule)


def _save(
    state_dict: dict[str, Tensor],
    path: Path,
    grids: Mapping[str, PowerOfTwoGrid | None],
    float_dtype: torch.dtype | None,
    entropy_coded: bool,
    schedule: Schedule | None,
) -> Saved:
    own, aliases = untie(state_dict, grids)
    tensors: dict[str, Tensor] = {}
    layers: dict[str, dict[str, Any]] = {}
    narrowed, error = {}, 0.0
    for name, value in own.items():
        grid = grids.get(name)
        if grid is not None:
            codes = encode(grid, value)
            tensors[f"codes/{name}"] = (pack_entropy if entropy_coded else pack)(codes, grid.bits).cpu()
            tensors[f"n1/{name}"] = torch.tensor([] if grid.n1 is None else [grid.n1], dtype=torch.int32)
            layers[name] = {"bits": grid.bits, "shape": list(value.shape), "dtype": _name(value.dtype)}
            if entropy_coded:
                layers[name]["codes_sha256"] = hashlib.sha256(_bytes(codes.cpu())).hexdigest()
            continue
        stored = value
        if float_dtype is not None and value.dtype in _FLOATS and value.element_size() > float_dtype.itemsize:
            stored, narrowed[name] = value.to(float_dtype), _name(value.dtype)
            error = max(error, _rounding(name, value, stored))
        # A copy: safetensors refuses tensors that are views of one memory.
        tensors[f"tensor/{name}"] = stored.cpu().clone(memory_format=torch.contiguous_format)
    metadata: dict[str, Any] = {
        "version": VERSION,
        "layers": layers,
        "aliases": aliases,
        "narrowed": narrowed,
        "off_grid": [name for name, grid in grids.items() if grid is None],
        "schedule": None if schedule is None else asdict(schedule),
        "libraries": {
            "inq-lightning": inq_lightning.__version__,
            "torch": torch.__version__,
            "safetensors": safetensors.__version__,
        },
    }
    metadata["sha256"] = _checksum(metadata, sorted(tensors.items(), key=itemgetter(0)))
    size = _write(path, tensors, json.dumps(metadata))
    weights = sum(math.prod(layer["shape"]) for layer in layers.values())
    others = sum(t.numel() * t.element_size() for name, t in tensors.items() if name.startswith("tensor/"))
    return Saved(
        bytes_before=sum(t.numel() * t.element_size() for t in own.values()),
        bytes_after=size,
        weights=weights,
        bits_per_weight=(size - others) * 8 / weights if weights else math.nan,
        float_error=error,
        off_grid=metadata["off_grid"],
    )


def load_packed(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Load an artifact into a network of the same architecture; no code is run and Lightning is not needed.

    What was saved from a LightningModule that holds the network (``net.conv1.weight``) also loads into the network
    itself (``conv1.weight``).

    Args:
        path: The file.
        model: A network whose names, shapes and dtypes are those of the file; on any device, in any memory format.

    Returns:
        ``model``.

    Raises:
        ArtifactError: The file is damaged, of another version, or does not fit; ``model`` is as it was then.
        OSError: There is no such file.
    """
    with _opened(path) as file:
        targets = {name.replace("_orig_mod.", ""): (name, t) for name, t in model.state_dict().items()}
        prefix = common_prefix(file.declared, targets)
        _check_fits(file, {prefix + name: target for name, (_, target) in targets.items()})
        tensors = file.decode()
    model.load_state_dict({key: tensors[prefix + name] for name, (key, _) in targets.items()})
    return model


def read_packed(path: str | os.PathLike[str]) -> Artifact:
    """Read an artifact without a network.

    Args:
        path: The file.

    Raises:
        ArtifactError: The file is damaged or of another version.
        OSError: There is no such file.
    """
    with _opened(path) as file:
        return Artifact(file.decode(), file.layers(), file.metadata)


class _File:
    """An open artifact whose header and metadata have been checked; no tensor has been read yet.

    Attributes:
        metadata: The metadata.
        declared: Shape and dtype of every tensor of the network, aliases included.
    """

    def __init__(self, header: _Header, metadata: dict[str, Any], size: int, handle: Any) -> None:
        self.metadata, self._header, self._handle = metadata, header, handle
        _check_metadata(metadata)
        self._layers: dict[str, dict[str, Any]] = self.metadata["layers"]
        self.declared = {name: (tuple(layer["shape"]), _NAMES[layer["dtype"]]) for name, layer in self._layers.items()}
        expected = {f"{kind}/{name}" for name in self._layers for kind in ("codes", "n1")}
        narrowed = self.metadata["narrowed"]
        for key, (dtype, shape) in header.items():
            name = key.removeprefix("tensor/")
            if key in expected or name == key:
                continue
            _require(name not in self.declared, f"{name} is there twice")
            expected.add(key)
            self.declared[name] = (shape, _NAMES[narrowed[name]] if name in narrowed else _DTYPES[dtype])
            _require(name not in narrowed or dtype in ("F16", "BF16"), f"{name} is narrowed to {dtype}")
        _require(expected == header.keys(), f"it has the tensors {_some(expected ^ header.keys())} too many or too few")
        _require(narrowed.keys() <= self.declared.keys(), "it narrows tensors that it lacks")
        for alias, name in self.metadata["aliases"].items():
            _require(alias not in self.declared, f"{alias} is there twice")
            _require(name in self.declared, f"{alias} is tied to {name}, which is missing")
        for name, layer in self._layers.items():
            numel, (dtype, shape) = math.prod(layer["shape"]), header[f"codes/{name}"]
            fits = "codes_sha256" in layer or shape == (packed_size(numel, layer["bits"]),)
            _require(dtype == "U8" and fits, f"codes of {name} are {dtype} of shape {list(shape)}")
            dtype, shape = header[f"n1/{name}"]
            _require(dtype == "I32" and shape in ((0,), (1,)), f"n1 of {name} is {dtype} of shape {list(shape)}")
        total = sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.declared.values())
        _require(
            total <= max(_ALWAYS_ALLOWED, _MAX_EXPANSION * size), f"its {size} bytes ask for {total} bytes of memory"
        )
        self.declared |= {alias: self.declared[name] for alias, name in self.metadata["aliases"].items()}

    def layers(self) -> list[PackedLayer]:
        return [
            PackedLayer(name, tuple(layer["shape"]), layer["bits"], self._n1(name), self._header[f"codes/{name}"][1][0])
            for name, layer in self._layers.items()
        ]

    def decode(self) -> dict[str, Tensor]:
        """All tensors of the network; tied ones share their memory."""
        stored = ((key, self._handle.get_tensor(key)) for key in sorted(self._header))
        _require(_checksum(self.metadata, stored) == self.metadata["sha256"], "its checksum is another one")
        tensors = {}
        for name, (shape, dtype) in self.declared.items():
            if name in self._layers:
                tensors[name] = self._weights(name).view(shape)
            elif name not in self.metadata["aliases"]:
                tensors[name] = self._handle.get_tensor(f"tensor/{name}").to(dtype)
        return tensors | {alias: tensors[name] for alias, name in self.metadata["aliases"].items()}

    def _n1(self, name: str) -> int | None:
        n1 = self._handle.get_tensor(f"n1/{name}").tolist()
        return int(n1[0]) if n1 else None

    def _weights(self, name: str) -> Tensor:
        layer, (shape, dtype) = self._layers[name], self.declared[name]
        grid, packed = PowerOfTwoGrid(self._n1(name), layer["bits"]), self._handle.get_tensor(f"codes/{name}")
        weights = torch.empty(math.prod(shape), dtype=dtype)
        try:
            grid.check_dtype(dtype)
            digest = layer.get("codes_sha256")
            codes = (unpack if digest is None else unpack_entropy)(packed, grid.bits, weights.numel())
            _require(digest in (None, hashlib.sha256(_bytes(codes)).hexdigest()), "other codes than were saved")
            for part, chunk in zip(torch.split(weights, _CHUNK), torch.split(codes, _CHUNK), strict=True):
                part.copy_(grid.decode(chunk, dtype))
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
    """Dtype and shape of every tensor, the metadata, and the size of the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        _require(size >= 8 and length <= min(size - 8, _MAX_HEADER), f"its header would take {length} bytes")
        header = _parse(file.read(length).decode())
    texts = header.pop("__metadata__", None)
    if not isinstance(texts, dict) or texts.keys() != {_KEY} or not isinstance(texts[_KEY], str):
        raise ArtifactError("this is a safetensors file, but not one of save_packed")
    entries = {}
    for name, entry in header.items():
        _require(isinstance(entry, dict) and entry.get("dtype") in _DTYPES, f"{name} is of no type that is saved")
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
    if version != VERSION or isinstance(version, bool):
        raise ArtifactError(
            f"it has format version {version!r:.40}, this release reads version {VERSION}; read it with the one "
            "that wrote it"
        )
    kinds = {"layers": dict, "aliases": dict, "narrowed": dict, "off_grid": list, "sha256": str}
    for key, kind in kinds.items():
        _require(isinstance(metadata.get(key), kind), f"its {key} is missing or no {kind.__name__}")
    _require(all(isinstance(name, str) for name in metadata["aliases"].values()), "its aliases are no names")
    _require(all(dtype in _NAMES for dtype in metadata["narrowed"].values()), "it narrows unknown types")
    for name, layer in metadata["layers"].items():
        _require(isinstance(layer, dict), f"{name} is no record of a layer")
        bits = layer.get("bits")
        _require(isinstance(bits, int) and MIN_BITS <= bits <= MAX_BITS, f"{name} has {bits!r:.40} bits")
        _require(_NAMES.get(layer.get("dtype")) in _FLOATS, f"{name} has no dtype of weights")
        layer["shape"] = list(_checked_shape(name, layer.get("shape")))


def _checked_shape(name: str, shape: Any) -> tuple[int, ...]:
    numbers = isinstance(shape, list) and len(shape) <= 64 and all(type(n) is int and n >= 0 for n in shape)
    _require(numbers and math.prod(n or 1 for n in shape) < 1 << 48, f"{name} has no possible shape")
    return tuple(shape)


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)


def common_prefix(names: Iterable[str], targets: Iterable[str]) -> str:
    """What stands before each name in the file, where a module around the network was saved; mostly nothing."""
    names, targets = set(names), set(targets)
    if names == targets or not names or not targets:
        return ""
    first, target = min(names), min(targets)
    prefix = first[: -len(target)] if first.endswith(f".{target}") else ""
    return prefix if names == {prefix + name for name in targets} else ""


def _check_fits(file: _File, targets: Mapping[str, Tensor]) -> None:
    """Refuse a network that differs from the file in names, shapes, dtypes or tied weights."""
    lines = [f"{name} is in the file, not in the network" for name in file.declared if name not in targets]
    lines += [f"{name} is in the network, not in the file" for name in targets if name not in file.declared]
    own_names: dict[Any, str] = {}
    for name, target in targets.items():
        if name not in file.declared or not isinstance(target, Tensor):
            continue
        shape, dtype = file.declared[name]
        if (shape, dtype) != (tuple(target.shape), target.dtype):
            there, here = f"{_name(dtype)}{list(shape)}", f"{_name(target.dtype)}{list(target.shape)}"
            lines.append(f"{name} is {there} in the file, {here} in the network")
        if target.is_meta:
            lines.append(f"{name} has no memory in the network; call its to_empty(device=...) first")
        aliases = file.metadata["aliases"]
        tied = own_names.setdefault(_place(name, target), name)
        if aliases.get(tied, tied) != aliases.get(name, name):
            lines.append(f"{name} and {tied} are tied in the network, not in the file")
    if lines:
        more = [f"and {len(lines) - 10} more"] if len(lines) > 10 else []
        raise ArtifactError("the file does not fit the network:\n  " + "\n  ".join(lines[:10] + more))


def _check_float_dtype(dtype: torch.dtype | None) -> None:
    if dtype not in (None, torch.float16, torch.bfloat16):
        raise ValueError(f"float_dtype must be torch.float16 or torch.bfloat16, got {dtype}")


def plain_tensors(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state_dict without what `torch.compile` adds to names; refuses what is no tensor of a plain kind."""
    tensors = {name.replace("_orig_mod.", ""): value for name, value in state_dict.items()}
    for name, value in tensors.items():
        if type(value) not in (Tensor, nn.Parameter) or value.layout is not torch.strided or value.is_meta:
            raise ValueError(
                f"{name} is a {type(value).__name__}, not a plain tensor with data; gather sharded weights, and remove "
                "it from the state_dict if it is no tensor"
            )
        if value.dtype not in _NAMES.values():
            raise ValueError(f"{name} is {value.dtype}; a packed file holds {', '.join(_NAMES)}")
    return {name: value.detach() for name, value in tensors.items()}


def untie(tensors: dict[str, Tensor], grids: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors without repetition, and the other names of each, for those that share their memory."""
    own_names: dict[Any, str] = {}
    for name in sorted(tensors, key=lambda name: grids.get(name) is None):  # the name that has the grid counts
        own_names.setdefault(_place(name, tensors[name]), name)
    aliases = {name: own_names[_place(name, tensor)] for name, tensor in tensors.items()}
    aliases = {name: own for name, own in aliases.items() if name != own}
    return {name: tensor for name, tensor in tensors.items() if name not in aliases}, aliases


def _place(name: str, tensor: Tensor) -> Any:
    """Equal for tensors that are the same memory, seen alike."""
    if not tensor.numel() or tensor.is_meta:
        return name
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _rounding(name: str, value: Tensor, stored: Tensor) -> float:
    """The largest difference between a tensor and its narrower copy."""
    if bool((value.isfinite() & ~stored.isfinite()).any()):
        raise ValueError(f"{name} holds values beyond {stored.dtype}, whose largest is {torch.finfo(stored.dtype).max}")
    finite = value.isfinite()
    difference = (value[finite].double() - stored[finite].double()).abs()
    return float(difference.max()) if difference.numel() else 0.0


def _checksum(metadata: Mapping[str, Any], tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of the metadata but for the checksum itself, and of the tensors, in the order of their names."""
    covered = {key: value for key, value in metadata.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(covered, sort_keys=True).encode())
    for name, tensor in tensors:
        digest.update(json.dumps([name, _name(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write(path: Path, tensors: dict[str, Tensor], metadata: str) -> int:
    """Write the file under a temporary name, then rename it; returns its size in bytes."""
    partial = path.with_name(path.name + ".partial")
    try:
        size = partial.write_bytes(save(tensors, {_KEY: metadata}))  # save_file would make it private
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return size


def _some(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)[:5])
