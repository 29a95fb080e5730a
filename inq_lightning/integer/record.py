"""Operations as plain data and small tensors, for the artifact, which has the weights already."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from inq_lightning.grid import Grid
from inq_lightning.grid.recognize import encode
from inq_lightning.integer import operations
from inq_lightning.integer.operations import Operation, Product
from inq_lightning.integer.scaling import Scaling

_KINDS: dict[str, type[Operation]] = {
    kind.__name__: kind
    for kind in (
        operations.Product,
        operations.Scale,
        operations.Sum,
        operations.Average,
        operations.Max,
        operations.Reshape,
        operations.Pad,
        operations.Slice,
        operations.Concat,
    )
}
_MOST = 30  # powers of two between the least and the largest weight
_TENSORS = ("signs", "lefts", "bias", "rights")  # of a scaling


def describe(program: Iterable[Operation]) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """What operations are, but for their weights: plain JSON values, and tensors by name."""
    described, tensors = [], dict[str, Tensor]()
    for number, operation in enumerate(program, 1):
        said: dict[str, Any] = {"kind": type(operation).__name__}
        for field in fields(operation):
            value = getattr(operation, field.name)
            if isinstance(value, Scaling):
                said["low_high"] = [value.low, value.high]
                tensors |= {f"{number}/{name}": _narrow(name, getattr(value, name)) for name in _TENSORS}
            elif not isinstance(value, Tensor):
                said[field.name] = value
        described.append(said)
    return described, tensors


def whole(grid: Grid, weight: Tensor) -> tuple[Tensor, int]:
    """Weights on their grid as whole numbers as small as can be, int64, and the exponent of their unit.

    Raises:
        ValueError: They span more than 30 powers of two.
    """
    multiples = grid.multiples(encode(grid, weight.detach()).cpu()).double()
    exponents = torch.frexp(multiples[multiples != 0]).exponent - 1
    least, most = (int(exponents.min()), int(exponents.max())) if len(exponents) else (0, 0)
    if most - least > _MOST:
        raise ValueError(f"its weights span {most - least} powers of two, {_MOST} are possible; give it fewer bits")
    return (multiples * 2.0**-least).to(torch.int64), grid.step + least


def weight_name(operation: str) -> str:
    """The parameter that a product multiplies with."""
    return f"{operation}.weight"


def weights_of(program: Iterable[Operation]) -> dict[str, Tensor]:
    """The weights of all products, by their parameters, in floats."""
    return {weight_name(op.name): op.weight.double() * 2.0**op.unit for op in program if isinstance(op, Product)}


def rebuild(
    described: Iterable[Mapping[str, Any]], tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> tuple[Operation, ...]:
    """The operations that :func:`describe` has described.

    Raises:
        ValueError: An operation takes values that there are not.
        KeyError: Something is missing, or unknown.
    """
    found: list[Operation] = []
    for number, said in enumerate(described, 1):
        kind = _KINDS[said["kind"]]
        values: dict[str, Any] = {}
        for field in fields(kind):
            if field.name == "scaling":
                signs, lefts, bias, rights = (tensors[f"{number}/{name}"].to(torch.int32) for name in _TENSORS)
                values["scaling"] = Scaling(signs, lefts, bias, rights, *said["low_high"])
            elif field.name == "weight":
                values["weight"] = weights[weight_name(said["name"])]
            else:
                values[field.name] = as_tuples(said[field.name])
        operation = kind(**values)
        if not operation.sources or not all(0 <= source < number for source in operation.sources):
            raise ValueError(f"{operation.name} takes values that there are not")
        found.append(operation)
    return tuple(found)


def as_tuples(value: Any) -> Any:
    """JSON's lists as tuples."""
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


def _narrow(name: str, tensor: Tensor) -> Tensor:
    return tensor if name == "bias" else tensor.to(torch.int8)
