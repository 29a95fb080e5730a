"""The figures: numbers in, a matplotlib Figure out. They need the extra ``train``.

Figures are built without pyplot, so they belong to no window, touch no global state and can be drawn in any thread.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from inq_lightning._common import LazyExtra
from inq_lightning.grid import Grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

matplotlib_figure = LazyExtra("matplotlib.figure", "train")

# Okabe and Ito's colours, told apart by every kind of colour vision.
_BLUE, _ORANGE, _GREEN = "#0072B2", "#E69F00", "#009E73"
_SERIES = {"train": (_ORANGE, "s", "-"), "val": (_BLUE, "o", "-"), "test": (_GREEN, "^", ":")}  # marker, line
_GREY = "#EEEEEE"
_EXPONENT_AXIS = "exponent k of the nearest ±2$^k$ (0: weights that are zero)"
_SHARE_AXIS = "weights (%)"
_TAIL = 0.01  # share of a layer's weights that may be gathered in the lowest column
_MOST_PANELS = 12
_CARD = 3.9  # inches: TensorBoard shows an image 350 pixels wide, in which letters of 8 points are 10 pixels high then

_STAGES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_METRIC = re.compile(rf"({'|'.join(_STAGES)})[/_.](.+)")


@dataclass(frozen=True)
class Exponents:
    """Where one layer's weights lie on the exponent axis.

    Attributes:
        frozen: How many frozen weights are nearest to ±2^k, by k; under None, how many are zero.
        free: The same of the free weights.
        grid: Their grid; None where there is none yet.
    """

    frozen: Mapping[int | None, int] = field(default_factory=dict)
    free: Mapping[int | None, int] = field(default_factory=dict)
    grid: Grid | None = None

    @property
    def levels(self) -> list[int]:
        """Exponents of the grid's levels, ascending; empty without any but zero."""
        positive = [level for level in self.grid.levels.tolist() if level > 0] if self.grid else []
        return [math.frexp(level)[1] - 1 for level in positive]

    @property
    def total(self) -> int:
        """Number of weights."""
        return sum(self.frozen.values()) + sum(self.free.values())

    def share(self, exponent: int | None) -> float:
        """Share of all weights that are nearest to ±2^exponent, or zero for None: 0 to 1."""
        return (self.frozen.get(exponent, 0) + self.free.get(exponent, 0)) / max(self.total, 1)


def count_exponents(weight: Tensor, frozen: Tensor | None = None, grid: Grid | None = None) -> Exponents:
    """Count a layer's weights by the power of two that they are nearest to.

    "Nearest" is the paper's equation 4: 2^k stands for 0.75·2^k ≤ abs(w) < 1.5·2^k, so frozen weights count at their
    level, and free ones at the level that they would take on a grid without ends. Weights that are not finite are left
    out.

    Args:
        weight: Weights of any shape, floating point.
        frozen: bool of the same shape, True where frozen; left out, all are.
        grid: Their grid, if there is one.
    """
    weight = weight.detach()
    frozen = torch.ones_like(weight, dtype=torch.bool) if frozen is None else frozen.to(weight.device)

    def count(weights: Tensor) -> dict[int | None, int]:
        weights = weights[weights.isfinite()]
        mantissa, exponent = torch.frexp(weights[weights != 0].abs())  # mantissa in [0.5, 1)
        levels, counts = torch.unique(exponent - (mantissa < 0.75).int(), return_counts=True)
        found: dict[int | None, int] = dict(zip(levels.tolist(), counts.tolist(), strict=True))
        zeros = weights.numel() - sum(found.values())
        if zeros:
            found[None] = zeros
        return found

    return Exponents(count(weight[frozen]), count(weight[~frozen]), grid)


def split_metric(name: str) -> tuple[str, str] | None:
    """Split a metric's name into stage and quantity: ``"val/acc"`` and ``"validation_acc"`` into ``("val", "acc")``.

    Returns:
        ``"train"``, ``"val"`` or ``"test"`` and the rest; None for a name that does not begin with a stage.
    """
    match = _METRIC.fullmatch(name)
    return (_STAGES[match[1]], match[2]) if match else None


