"""Tables for terminals and files, out of the records that have the values. They need the extra ``train``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from inq_lightning._common import LazyExtra
from inq_lightning.core.coverage import Coverage, group_names
from inq_lightning.core.plan import Plan
from inq_lightning.grid.levels import Levels
from inq_lightning.report.inspection import Inspection
from inq_lightning.report.run import Report

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

rich, markup, tables = (LazyExtra(f"rich.{module}", "train") for module in ("console", "markup", "table"))

_BARS = " ▁▂▃▄▅▆▇█"
_EXPONENTS = 12  # whose shares fit beside the numbers in 80 columns; lower ones have next to no weights


def plan_table(plan: Plan) -> Group:
    """What will be quantized, when, and what that saves."""
    layers = tables.Table(title="Selected layers")
    zeros = any(layer.kept for layer in plan.layers)
    layers.add_column("layer", overflow="fold")
    _numbers(layers, "shape", "bits", "levels", "weights", *(["zeros that stay"] if zeros else []))
    for layer in plan.layers:
        kept = [f"{layer.kept:,}"] if zeros else []
        numbers = str(layer.bits), _levels(layer.levels), f"{layer.numel:,}", *kept
        layers.add_row(markup.escape(layer.name), _shape(layer.shape), *numbers)

    phases = tables.Table(title="Phases")
    _numbers(phases, "phase", f"begins at {plan.unit}", "portion", "weights frozen", "of them new", "fraction")
    before = 0
    for number, phase in enumerate(plan.phases, 1):
        start = "?" if phase.start is None else str(phase.start)
        counts = f"{phase.frozen:,}", f"{phase.frozen - before:,}", f"{phase.fraction:.6g}"
        phases.add_row(str(number), start, f"{phase.portion:g}", *counts)
        before = phase.frozen

    size = tables.Table(title="Size of all parameters", show_header=False)
    size.add_column("")
    size.add_column("", justify="right", overflow="fold")
    size.add_row("weights to quantize", f"{sum(layer.numel for layer in plan.layers):,}")
    size.add_row("in floating point", f"{sum(math.prod(tensor.shape) for tensor in plan.floating):,}")
    _add_coverage(size, plan.coverage)
    size.add_row("bytes before", f"{plan.bytes_before:,}")
    size.add_row("bytes after", f"{plan.bytes_after:,}")
    group: Group = rich.Group(layers, phases, size)
    return group


def inspection_table(inspection: Inspection) -> Group:
    """What a file holds, as aligned text; one row a layer."""
    partial = any(0 < layer.frozen < layer.numel for layer in inspection.layers)
    snr = any(layer.snr_db is not None for layer in inspection.layers)
    layers = tables.Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    layers.add_column("layer", overflow="fold", min_width=12)
    levels = [getattr(layer.grid, "family", "") for layer in inspection.layers]
    other = any(one not in ("", "paper") for one in levels)
    _numbers(layers, "shape", "bits", no_wrap=True)
    _numbers(layers, *(["levels"] if other else []))  # a list of one's own may be long
    _numbers(layers, *(["frozen"] if partial else []), "zeros", "n2", no_wrap=True)
    layers.add_column("shares", no_wrap=True, justify="right")  # the highest exponent at the right, as n1 is
    _numbers(layers, "n1", *(["SNR/dB"] if snr else []), "before/B", "after/B", no_wrap=True)
    for layer, family in zip(inspection.layers, levels, strict=True):
        layers.add_row(
            markup.escape(layer.name),
            _shape(layer.shape),
            _text(layer.bits),
            *([_levels(family)] if other else []),
            *([f"{layer.frozen / max(1, layer.numel):.1%}"] if partial else []),
            _text(layer.zeros, ".1%"),
            _text(layer.n2),
            _bars(list(layer.exponents.values())),
            _text(layer.n1),
            *([_text(layer.snr_db, ".1f")] if snr else []),
            f"{layer.bytes_before:,}",
            f"{layer.bytes_after:,}",
        )

    activations = tables.Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    activations.add_column("activations", overflow="fold")
    _numbers(activations, "bits", "codes", "step")
    for one in inspection.activations:
        step = "" if one.exponent is None else f"2^{one.exponent}"
        low, high = (-(1 << (one.bits - 1)), (1 << (one.bits - 1)) - 1) if one.signed else (0, (1 << one.bits) - 1)
        where = f"into {one.name}" if one.before else one.name
        activations.add_row(markup.escape(where.strip()), str(one.bits), f"{low}…{high}", step)

    summary = tables.Table(box=None, pad_edge=False, show_header=False)
    summary.add_column("")
    summary.add_column("", overflow="fold")
    summary.add_row("kind", inspection.kind)
    if inspection.schedule is not None:
        summary.add_row("portions", ", ".join(f"{portion:g}" for portion in inspection.schedule.portions))
        if inspection.schedule.starts is not None:
            summary.add_row("starts", f"{_list(inspection.schedule.starts)} ({inspection.schedule.unit}s)")
        if inspection.phase is not None:
            summary.add_row("phase", f"{inspection.phase} of {len(inspection.schedule.portions)}")
    summary.add_row("quantized fraction", f"{inspection.quantized_fraction:.6g}")
    summary.add_row("fully quantized", "yes" if inspection.fully_quantized else "no")
    for reason in dict.fromkeys(inspection.left_out.values()):
        names = group_names(name for name, why in inspection.left_out.items() if why == reason)
        summary.add_row(f"not quantized{reason and f' ({reason})'}", markup.escape(", ".join(names)))
    if inspection.activations:
        bits = sorted({one.bits for one in inspection.activations})
        summary.add_row("activations", f"rounded in {len(inspection.activations)} places, to {_list(bits)} bits")
    if inspection.integer is not None:
        whole = inspection.integer
        counts = f"{whole['additions']:,} additions and {whole['shifts']:,} shifts an input"
        summary.add_row("whole numbers", f"{counts} for {whole['multiplications']:,} multiplications")
        norms = f"{whole['terms']} powers of two a factor, accumulators of {whole['accumulator_bits']} bits"
        summary.add_row("", f"{norms}, {whole['bytes']:,} bytes")
        summary.add_row("", f"other predictions for {whole['changed']} of {whole['images']} inputs")
    summary.add_row("all tensors", f"{inspection.bytes_before:,} bytes before, {inspection.bytes_after:,} after")
    summary.add_row("file", f"{inspection.file_bytes:,} bytes")
    parts = [layers, "", *([activations, ""] if inspection.activations else []), summary]
    group: Group = rich.Group(*parts)
    return group


def report_table(report: Report) -> Table:
    """Before and after of a quantization, and by how much metrics differ."""
    table: Table = tables.Table(title="Incremental Network Quantization")
    table.add_column("")
    whole = report.integer
    _numbers(table, "full precision", "quantized", *([] if whole is None else ["whole numbers"]))
    for metric in report.before | report.after:
        before = report.before.get(metric)
        others = [m.get(metric) for m in (report.after, *([] if whole is None else [whole["metrics"]]))]
        differences = ("" if None in (before, value) else f" ({value - before:+.4f})" for value in others)
        cells = (_text(value, ".4f") + difference for value, difference in zip(others, differences, strict=True))
        table.add_row(markup.escape(metric), _text(before, ".4f"), *cells)
    table.add_row("quantized fraction", "0", f"{report.quantized_fraction:.6g}")
    table.add_row("bits of a quantized weight", "", _list(report.bits))
    if report.coverage is not None:
        _add_coverage(table, report.coverage)
    table.add_row("levels in use", "", f"{report.levels_used} of {report.levels_allowed}")
    sizes = [report.bytes_before, report.bytes_after, *([] if whole is None else [whole["bytes"]])]
    table.add_row("size of all parameters", *map(_kibibytes, sizes))
    table.add_row("bits a parameter", "", f"{report.bits_per_weight:.2f}")
    if whole is not None:
        multiplications = f"{whole['multiplications']:,}"
        table.add_row("multiplications an input", multiplications, multiplications, "0")
        for what in ("additions", "shifts"):
            table.add_row(f"{what} an input", "", "", f"{whole[what]:,}")
    table.add_row("time", "", f"{report.seconds:.1f} s")
    return table


def _add_coverage(table: Table, coverage: Coverage) -> None:
    """Add how much of the network is quantized, and in a row for each reason what is not."""
    last = min(len(table.columns), 3) - 2
    counts = f"{coverage.selected:,} of {coverage.total:,} ({coverage.share:.1%})"
    table.add_row("quantized matrix weights", *[""] * last, counts)
    for line in coverage.lines():
        table.add_row("not quantized", *[""] * last, markup.escape(line))


def _numbers(table: Table, *columns: str, no_wrap: bool = False) -> None:
    for column in columns:
        table.add_column(column, justify="right", no_wrap=no_wrap)


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def _levels(levels: Levels | str) -> str:
    """Their name, or of one's own all of them in units of the smallest."""
    if isinstance(levels, str):
        return levels
    return ", ".join([*(["0"] if levels.zero else []), *(f"±{1 << k}" for k in levels.exponents)])


def _text(value: float | None, form: str = "") -> str:
    return "" if value is None else format(value, form)


def _list(values: Iterable[int]) -> str:
    return ", ".join(map(str, values))


def _kibibytes(count: int) -> str:
    return f"{count / 1024:,.1f} KiB"


def _bars(shares: Sequence[float]) -> str:
    """A bar for each share, the highest one full; only zero has none. The first ones go where there are too many."""
    highest = max(shares, default=0.0)
    bars = "".join(_BARS[math.ceil(share / highest * 8)] if share else _BARS[0] for share in shares)
    return bars if len(bars) <= _EXPONENTS else "…" + bars[1 - _EXPONENTS :]
