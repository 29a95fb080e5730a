"""The results page, docs/results.md and its figures, from the study's results and the text of results.md beside this.

``python -m benchmarks.accuracy.results RUNS`` adds the result files under RUNS to results.json beside this file, in the
place of earlier ones of the same cell and seed, then writes the page; without RUNS, from the results.json that is
there.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.accuracy.channels import KEPT as CHANNELS_KEPT
from benchmarks.accuracy.digits import KEPT as DIGITS_KEPT
from benchmarks.accuracy.integers import KEPT as INTEGERS_KEPT
from benchmarks.accuracy.norms import KEPT as NORMS_KEPT
from benchmarks.accuracy.study import TRIAL
from benchmarks.template import fill
from inq_lightning.report.plots import Exponents, exponent_histogram

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
TEMPLATE = HERE / "results.md"
DRAWN = ("5bit", "2bit_paper")  # cells with figures on the page

TEST_IMAGES = 10_000

Results = dict[str, dict[int, dict[str, Any]]]  # by cell, then by seed

#: Control of each cell: the baseline trained on for the same epochs. Cells of the same length share one.
CONTROLS = {5: "5bit_control", 4: "4bit_control", 3: "3bit_control", 2: "2bit_control"}

#: Points of test accuracy over the baseline that the study aimed at, by bits.
AIMS = {5: 0.0, 4: 0.0, 3: 0.0, 2: -0.2}

_STRAIGHT_THROUGH = """\
Training steps saw the free weights rounded, and the gradient moved the unrounded ones (the straight-through estimate).\
"""

#: Cells of options that were tried and are no more; only their results are kept.
DROPPED = {
    "2bit_straight_through": _STRAIGHT_THROUGH,
    "3bit_straight_through": _STRAIGHT_THROUGH,
    "3bit_by_error": "The free weights with the smallest rounding error freeze first.",
    "2bit_by_channel": "Each output channel has its own n1, by least error.",
}


def gather(runs: Path) -> Results:
    """All results under a study's folder, of cells, dropped ones too, and of trials: their figures only, being many."""
    results: Results = {}
    for path in sorted(runs.glob("*/*/result.json")):
        result = json.loads(path.read_text())
        if result["name"].startswith(TRIAL):
            result = {key: result[key] for key in ("name", "seed", "overrides", "metrics", "epochs")}
        elif result["name"] not in {*cells_of_the_study(), *DROPPED}:
            continue
        results.setdefault(result["name"], {})[result["seed"]] = result
    return results


def cells_of_the_study() -> list[str]:
    return sorted(path.stem for path in (HERE / "conf" / "cell").glob("*.yaml"))


def read(path: Path) -> Results:
    """What :func:`gather` has found earlier, of trials, of the cells that there still are and of dropped ones."""
    if not path.exists():
        return {}
    return {
        cell: {int(seed): result for seed, result in by_seed.items()}
        for cell, by_seed in json.loads(path.read_text()).items()
        if cell.startswith(TRIAL) or cell in DROPPED or cell in cells_of_the_study()
    }


def add(earlier: Results, later: Results) -> Results:
    """Both, the later one where a cell has run with the same seed before."""
    return {cell: {**earlier.get(cell, {}), **later.get(cell, {})} for cell in sorted({*earlier, *later})}


def accuracy(result: dict[str, Any]) -> float:
    return 100 * float(result["metrics"]["test/acc"])


def spread(values: Sequence[float]) -> str:
    """Mean, and half the range where there are several values."""
    text = f"{statistics.mean(values):.2f}"
    return text if len(values) == 1 else f"{text} ± {(max(values) - min(values)) / 2:.2f}"