def exponent_histogram(layers: Mapping[str, Exponents], title: str = "") -> Figure:
    """Draw one histogram of weights over exponents for each layer, frozen and free weights apart, one scale for all.

    Args:
        layers: What :func:`count_exponents` counted, by the layer's name.
        title: Heading of the figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: There are no layers.
    """
    columns = _columns(layers)
    across = min(len(layers), 2 if len(layers) <= 24 else 5)
    down = -(-len(layers) // across)
    figure = _figure(max(_CARD / 2 * across, _CARD), 1.5 * down + 1.2)
    grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    places = [columns.start - 2, *columns]  # zero stands apart
    ticks = slice(1, None, -(-len(columns) // 6) or 1)
    labels = _labels(layers, columns)
    names = _short(layers, 24)
    for index, (axes, name, layer) in enumerate(zip(grid.flat, names, layers.values(), strict=False)):
        frozen, free = (_shares(part, columns, layer.total) for part in (layer.frozen, layer.free))
        for k in layer.levels:
            if k >= columns.start:
                axes.axvspan(k - 0.5, k + 0.5, color=_GREY, linewidth=0, zorder=0, label="levels of the grid")
        axes.bar(places, frozen, 0.85, color=_BLUE, label="frozen")
        axes.bar(places, free, 0.85, frozen, color=_ORANGE, hatch="////", edgecolor="white", linewidth=0, label="free")
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.tick_params(axis="x", labelbottom=index + across >= len(layers))
        _plain(axes)
    # Axes are shared, and setting ticks on each of them takes quadratic time.
    axes.set_xticks([places[0], *places[ticks]], [labels[0], *labels[ticks]])
    axes.set_ylim(0, 105 * max(layer.share(k) for layer in layers.values() for k in (None, *columns)))
    for axes in grid.flat[len(layers) :]:
        axes.set_visible(False)
    figure.supxlabel(_EXPONENT_AXIS, fontsize=9)
    figure.supylabel(_SHARE_AXIS, fontsize=9)
    legend = {}
    for axes in grid.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            legend[label] = handle
    figure.legend(
        legend.values(),
        legend.keys(),
        loc="outside upper left",
        ncols=3,
        title=title,
        alignment="left",
        title_fontsize=10,
        fontsize=9,
        frameon=False,
    )
    return figure


def exponent_heatmap(layers: Mapping[str, Exponents], title: str = "") -> Figure:
    """Draw a row for each layer and a column for each exponent, coloured by the share of the layer's weights there.

    Args:
        layers: What :func:`count_exponents` counted, by the layer's name.
        title: Heading of the figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: There are no layers.
    """
    columns = _columns(layers)
    rows = [_shares(Counter(layer.frozen) + Counter(layer.free), columns, layer.total) for layer in layers.values()]
    figure = _figure(max(_CARD, 1.7 + 0.22 * (len(columns) + 1)), 1.4 + 0.25 * len(rows), title)
    axes = figure.subplots()
    highest = max(max(row) for row in rows) or 1.0
    image = axes.imshow(rows, cmap="Blues", vmin=0, vmax=highest, aspect="auto", interpolation="nearest")
    labels = _labels(layers, columns)
    axes.set_xticks(range(len(labels)), labels, fontsize=8)
    axes.set_yticks(range(len(rows)), _short(layers, 20), fontsize=8)
    axes.set_xlabel(_EXPONENT_AXIS)
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            if value >= 0.5:
                colour = "white" if value > 0.6 * highest else "black"
                axes.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks([x - 0.5 for x in range(1, len(labels))], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, len(rows))], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.2)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label="% of the layer's weights", pad=0.02, aspect=30)
    return figure


