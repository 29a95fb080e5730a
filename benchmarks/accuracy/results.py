"""The results page, docs/results.md and its figures, from the study's results.

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
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.accuracy.channels import KEPT as CHANNELS_KEPT
from benchmarks.accuracy.norms import KEPT as NORMS_KEPT
from benchmarks.accuracy.study import TRIAL
from inq_lightning.report.plots import Exponents, exponent_histogram

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"

TEST_IMAGES = 10_000

Results = dict[str, dict[int, dict[str, Any]]]  # by cell, then by seed

#: Control of each cell: the baseline trained on for the same epochs. Cells of the same length share one.
CONTROLS = {5: "5bit_control", 4: "4bit_control", 3: "3bit_control", 2: "2bit_control"}

#: Points of test accuracy over the baseline that the study aimed at, by bits.
AIMS = {5: 0.0, 4: 0.0, 3: -0.2, 2: -0.5}

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

SECTIONS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "Bits",
        "First and last layer are quantized too; every selected weight is on its grid.",
        ("5bit", "4bit", "3bit", "2bit"),
    ),
    (
        "Controls",
        "What further training alone brings.",
        ("5bit_control", "4bit_control", "3bit_control", "2bit_control"),
    ),
    (
        "Without INQ",
        "Rounding everything at once, with no training or with training for what is not quantized: biases and norms.",
        ("5bit_one_shot", "5bit_one_phase", "3bit_one_shot", "2bit_one_shot"),
    ),
    ("Which weights first", "", ("5bit", "5bit_random", "3bit", "3bit_random")),
    (
        "Portions",
        "Four longer phases do as well at 3 bits as the paper's eight, which the preset keeps to.",
        ("5bit", "5bit_alexnet", "3bit", "3bit_coarse", "3bit_long_last"),
    ),
    ("Restarts", "", ("5bit", "5bit_no_restart", "5bit_reset_optimizer")),
    (
        "Longer training",
        "The held-out images, which decide, are against it and the test images for it, both within chance.",
        ("5bit", "5bit_20_epochs", "5bit_long"),
    ),
    ("Pruned first", "", ("5bit", "5bit_pruned")),
    (
        "What low bit widths need",
        "By the maximum instead of the least error, 2 bits fail. Ends at 8 bits gain no more than chance might.",
        ("2bit", "2bit_max", "2bit_first_last_8bit"),
    ),
    (
        "The teacher",
        "What the preset of 2 bits needs most, after least error.",
        ("5bit", "5bit_no_distillation", "2bit", "2bit_no_distillation"),
    ),
    (
        "Tried and dropped",
        "They gained no more on the held-out images than chance might, or lost, so the callback does not have them.",
        ("2bit", "2bit_straight_through", "2bit_by_channel", "3bit", "3bit_straight_through", "3bit_by_error"),
    ),
)

PUBLISHED = (
    ("INQ, ResNet-18 on ImageNet, top-1", "32 → 5 bits", "68.27 → 68.98", "Zhou et al., ICLR 2017, table 1"),
    ("INQ, ResNet-18 on ImageNet, top-1", "32 → 2 bits", "68.27 → 66.02", "Zhou et al., ICLR 2017, table 4"),
    ("TTQ, ResNet-20 on CIFAR-10", "32 → 2 bits", "91.77 → 91.13", "Zhu et al., ICLR 2017, table 1"),
    (
        "DeepShift, ResNet-18 on CIFAR-10, from a trained network",
        "32 → 5, 4, 3, 2 bits",
        "94.45 → 94.12, 94.13, 91.16, 90.68",
        "Elhoushi et al., CVPR workshops 2021",
    ),
    (
        "APoT, ResNet-20 on CIFAR-10, weights and activations",
        "32 → 4, 3, 2 bits",
        "92.96 → 92.45, 92.49, 90.96",
        "Li et al., ICLR 2020",
    ),
)


INTRODUCTION = """\
ResNet-20 on CIFAR-10 (a copy of the images that went through JPEG, so all accuracies are somewhat under those on the
original ones). Each network is compared with the full-precision baseline of its own seed, and with the *control*: that
baseline trained on, at full precision, for the same epochs with the same restarts of the learning rate and the same
teacher, so that a gain from mere further training is not taken for INQ's. A tenth of the training images is held out
for choosing settings; test images are looked at once, by the finished network, and differences are theirs. At an
accuracy, ± is half the range over the seeds; at a difference, which is over the seeds that both networks have run with,
its standard error over the 10,000 test images of each, so what is under two of them may be chance."""

TRIALS = """\
By accuracy on the 5,000 images held out of the training set. Test images had no say, though the first trials were still
shown them. Two runs that differ by less than half a point may as well be equal. `inq.straight_through` was an option
then, which the presets of 3 and 2 bits had."""

CHANNELS = """\
The grid belongs to the layer. Would each output channel gain by its own, or by a scale fitted to it? Batch
normalization takes up any scale of a filter, so what counts is the error that no scale makes good, 1 - cos² between a
filter and its rounded self: here the median over all filters of the baseline, before any training
(`python -m benchmarks.accuracy.channels`). Choosing n1 by the least error brings most of what there is to gain, and
training at 2 bits with a grid for each channel [gained nothing](#tried-and-dropped), so channels share their layer's
grid."""


NORMS = """\
The statistics that batch normalization has gathered while it trained, or those of the finished network, averaged over
all training images by `torch.optim.swa_utils.update_bn` (`python -m benchmarks.accuracy.norms`)? Accuracy on the
images held out, in %. The last phase trains nothing but biases and norms, so there is hardly anything left to gain."""


PRESET = """\
`inq-train` runs one preset by itself, here from the baseline of seed 0. Its report, with accuracies in the bfloat16
that it trains in:"""


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


def preset() -> str:
    """The command of the preset of 5 bits, and the report.json that it wrote."""
    report = json.loads((HERE / "preset_5bit.json").read_text())
    command = "inq-train experiment=cifar10_resnet20_5bit ckpt=benchmarks/accuracy/baselines/0.safetensors"
    sizes = [f"{report[f'bytes_{when}'] / 1024:.1f} KiB" for when in ("before", "after")]
    scores = [f"{100 * report[when]['test/acc']:.2f}" for when in ("before", "after")]
    return (
        f"```console\n$ {command} data.path=cifar10.npz\n```\n\n"
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


def page(results: Results) -> str:
    baseline = results["baseline"]
    settings = next(iter(baseline.values()))["settings"]
    parts = [
        "# Accuracy on CIFAR-10",
        "<!-- Written by `python -m benchmarks.accuracy.results`; change that instead. -->",
        INTRODUCTION,
        f"The baselines, which come with the project, were trained for {settings['pretrain']['max_epochs']} epochs: "
        + ", ".join(
            f"{accuracy(run):.2f}% with seed {seed} (held-out {100 * run['metrics']['val/acc']:.2f}%)"
            for seed, run in sorted(baseline.items())
        )
        + ".",
    ]
    shown: set[str] = set()
    for title, text, cells in SECTIONS:
        cells = tuple(cell for cell in cells if cell in results)
        if shown.issuperset(cells):  # nothing to compare yet
            continue
        shown |= {*cells}
        parts += [f"## {title}", text] if text else [f"## {title}"]
        parts.append(table(results, cells))
        if title == "Bits":
            parts.append(aims(results))
        parts.append("\n".join(f"- `{cell}`: {description(cell)}" for cell in cells))
    missing = [f"`{cell}`" for cell in cells_of_the_study() if cell not in results]
    if missing:
        parts += ["## Not run yet", f"The study has these cells, too: {', '.join(missing)}."]
    parts += ["## Finer grids", CHANNELS, channels()]
    parts += ["## Batch normalization at the end", NORMS, norms()]
    if any(name.startswith(TRIAL) for name in results):
        parts += ["## How the presets were chosen", TRIALS, trials(results)]
    drawn = [cell for cell in ("5bit", "2bit") if cell in results]
    if drawn:
        parts += ["## Over the epochs", "![Validation accuracy over the epochs](images/accuracy-epochs.svg)"]
        parts.append("## Where the weights go")
        parts += [f"![Weights on the exponent axis, {cell}](images/accuracy-{cell}.svg)" for cell in drawn]
    parts.append("## Published results")
    parts.append("As their authors report them, on other data and from other baselines: for orientation only.")
    lines = ["| method and network | bits | accuracy (%) | source |", "|---|---|---|---|"]
    parts.append("\n".join([*lines, *(f"| {' | '.join(row)} |" for row in PUBLISHED)]))
    parts += ["## One preset, one command", PRESET, preset()]
    parts.append("## Run it again")
    parts.append(
        "```console\n"
        "$ python -m benchmarks.accuracy.study -m cell=baseline seed=0,1 folder=runs data.path=cifar10.npz\n"
        "$ python -m benchmarks.accuracy.study -m 'cell=glob(*)' seed=0 folder=runs data.path=cifar10.npz\n"
        "$ python -m benchmarks.accuracy.results runs\n"
        "```"
    )
    return "\n\n".join(parts) + "\n"


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
    drawn = [cell for cell in ("5bit", "2bit") if cell in results]
    figures = {f"accuracy-{cell}": histogram(results, cell) for cell in drawn}
    if drawn:
        figures["accuracy-epochs"] = course(results, drawn)
    with matplotlib.rc_context({"svg.hashsalt": "results"}):  # the same figures, the same files
        for name, figure in figures.items():
            figure.savefig(DOCS / "images" / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
