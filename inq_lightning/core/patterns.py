"""Patterns by which users name parameters and layers."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn

from inq_lightning.core.layer import plain_name
from inq_lightning.grid.levels import LevelsOption, check_levels
from inq_lightning.grid.power_of_two import check_bits

T = TypeVar("T")


class Patterns:
    """Matches patterns with the parameters of one module.

    A pattern that is the very name of a parameter or a layer of the module stands for that one alone, whatever
    characters are in it. Any other is matched by :mod:`fnmatch`, where ``*`` also crosses dots; ``[`` for itself is
    written ``[[]`` there.
    """

    def __init__(self, module: nn.Module) -> None:
        modules = (name for name, _ in module.named_modules(remove_duplicate=False))
        parameters = (name for name, _ in module.named_parameters(remove_duplicate=False))
        self._names = {plain_name(name) for names in (modules, parameters) for name in names}

    def match(self, names: Iterable[str], patterns: Iterable[str]) -> bool:
        """Whether a pattern matches a parameter that has these names, by one of them or by its layer's."""
        both = {part for name in names for part in (name, name.rpartition(".")[0])}
        return any(self._fits(name, pattern) for pattern in patterns for name in both)

    def value(self, names: Iterable[str], values: Mapping[str, T] | None, default: T) -> T:
        """What the last matching pattern gives a parameter that has these names; otherwise the default."""
        matching = [value for pattern, value in (values or {}).items() if self.match(names, [pattern])]
        return matching[-1] if matching else default

    def check(self, option: str, patterns: Iterable[str], parameters: Collection[Collection[str]]) -> None:
        """Refuse a pattern that matches none of the parameters, each given by its names.

        Raises:
            ValueError: There is one; the message names the option and names near to the pattern.
        """
        for pattern in patterns:
            if any(self.match(names, [pattern]) for names in parameters):
                continue
            known = [name for names in parameters for name in names]
            known += [name.rpartition(".")[0] for name in known]
            near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.3) or known[:5]
            raise ValueError(
                f"{option} pattern {pattern!r} matches no weight that can be quantized"
                + (f"; near names: {', '.join(near)}" if near else "")
            )

    def _fits(self, name: str, pattern: str) -> bool:
        return name == pattern if pattern in self._names else fnmatchcase(name, pattern)


def check_patterns(option: str, patterns: object) -> None:
    """Refuse what is no list of patterns.

    Raises:
        ValueError: ``patterns`` is none; the message names the option.
    """
    if patterns is not None and not _are_texts(patterns, Sequence):
        hint = f"; write [{patterns!r}]" if isinstance(patterns, str) else ""
        raise ValueError(f"{option} must be a list of patterns as text, got {patterns!r}{hint}")


def check_widths(option: str, widths: object) -> None:
    """Refuse what is no mapping from patterns to bit widths.

    Raises:
        ValueError: ``widths`` is none, or a width is not allowed; the message names the option.
    """
    if widths is None:
        return
    if not isinstance(widths, Mapping) or not _are_texts(widths, Mapping):
        raise ValueError(f"{option} must be a mapping pattern → bits, such as {{'net.conv1': 8}}, got {widths!r}")
    for pattern, bits in widths.items():
        try:
            check_bits(bits)
        except ValueError as error:
            raise ValueError(f"{option}[{pattern!r}]: {error}") from error


def check_layer_levels(option: str, levels: object) -> dict[str, LevelsOption] | None:
    """A mapping from patterns to levels, each as :func:`~inq_lightning.grid.levels.check_levels` takes it.

    Raises:
        ValueError: ``levels`` is none; the message names the option.
    """
    if levels is None:
        return None
    if not isinstance(levels, Mapping) or not _are_texts(levels, Mapping):
        raise ValueError(f"{option} must be a mapping pattern → levels, such as {{'net.fc': 'full'}}, got {levels!r}")
    return {pattern: check_levels(f"{option}[{pattern!r}]", one) for pattern, one in levels.items()}


def _are_texts(patterns: object, kind: type[Sequence[str]] | type[Mapping[str, int]]) -> bool:
    return (
        isinstance(patterns, kind)
        and not isinstance(patterns, (str, bytes))
        and all(isinstance(pattern, str) for pattern in patterns)
    )