def metrics_against_fraction(points: Sequence[tuple[float, Mapping[str, float]]], title: str = "") -> Figure:
    """Draw each metric against the quantized fraction, one panel for each quantity and one line for each stage.

    A dot is one evaluation; the line goes through the last one at each fraction, the state that a phase ended with.

    Args:
        points: Quantized fraction (0 to 1) and metrics by name, in the order of time. Names begin with their stage, see
            :func:`split_metric`; others are left out, and so are values that are not finite.
        title: Heading of the figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: There is no metric to draw.
    """
    series: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for fraction, metrics in points:
        for name, value in metrics.items():
            split = split_metric(name)
            if split and math.isfinite(value):
                series.setdefault(split[1], {}).setdefault(split[0], []).append((100 * fraction, value))
    if not series:
        raise ValueError("there is no metric to draw: their names begin with train, val or test, such as val/acc")
    quantities = sorted(series)
    left_out = len(quantities) - _MOST_PANELS
    if left_out > 0:
        quantities, title = quantities[:_MOST_PANELS], f"{title} ({left_out} more metrics are not drawn)".strip()
    across = 1 if len(quantities) <= 6 else 2
    down = -(-len(quantities) // across)
    figure = _figure(_CARD * across, 2.2 * down + 0.6, title)
    grid = figure.subplots(down, across, squeeze=False)
    for axes, quantity in zip(grid.flat, quantities, strict=False):
        for stage, (colour, marker, line) in _SERIES.items():
            values = series[quantity].get(stage, [])
            if not values:
                continue
            last = sorted(dict(values).items())
            axes.plot(*zip(*values, strict=True), marker, color=colour, alpha=0.35, markersize=4, markeredgewidth=0)
            axes.plot(
                *zip(*last, strict=True), f"{marker}{line}", color=colour, markersize=6, linewidth=1.8, label=stage
            )
        axes.set_xlim(-3, 103)
        axes.set_xticks(range(0, 101, 20))
        axes.set_xlabel("quantized weights (%)")
        axes.set_ylabel(quantity)
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.grid(color=_GREY)
        axes.legend(fontsize=9, frameon=False)
        _plain(axes)
    for axes in grid.flat[len(quantities) :]:
        axes.set_visible(False)
    return figure


def _figure(width: float, height: float, title: str = "") -> Figure:
    figure: Figure = matplotlib_figure.Figure((width, height), dpi=160, layout="constrained")
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    return figure


def _plain(axes: Axes) -> None:
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _columns(layers: Mapping[str, Exponents]) -> range:
    """The exponents to show; the first one also stands for the few weights below it."""
    if not layers:
        raise ValueError("there are no layers to draw")
    present = sorted(
        {k for layer in layers.values() for part in (layer.frozen, layer.free) for k in part if k is not None}
    )
    if not present:
        return range(0)  # nothing but zeros
    lowest = present[0]
    below = dict.fromkeys(layers, 0.0)
    for k in present:
        below = {name: below[name] + layer.share(k) for name, layer in layers.items()}
        if max(below.values()) > _TAIL:
            lowest = k
            break
    return range(lowest, present[-1] + 1)


def _labels(layers: Mapping[str, Exponents], columns: range) -> list[str]:
    """Of the zeros and of each column."""
    exponents = {k for layer in layers.values() for k in (*layer.frozen, *layer.free) if k is not None}
    labels = [str(k).replace("-", "−") for k in columns]
    if any(k < columns.start for k in exponents):
        labels[0] = f"≤{labels[0]}"
    return ["0", *labels]


def _shares(counts: Mapping[int | None, int], columns: range, total: int) -> list[float]:
    """Percentages: of zeros, then by column."""
    gathered: Counter[int | None] = Counter()
    for k, count in counts.items():
        gathered[None if k is None else max(k, columns.start)] += count
    return [100 * gathered[k] / max(total, 1) for k in (None, *columns)]


def _short(names: Iterable[str], longest: int) -> list[str]:
    """Names of at most ``longest`` characters: what they have in common goes first, then the middle."""
    names = list(names)
    if max(map(len, names)) > longest and len(names) > 1:
        parts = [name.split(".") for name in names]
        head = _common(parts)
        tail = _common([part[head:][::-1] for part in parts])
        shorter = [".".join(part[head : len(part) - tail]) for part in parts]
        names = shorter if all(shorter) else names
    keep = longest // 2
    return [name if len(name) <= longest else f"{name[: longest - keep - 1]}…{name[-keep:]}" for name in names]


def _common(sequences: Iterable[Sequence[str]]) -> int:
    """How many items all sequences begin with."""
    return len(list(itertools.takewhile(lambda items: len(set(items)) == 1, zip(*sequences, strict=False))))
