"""What a state_dict holds besides tensors, as JSON: the extra state of modules (``get_extra_state``)."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from inq_lightning.formats.tensors import STORED, as_bytes, dtype_name, from_bytes

#: Size of a tensor within a value, in bytes; larger ones belong into buffers.
_MOST = 1 << 20


def pack_value(name: str, value: Any) -> Any:
    """A value as JSON.

    Numbers, texts and None are themselves, a list is a list. What JSON lacks is a dict of one key, which says what it
    is: ``tuple``, ``dict`` (a list of pairs, whose keys are values too), ``bytes`` (in base64), ``tensor`` (dtype,
    shape, base64).

    Args:
        name: What the state_dict calls it, for errors.
        value: The value.

    Raises:
        ValueError: It is, or holds, something else, or a tensor of more than 1 MiB.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, list):
        return [pack_value(name, item) for item in value]
    if type(value) in (tuple, torch.Size):
        return {"tuple": [pack_value(name, item) for item in value]}
    if isinstance(value, Mapping):
        return {"dict": [[pack_value(name, key), pack_value(name, item)] for key, item in value.items()]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": base64.b64encode(value).decode()}
    if type(value) is Tensor and not value.is_meta and value.dtype in STORED.values() and value.nbytes <= _MOST:
        data = as_bytes(value.detach().cpu()).numpy().tobytes()
        return {"tensor": [dtype_name(value.dtype), list(value.shape), base64.b64encode(data).decode()]}
    what = f"a {type(value).__name__}"
    if isinstance(value, Tensor):
        what = f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
    raise ValueError(
        f"{name} holds {what}, which a file of save_packed does not: of what is no tensor itself, it holds numbers, "
        "texts, bytes, None, lists, tuples, dicts and dense tensors of up to 1 MiB. Let get_extra_state return such, "
        "or register a buffer"
    )


def unpack_value(packed: Any) -> Any:
    """The value that :func:`pack_value` packed; lists, tuples and dicts are plain ones.

    Raises:
        ValueError: It is nothing that :func:`pack_value` writes.
    """
    if isinstance(packed, list):
        return [unpack_value(item) for item in packed]
    if not isinstance(packed, dict):
        return packed
    ((kind, content),) = packed.items()
    if kind == "tuple":
        return tuple(unpack_value(item) for item in content)
    if kind == "dict":
        return {unpack_value(key): unpack_value(item) for key, item in content}
    if kind == "bytes":
        return base64.b64decode(content, validate=True)
    if kind == "tensor":
        dtype, shape, data = content
        if dtype in STORED:
            memory = torch.tensor(list(base64.b64decode(data, validate=True)), dtype=torch.uint8)
            return from_bytes(memory, dtype, shape)
    raise ValueError(f"it holds a value of unknown kind {kind!r:.40}")
