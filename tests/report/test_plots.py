from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from inq_lightning import PowerOfTwoGrid
from inq_lightning.report.plots import (
    Exponents,
    count_exponents,
    exponent_heatmap,
    exponent_histogram,
    metrics_against_fraction,
    split_metric,
)


def draw(figure: Figure) -> tuple[int, int]:
    """Render without a display; width and height in pixels."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas.get_width_height()


def layer(shift: int = 0) -> Exponents:
    frozen = {None: 5, -4 - shift: 20, -3 - shift: 50, -2 - shift: 25}
    return Exponents(frozen, {-5 - shift: 60, -6 - shift: 39, -30 - shift: 1}, PowerOfTwoGrid(-2 - shift, 5))


@given(st.lists(st.floats(-100, 100, width=32).filter(lambda x: x == 0 or abs(x) > 1e-30), min_size=1, max_size=30))
def test_every_weight_counts_at_the_level_that_rounding_gives_it(values: list[float]) -> None:
    weight = torch.tensor(values)
    counted = count_exponents(weight).frozen
    expected: dict[int | None, int] = {}
    grid = PowerOfTwoGrid(8, 8)
    for w in weight[weight.abs() >= 2.0**grid.n2]:  # type: ignore[operator]
        k = round(math.log2(abs(float(grid.round(w)))))
        expected[k] = expected.get(k, 0) + 1
    assert {k: n for k, n in counted.items() if k is not None and k > grid.n2} == {  # type: ignore[operator]
        k: n
        for k, n in expected.items()
        if k > grid.n2  # type: ignore[operator]
    }
    assert counted.get(None, 0) == int((weight == 0).sum())
    assert sum(counted.values()) == len(values)


def test_frozen_and_free_weights_count_apart_and_what_is_not_finite_does_not() -> None:
    weight = torch.tensor([0.5, 0.25, 0.74, 0.75, 0.0, float("nan"), float("inf")])
    mask = torch.tensor([True, True, False, False, True, False, False])
    counted = count_exponents(weight, mask, PowerOfTwoGrid(-1))
    assert counted == Exponents({None: 1, -1: 1, -2: 1}, {-1: 1, 0: 1}, PowerOfTwoGrid(-1))
    assert counted.levels == list(range(-8, 0))
    assert counted.total == 5
    assert counted.share(-1) == 0.4
    assert counted.share(None) == 0.2
    assert Exponents(grid=PowerOfTwoGrid(-1, 2, family="dense")).levels == [-3, -1]
    assert Exponents(grid=PowerOfTwoGrid(None)).levels == Exponents().levels == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("val/acc", ("val", "acc")),
        ("validation_loss", ("val", "loss")),
        ("train/loss_epoch", ("train", "loss_epoch")),
        ("training.f1", ("train", "f1")),
        ("test_acc/dataloader_idx_0", ("test", "acc/dataloader_idx_0")),
        ("inq/phase", None),
        ("value", None),
        ("trainer", None),
        ("lr-SGD", None),
    ],
)
def test_a_metrics_name_tells_stage_and_quantity(name: str, expected: tuple[str, str] | None) -> None:
    assert split_metric(name) == expected


def test_the_histogram_shows_frozen_and_free_shares_of_each_layer() -> None:
    figure = exponent_histogram({"conv": layer(), "linear": layer(1)}, "phase 1")
    axes = [a for a in figure.axes if a.get_visible()]
    assert [a.get_title() for a in axes] == ["conv", "linear"]
    frozen, free = axes[0].containers
    assert (frozen.get_label(), free.get_label()) == ("frozen", "free")
    assert sum(bar.get_height() for bar in frozen) == pytest.approx(50)
    assert sum(bar.get_height() for bar in free) == pytest.approx(50)
    assert axes[0].get_ylim() == axes[1].get_ylim()
    labels = [text.get_text() for text in axes[0].get_xticklabels()]
    assert labels[:2] == ["0", "≤−7"]
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"frozen", "free", "levels of the grid"}
    draw(figure)


def test_the_heat_map_has_a_row_for_each_layer_that_adds_up() -> None:
    figure = exponent_heatmap({"conv": layer(), "linear": layer(1)})
    (image,) = figure.axes[0].images
    shares = torch.tensor(image.get_array().tolist())  # type: ignore[union-attr]
    assert shares.sum(1).tolist() == pytest.approx([100, 100])
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["conv", "linear"]
    assert len(figure.axes[0].get_xticklabels()) == shares.shape[1]
    draw(figure)


def test_fifty_layers_with_long_names_stay_legible() -> None:
    names = [f"model.backbone.stage{i // 10}.{i % 10}.attention.query_projection.weight" for i in range(53)]
    layers = {name: layer(i % 4) for i, name in enumerate(names)}
    heatmap = exponent_heatmap(layers)
    labels = [text.get_text() for text in heatmap.axes[0].get_yticklabels()]
    assert len(set(labels)) == 53
    assert labels[12] == "stage1.2"
    width, height = draw(heatmap)
    assert height / 53 > 20  # pixels a row
    assert width < 2000
    titles = [axes.get_title() for axes in exponent_histogram(layers).axes if axes.get_visible()]
    assert len(set(titles)) == 53


def test_layers_of_zeros_can_be_drawn_and_no_layers_cannot() -> None:
    zeros = {"dead": count_exponents(torch.zeros(3))}
    draw(exponent_histogram(zeros))
    draw(exponent_heatmap(zeros))
    for figure in (exponent_histogram, exponent_heatmap):
        with pytest.raises(ValueError, match="no layers"):
            figure({})


def test_metrics_have_a_panel_for_each_quantity_and_a_line_through_the_end_of_each_phase() -> None:
    points = [
        (0.5, {"val/acc": 0.8, "train/loss": 0.4}),
        (0.5, {"val/acc": 0.9}),
        (1.0, {"val/acc": 0.7, "val/loss": 0.1}),
    ]
    figure = metrics_against_fraction([*points, (1.0, {"val/loss": float("nan"), "lr-SGD": 1.0})], "title")
    assert [axes.get_ylabel() for axes in figure.axes] == ["acc", "loss"]
    dots, line = figure.axes[0].lines
    assert list(dots.get_ydata()) == [0.8, 0.9, 0.7]
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([50.0, 100.0], [0.9, 0.7])
    assert [line.get_label() for line in figure.axes[1].lines[1::2]] == ["train", "val"]
    draw(figure)


def test_more_metrics_than_a_figure_holds_are_counted_in_its_title() -> None:
    figure = metrics_against_fraction([(1.0, {f"val/m{i:02}": 1.0 for i in range(15)})])
    assert sum(axes.get_visible() for axes in figure.axes) == 12
    assert "3 more metrics" in figure.get_suptitle()


def test_without_a_metric_of_a_stage_there_is_nothing_to_draw() -> None:
    with pytest.raises(ValueError, match="begin with train, val or test"):
        metrics_against_fraction([(0.5, {"acc": 1.0})])


def test_figures_need_no_display_and_leave_pyplot_alone() -> None:
    code = (
        "import io, sys; from inq_lightning.report.plots import *; import torch; "
        "exponent_heatmap({'a': count_exponents(torch.ones(3))}).savefig(io.BytesIO()); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
