"""How much of a network is quantized, and what is left out, by name and with the reason."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

Reason = Literal["own layer type", "embedding", "frozen", "not optimized", "computed", "excluded", "not included"]

#: How each is said, and what to write where it should be otherwise.
_WORDS: dict[Reason, tuple[str, str]] = {
    "own layer type": (
        "of layers that INQ does not know",
        'include=["*"] takes whatever has two dimensions; name in exclude what is to stay',
    ),
    "embedding": ("of embeddings", "embeddings=True takes them"),
    "frozen": ("frozen", "they are taken once they are trainable, see requires_grad_"),
    "not optimized": (
        "held by no optimizer, as an averaged copy is",
        "give them to one in configure_optimizers if they are to be trained",
    ),
    "computed": (
        "that a parametrization makes a weight of",
        "make it a plain parameter with torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm or "
        "prune.remove",
    ),
    "excluded": ("left out by exclude", ""),
    "not included": ("left out by include", ""),
}
_ASKED: set[Reason] = {"excluded", "not included"}
_NAMED = 3  # more layers of a kind than these go by one name
_LINES = 6  # names a reason at most


@dataclass(frozen=True)
class LeftOut:
    """A parameter of two or more dimensions that stays in floating point.

    Attributes:
        name: Its name.
        shape: Its shape.
        reason: Why it stays.
        layer: The type of the layer that owns it.
    """

    name: str
    shape: tuple[int, ...]
    reason: Reason
    layer: str

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Coverage:
    """What of a network's matrices of weights is quantized; biases and norms, which never are, do not count.

    Attributes:
        selected: How many weights are, or will be, quantized.
        total: How many there are.
        left_out: The parameters that stay in floating point, in the module's order.
    """

    selected: int
    total: int
    left_out: tuple[LeftOut, ...] = ()

    @classmethod
    def of(cls, selected: int, left_out: Iterable[LeftOut]) -> Coverage:
        """Add up."""
        left_out = tuple(left_out)
        return cls(selected, selected + sum(one.numel for one in left_out), left_out)

    @property
    def share(self) -> float:
        """``selected`` of ``total``, 0 to 1."""
        return self.selected / max(1, self.total)

    @property
    def overlooked(self) -> bool:
        """Whether something is left out that nobody asked to leave out."""
        return any(one.reason not in _ASKED for one in self.left_out)

    def __str__(self) -> str:
        """The message at the start of a run."""
        if not self.left_out:
            return f"INQ quantizes all {self.total:,} matrix weights of the network."
        head = f"INQ quantizes {self.selected:,} of the network's {self.total:,} matrix weights ({self.share:.1%})."
        return "\n".join([f"{head} In floating point stay:", *(f"  {line}" for line in self.lines())])

    def lines(self) -> Iterator[str]:
        """What is left out and what to do about it, a line for each reason."""
        for reason, (words, remedy) in _WORDS.items():
            some = [one for one in self.left_out if one.reason == reason]
            if not some:
                continue
            types = f" ({', '.join(sorted({one.layer for one in some}))})" if reason == "own layer type" else ""
            names = ", ".join(group_names(one.name for one in some))
            yield f"{sum(one.numel for one in some):,} {words}{types}: {names}{remedy and f'; {remedy}'}"


def group_names(names: Iterable[str]) -> list[str]:
    """Shorten a list of names: those that differ in numbers alone become one, ``h.*.mlp.weight (12)``."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", name), []).append(name)
    shown = []
    for pattern, group in groups.items():
        shown += [f"{pattern} ({len(group)})"] if len(group) > _NAMED else group
    return shown if len(shown) <= _LINES else [*shown[: _LINES - 1], f"and {len(shown) - _LINES + 1} more"]
