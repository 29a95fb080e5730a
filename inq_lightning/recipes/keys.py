"""Keys of the configuration that nothing would read: refused, with names near to them."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Iterable, Iterator
from importlib import import_module
from typing import Any

from omegaconf import Container, DictConfig, ListConfig, OmegaConf


def check_keys(cfg: DictConfig) -> None:
    """Refuse a key, which ``+`` puts anywhere, that what it configures does not take.

    Raises:
        ValueError: There is one; the message names it and what may have been meant. Or nothing says what the model is.
    """
    if OmegaConf.is_missing(cfg.model, "_target_"):
        raise ValueError("model=custom needs the class: say model._target_=your_package.YourModule")
    for key in _unknown(cfg, ""):
        raise ValueError(no_such_key(key, cfg))


def no_such_key(key: str, cfg: Container) -> str:
    """What to tell about a key that is not there."""
    others = (name for name in _known(cfg, "") if name != key and not name.startswith("hydra."))
    known = sorted(others, key=lambda name: (name.count("."), name))
    leaf = key.rpartition(".")[2]
    by_leaf: dict[str, list[str]] = {}
    for name in known:
        by_leaf.setdefault(name.rpartition(".")[2], []).append(name)
    near = [
        *by_leaf.get(leaf, []),
        *difflib.get_close_matches(key, known, n=2, cutoff=0.8),
        *(name for one in difflib.get_close_matches(leaf, by_leaf, n=2, cutoff=0.75) for name in by_leaf[one]),
    ]
    meant = " or ".join([*dict.fromkeys(near)][:2])
    return f"there is no key {key}; " + (f"did you mean {meant}?" if meant else "--cfg job prints those there are")


def takes(node: Any, key: str) -> bool:
    """Whether a node of the config may have this key, though it does not."""
    allowed = _allowed(node) if isinstance(node, DictConfig) else None
    return allowed is None or key in allowed


def _unknown(node: Any, path: str) -> Iterator[str]:
    allowed = _allowed(node)
    for key, child in _children(node):
        if allowed is not None and key not in allowed and not key.startswith("_"):
            yield path + key
        elif isinstance(child, (DictConfig, ListConfig)):
            yield from _unknown(child, f"{path}{key}.")


def _known(node: Any, path: str) -> Iterator[str]:
    there = dict(_children(node))
    for key in (_allowed(node) or set()) | there.keys():
        if not key.startswith("_"):
            yield path + key
        if isinstance(there.get(key), DictConfig):
            yield from _known(there[key], f"{path}{key}.")


def _children(node: Any) -> Iterator[tuple[str, Any]]:
    """Keys and values; None where a value is missing or refers to another key."""
    keys: Iterable[Any] = node if isinstance(node, DictConfig) else range(len(node))
    for key in keys:
        elsewhere = OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key)
        yield str(key), None if elsewhere else node[key]


def _allowed(node: Any) -> set[str] | None:
    """The keys that a node may have: of its structured config, and what its target takes; None where all may be."""
    if not isinstance(node, DictConfig):
        return None
    kind = OmegaConf.get_type(node)
    fields = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    parameters = _parameters(None if OmegaConf.is_missing(node, "_target_") else node.get("_target_"))
    if parameters is None:
        return fields or None
    if not fields and any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return None
    return fields | parameters.keys()


def _parameters(target: str | None) -> dict[str, inspect.Parameter] | None:
    """What a target takes; None where there is none, or none that can be asked, which instantiating it will tell."""
    module, _, name = (target or "").rpartition(".")
    try:
        return dict(inspect.signature(getattr(import_module(module), name)).parameters)
    except (ImportError, AttributeError, TypeError, ValueError):
        return None
