"""How a batch is given to a model."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

#: Arguments of a forward pass, by position and by name.
Call: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def read_batches(model: nn.Module, batches: Iterable[Any]) -> list[Call]:
    """The arguments that each batch is for ``model.forward``, on the model's device.

    Args:
        model: The model.
        batches: See :func:`~inq_lightning.quantize`.

    Raises:
        ValueError: There are none, or one contains nan or inf; the message says which one, and where.
    """
    if isinstance(batches, (Tensor, Mapping, str)):
        raise ValueError(f"batches must be a list or a DataLoader of batches, got one {type(batches).__name__}; [it]")
    device = device_of(model)
    forward = getattr(model, "_orig_mod", model).forward
    signature = inspect.signature(forward)
    calls: list[Call] = []
    for index, batch in enumerate(batches):
        args, kwargs = _arguments(signature, batch)
        for place, value in [*enumerate(args), *kwargs.items()]:
            if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise ValueError(f"batch {index} contains nan or inf, in argument {place!r} of the model's forward")
        calls.append((_move(args, device), _move(kwargs, device)))
    if not calls:
        raise ValueError("batches is empty; some hundred inputs, as the network was trained on, are needed")
    return calls


def device_of(model: nn.Module) -> torch.device:
    """Where its first parameter or buffer is; the CPU where it has none."""
    return next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), torch.device("cpu"))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode; then each module's own mode again."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _arguments(signature: inspect.Signature, batch: Any) -> Call:
    parameters = signature.parameters.values()
    if isinstance(batch, Mapping):
        any_name = any(p.kind is p.VAR_KEYWORD for p in parameters)
        named = {key: value for key, value in batch.items() if any_name or key in signature.parameters}
        return ((), named) if named else ((batch,), {})
    if isinstance(batch, (tuple, list)):
        if any(p.kind is p.VAR_POSITIONAL for p in parameters):
            return tuple(batch), {}
        required = [p for p in parameters if p.kind in _POSITIONAL and p.default is p.empty]
        return tuple(batch[: max(1, len(required))]), {}
    return (batch,), {}


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _move(one, device) for key, one in value.items()}
    if isinstance(value, (tuple, list)):
        moved = [_move(one, device) for one in value]
        return type(value)(*moved) if hasattr(value, "_fields") else type(value)(moved)
    return value.to(device) if hasattr(value, "to") else value
