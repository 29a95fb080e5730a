"""The integer network of an artifact."""

from __future__ import annotations

import os

import torch

from inq_lightning.formats.packed import ArtifactError, read_packed
from inq_lightning.integer.network import IntegerNetwork
from inq_lightning.integer.record import as_tuples, rebuild, whole


def load_integer(path: str | os.PathLike[str]) -> IntegerNetwork:
    """Read the integer network of an artifact that was saved with one; its architecture need not be known.

    Args:
        path: The file, of ``save_packed(…, integer=network)``.

    Raises:
        ArtifactError: The file holds none, is damaged, or is of another version.
        OSError: There is no such file.
    """
    contents = read_packed(path)
    record, layers = contents.integer, contents.layers or ()
    if record is None:
        raise ArtifactError(f"{path} holds no integer network; save it with save_packed(…, integer=lower(…))")
    try:
        weights = {
            layer.name: whole(layer.grid, contents.state_dict[layer.name])[0].to(torch.int32)
            for layer in layers
            if layer.grid is not None
        }
        operations = rebuild(record.program["operations"], record.tensors, weights)
        own = {name: as_tuples(record.program[name]) for name in IntegerNetwork.plain_fields()}
        return IntegerNetwork(operations=operations, **own)
    except (KeyError, TypeError, ValueError, RuntimeError, IndexError) as error:
        raise ArtifactError(f"{path} is damaged: its integer network: {error}; copy or export it again") from error