def paired(results: Results, cell: str, reference: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The runs of a cell, each with the reference of its seed."""
    return [(run, results[reference][seed]) for seed, run in results[cell].items() if seed in results[reference]]


def gain(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> float:
    """Mean difference of the pairs, in points of test accuracy."""
    return statistics.mean(accuracy(run) - accuracy(other) for run, other in pairs)


def aims(results: Results) -> str:
    """Which of the aims are reached."""
    found = []
    for bits, aim in AIMS.items():
        if f"{bits}bit" in results:
            short = aim - gain(paired(results, f"{bits}bit", "baseline"))
            found.append(f"{aim:+.1f} at {bits} bits, {f'missed by {short:.2f}' if short > 0 else 'met'}")
    return f"Aims, in points against the baseline: {'; '.join(found)}."


def difference(results: Results, cell: str, reference: str) -> str:
    """Points of test accuracy over the reference of the same seeds, and their standard error.

    The error is that of a mean of paired differences: it counts the images on which the two networks do not agree.
    """
    pairs = paired(results, cell, reference)
    if not pairs:
        return ""
    mean = gain(pairs)
    apart = sum(len({*run["mistakes"]} ^ {*other["mistakes"]}) for run, other in pairs)
    images = TEST_IMAGES * len(pairs)
    return f"{mean:+.2f} ± {100 * math.sqrt(apart / images - (mean / 100) ** 2) / math.sqrt(images):.2f}"


def table(results: Results, cells: Iterable[str]) -> str:
    lines = [
        "| cell | epochs | seeds | held-out (%) | test accuracy (%) | against the baseline | against the control |",
        "|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        if cell not in results:
            continue
        runs = results[cell]
        first = next(iter(runs.values()))
        control = CONTROLS.get(first["settings"]["inq"]["bits"], "")
        lengths = {len(run["epochs"]) for run in (first, *results.get(control, {}).values())}
        equally_long = control in results and cell != control and len(lengths) == 1
        against = [difference(results, cell, "baseline"), difference(results, cell, control) if equally_long else ""]
        held_out = spread([100 * run["metrics"]["val/acc"] for run in runs.values()])
        scores = spread([accuracy(run) for run in runs.values()])
        lines.append(
            f"| `{cell}` | {len(first['epochs'])} | {len(runs)} | {held_out} | {scores} | {' | '.join(against)} |"
        )
    return "\n".join(lines)


def trials(results: Results) -> str:
    """Accuracy of all trials on the held-out images."""
    lines = ["| overrides | seeds | epochs | held-out accuracy (%) | against the baseline |", "|---|---|---|---|---|"]
    for name, runs in results.items():
        if not name.startswith(TRIAL):
            continue
        scores = {seed: 100 * run["metrics"]["val/acc"] for seed, run in runs.items()}
        before = {seed: 100 * results["baseline"][seed]["metrics"]["val/acc"] for seed in runs}
        gain = statistics.mean(scores.values()) - statistics.mean(before.values())
        first = next(iter(runs.values()))
        overrides = " ".join(f"`{text}`" for text in first["overrides"])
        length = len(first["epochs"])
        lines.append(f"| {overrides} | {len(runs)} | {length} | {spread([*scores.values()])} | {gain:+.2f} |")
    return "\n".join(lines)


def channels() -> str:
    """Rounding errors under finer grids."""
    errors = json.loads(CHANNELS_KEPT.read_text())
    kinds = list(next(iter(errors.values())))
    lines = [f"| bits | {' | '.join(kinds)} |", f"|---{'|---' * len(kinds)}|"]
    lines += [f"| {bits} | {' | '.join(f'{row[kind]:.1f}%' for kind in kinds)} |" for bits, row in errors.items()]
    return "\n".join(lines)


def norms() -> str:
    """Held-out accuracy with batch normalization's statistics as they are and re-estimated."""
    lines = ["| cell | seed | as trained | re-estimated |", "|---|---|---|---|"]
    for run in json.loads(NORMS_KEPT.read_text()):
        scores = f"{100 * run['ended']:.2f} | {100 * run['re-estimated']:.2f}"
        lines.append(f"| `{run['cell']}` | {run['seed']} | {scores} |")
    return "\n".join(lines)


def _cells(values: Iterable[float | None]) -> str:
    return " | ".join("" if value is None else f"{value:.2f}" for value in values)


def integers() -> str:
    """ResNet-20 with rounded activations and in whole numbers, without training."""
    lines = [
        "| seed | bits | full precision | float activations | 8 bits | whole | 6 bits | whole | 4 bits | whole |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in json.loads(INTEGERS_KEPT.read_text()):
        widths = (row.get(f"a{width}{kind}") for width in (8, 6, 4) for kind in ("", " integer"))
        lines.append(f"| {row['seed']} | {row['bits']} | {_cells([row['baseline'], row['float'], *widths])} |")
    return "\n".join(lines)


def digits() -> str:
    """Small networks on digits, trained with rounded activations: mean over the seeds."""
    rows = json.loads(DIGITS_KEPT.read_text())
    lines = ["| bits | activations | full precision | quantized | whole numbers |", "|---|---|---|---|---|"]
    kinds = dict.fromkeys((row["bits"], row["activations"]) for row in rows)
    for bits, activations in kinds:
        runs = [row for row in rows if (row["bits"], row["activations"]) == (bits, activations)]
        means = [
            None if None in (found := [run[key] for run in runs]) else 100 * statistics.mean(found)
            for key in ("before", "after", "integer")
        ]
        lines.append(f"| {bits} | {activations or 'floats'} | {_cells(means)} |")
    return "\n".join(lines)


def preset() -> str:
    """What the preset of 5 bits reports of its run."""
    report = json.loads((HERE / "preset_5bit.json").read_text())
    sizes = [f"{report[f'bytes_{when}'] / 1024:.1f} KiB" for when in ("before", "after")]
    scores = [f"{100 * report[when]['test/acc']:.2f}" for when in ("before", "after")]
    return (
        "| | full precision | quantized |\n|---|---|---|\n"
        f"| test accuracy (%) | {' | '.join(scores)} |\n"
        f"| levels in use | | {report['levels_used']} of {report['levels_allowed']} |\n"
        f"| size of all parameters | {' | '.join(sizes)} |"
    )


def description(cell: str) -> str:
    """The comment that a cell's file begins with."""
    if cell in DROPPED:
        return DROPPED[cell]
    lines = (HERE / "conf" / "cell" / f"{cell}.yaml").read_text().splitlines()
    return " ".join(line.removeprefix("# ") for line in lines[1:] if line.startswith("#"))


def course(results: Results, cells: Sequence[str]) -> Figure:
    """Validation accuracy over epochs, with the phases marked."""
    figure = Figure((9, 3.2 * len(cells)), layout="constrained")
    for axes, cell in zip(figure.subplots(len(cells), squeeze=False).flat, cells, strict=True):
        seed = max(results[cell])
        run = results[cell][seed]
        epochs = run["epochs"]
        scores = [100 * epoch["val/acc"] for epoch in epochs]
        axes.plot(range(1, len(scores) + 1), scores, "o-", color="#0072B2", markersize=4, label=f"{cell}, seed {seed}")
        before = 100 * results["baseline"][seed]["metrics"]["val/acc"]
        axes.axhline(before, color="#999999", linestyle="--", label="full precision")
        fraction = 0.0
        for index, epoch in enumerate(epochs):
            if epoch["inq/quantized_fraction"] > fraction:
                fraction = epoch["inq/quantized_fraction"]
                axes.axvline(index + 0.5, color="#E69F00", linewidth=1)
                label = f" {100 * fraction:.3g}%"
                axes.text(index + 0.5, 1.0, label, transform=axes.get_xaxis_transform(), fontsize=8, va="bottom")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("epoch; lines: a phase begins, the share of weights that is quantized from then on")
        axes.set_ylabel("validation accuracy (%)")
        axes.legend(loc="best", fontsize=8)
    return figure


def histogram(results: Results, cell: str) -> Figure:
    """All layers' weights together on the exponent axis, before and after."""
    counts = next(iter(results[cell].values()))["exponents"]

    def total(layers: dict[str, dict[str, int]]) -> dict[int | None, int]:
        merged: Counter[int | None] = Counter()
        for layer in layers.values():
            for k, count in layer.items():
                merged[None if k == "None" else int(k)] += count
        return dict(merged)

    before, after = total(counts["before"]), total(counts["after"])
    return exponent_histogram({"before": Exponents(free=before), f"after, {cell}": Exponents(frozen=after)})


def compare(results: Results, *cells: str, note: str = "") -> str:
    """A table of cells, and what they are; the note comes between."""
    meanings = [f"- `{cell}`: {description(cell)}{'' if cell in results else ' Not run yet.'}" for cell in cells]
    return "\n\n".join(filter(None, (table(results, cells), note, "\n".join(meanings))))


def page(results: Results) -> str:
    baseline = results["baseline"]
    return fill(
        TEMPLATE,
        epochs=next(iter(baseline.values()))["settings"]["pretrain"]["max_epochs"],
        baselines=", ".join(
            f"{accuracy(run):.2f}% with seed {seed} (held-out {100 * run['metrics']['val/acc']:.2f}%)"
            for seed, run in sorted(baseline.items())
        ),
        compare=partial(compare, results),
        aims=aims(results),
        channels=channels(),
        norms=norms(),
        integers=integers(),
        digits=digits(),
        trials=trials(results),
        preset=preset(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="?", type=Path, help="the study's folder")
    runs = parser.parse_args().runs
    kept = HERE / "results.json"
    results = read(kept)
    if runs is not None:
        results = add(results, gather(runs))
    text = page(results)
    kept.write_text(json.dumps(results, separators=(",", ":")) + "\n")
    (DOCS / "results.md").write_text(text)
    figures = {f"accuracy-{cell}": histogram(results, cell) for cell in DRAWN}
    figures["accuracy-epochs"] = course(results, DRAWN)
    with matplotlib.rc_context({"svg.hashsalt": "results"}):  # the same figures, the same files
        for name, figure in figures.items():
            figure.savefig(DOCS / "images" / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
