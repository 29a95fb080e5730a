"""Structured configs derived from what they configure, so that each argument is listed once, where it is taken.

Hydra-zen's ``builds`` derives them too, but gives literals, sequences and mappings, half of INQ's options, no type:
Hydra would let any value of theirs pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from omegaconf import MISSING

T = TypeVar("T")


def configures(target: Callable[..., Any], allowed: Mapping[str, str] | None = None) -> Callable[[type[T]], type[T]]:
    """Make a class the dataclass from which Hydra builds ``target``, with a field for each argument.

    What the class body says goes before. It is a class with a name in its module, so that configs can be pickled.

    Args:
        target: What is configured; the class keeps it as ``configured``, whose docstring tells what the keys mean.
        allowed: Allowed values of arguments, for docs/reference/configuration.md, where the type does not list them.
    """

    def decorate(config: type[T]) -> type[T]:
        types: dict[str, Any] = {"_target_": str}
        defaults: dict[str, Any] = {"_target_": f"{target.__module__}.{target.__qualname__}"}
        for name, argument in inspect.signature(target, eval_str=True).parameters.items():
            types[name] = _checked(argument.annotation)
            defaults[name] = _field(argument.default, (allowed or {}).get(name))
        for name in defaults.keys() - vars(config).keys():
            setattr(config, name, defaults[name])
        config.__annotations__ = types | inspect.get_annotations(config)
        config.configured = target  # type: ignore[attr-defined]
        return dataclass(config)

    return decorate


def _checked(hint: Any) -> Any:
    """The type by which OmegaConf checks what an argument gets: the nearest that it knows, or else any."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind is Literal:
        return type(inner[0])
    if kind is Sequence:
        return list[_checked(inner[0])]  # type: ignore[misc]
    if kind in (Union, UnionType) and inner[1:] == (NoneType,):
        return _checked(inner[0]) | None
    return hint if hint in (bool, int, float, str) else Any


def _field(default: Any, allowed: str | None) -> Any:
    metadata = {"allowed": allowed}
    if isinstance(default, tuple):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=MISSING if default is inspect.Parameter.empty else default, metadata=metadata)
