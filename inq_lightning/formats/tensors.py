"""The tensors of a network's state_dict, as files take them: plain, under plain names, each once."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inq_lightning.core.layer import plain_name

#: What safetensors calls the types that it holds.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
#: Bytes of a safetensors file's header that are read at most.
MAX_HEADER = 1 << 24


def dtype_name(dtype: torch.dtype) -> str:
    """What torch calls a dtype, such as ``"float32"``."""
    return str(dtype).removeprefix("torch.")


#: All of these by their names.
NAMES = {dtype_name(dtype): dtype for dtype in DTYPES.values()}
_OTHERS = ("complex128", "complex32", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
#: Types that not every safetensors holds, but each byte of which a file can; torch may be too old for some.
RAW = {name: getattr(torch, name) for name in _OTHERS if hasattr(torch, name)}
#: All types that the artifact holds.
STORED = NAMES | RAW


def plain_tensors(state_dict: Mapping[str, Any], types: Mapping[str, torch.dtype] = NAMES) -> dict[str, Tensor]:
    """A state_dict under plain names, see :func:`~inq_lightning.core.layer.plain_name`.

    Args:
        state_dict: The state_dict.
        types: The types that the file holds, by name.

    Raises:
        ValueError: A value is no tensor of a plain kind, or of another type.
    """
    tensors = {plain_name(name): value for name, value in state_dict.items()}
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{name} is a {type(value).__name__}, no tensor; only save_packed writes such extra state, leave it "
                "out of the state_dict for other formats"
            )
        if type(value) not in (Tensor, nn.Parameter) or value.layout is not torch.strided or value.is_meta:
            raise ValueError(
                f"{name} is a {type(value).__name__} ({value.layout}, on {value.device}), not a plain tensor with "
                "data: gather sharded weights, make sparse ones dense, give those on the meta device memory"
            )
        if value.dtype not in types.values():
            advice = "call its dequantize()" if value.is_quantized else "convert it, or keep its bytes as uint8"
            raise ValueError(f"{name} is {value.dtype}; the file holds {', '.join(types)}: {advice}")
    return {name: value.detach().resolve_conj().resolve_neg() for name, value in tensors.items()}


def as_bytes(tensor: Tensor) -> Tensor:
    """The memory of a tensor, element by element: uint8, one dimension."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def from_bytes(data: Tensor, dtype: str, shape: Sequence[int]) -> Tensor:
    """The tensor that :func:`as_bytes` made bytes of, in memory of its own."""
    return data.clone().view(STORED[dtype]).view(*shape)


def untie(tensors: Mapping[str, Tensor], preferred: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Take each tensor once.

    Args:
        tensors: Tensors by name; tied ones share their memory.
        preferred: Where one of these names, with anything but None, is among a tensor's, it counts; else the first.

    Returns:
        The tensors, and for each other name the one that counts.
    """
    own_names: dict[Any, str] = {}
    for name in sorted(tensors, key=lambda name: preferred.get(name) is None):
        own_names.setdefault(place(name, tensors[name]), name)
    aliases = {name: own_names[place(name, tensor)] for name, tensor in tensors.items()}
    aliases = {name: own for name, own in aliases.items() if name != own}
    return {name: tensor for name, tensor in tensors.items() if name not in aliases}, aliases


def place(name: str, tensor: Tensor) -> Any:
    """Equal for tensors that are the same memory, seen alike."""
    if not tensor.numel() or tensor.is_meta:
        return name
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def memory(tensors: Iterable[Tensor]) -> int:
    """Size of tensors in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def common_prefix(names: Iterable[str], targets: Iterable[str]) -> str:
    """What stands before each target in ``names``, where a module around the network was saved; mostly nothing."""
    names, targets = set(names), set(targets)
    if names == targets or not names or not targets:
        return ""
    first, target = min(names), min(targets)
    prefix = first[: -len(target)] if first.endswith(f".{target}") else ""
    return prefix if names == {prefix + name for name in targets} else ""


def read_head(path: str | os.PathLike[str]) -> bytes:
    """Read as much of a file as tells what it is: its first bytes; of a safetensors file, the whole header."""
    with Path(path).open("rb") as file:
        head = file.read(9)
        if head[8:] == b"{":
            head += file.read(min(int.from_bytes(head[:8], "little"), MAX_HEADER))
        return head
