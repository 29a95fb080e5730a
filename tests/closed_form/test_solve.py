"""The mathematics of one layer, against what a direct computation gives."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from inq_lightning import PowerOfTwoGrid
from inq_lightning.closed_form.solve import Moments, approach, damped, error, target

LEVELS = PowerOfTwoGrid(0, 2, family="dense").levels


def problem(seed: int, groups: int = 1, rows: int = 50, inputs: int = 6, outputs: int = 4) -> tuple[Tensor, ...]:
    """Correlated inputs in two networks, and weights."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    wanted_inputs = normal(groups, rows, inputs) @ normal(groups, inputs, inputs) + normal(groups, 1, inputs)
    x = wanted_inputs + 0.3 * normal(groups, rows, inputs)
    return x, wanted_inputs, normal(groups, outputs, inputs) / 2


def moments_of(x: Tensor, actual: Tensor, wanted: Tensor) -> Moments:
    moments = Moments(x.shape[0], x.shape[2], actual.shape[2], x.device)
    for rows in torch.arange(x.shape[1]).split(16):
        moments.add(x[:, rows], actual[:, rows], wanted[:, rows])
    return moments


@pytest.mark.parametrize("groups", [1, 3])
def test_the_target_is_the_least_squares_solution_with_damping_toward_the_weights(groups: int) -> None:
    x, f, w = problem(0, groups)
    moments = moments_of(x, x @ w.mT, f @ w.mT)
    found = target(w, moments.xx, moments.xe)
    for g in range(groups):
        amount = 0.01 * x[g].square().sum(0).mean()
        # Ridge regression as ordinary least squares with one more row for each input.
        more = amount.sqrt() * torch.eye(x.shape[2], dtype=torch.float64)
        a, b = torch.cat([x[g], more]), torch.cat([f[g] @ w[g].T, more @ w[g].T])
        torch.testing.assert_close(found[g].T, torch.linalg.lstsq(a, b).solution)


def test_the_target_is_the_formula_of_both_networks_inputs() -> None:
    x, f, w = problem(1)
    moments = moments_of(x, x @ w.mT, f @ w.mT)
    h, c = x.mT @ x, x.mT @ f
    d = 0.01 * h.diagonal(dim1=1, dim2=2).mean() * torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(target(w, moments.xx, moments.xe), (torch.linalg.inv(h + d) @ (c + d) @ w.mT).mT)


def test_moments_about_means_are_those_of_centered_rows() -> None:
    x, f, w = problem(2)
    about = moments_of(x, x @ w.mT, f @ w.mT).about_means()
    e = (f - x) @ w.mT
    x, e, wanted = (t - t.mean(1, keepdim=True) for t in (x, e, f @ w.mT))
    torch.testing.assert_close(about.xx, x.mT @ x)
    torch.testing.assert_close(about.xe, x.mT @ e)
    torch.testing.assert_close(about.ee, e.square().sum(1))
    torch.testing.assert_close(about.power, wanted.square().sum(1))


def test_moments_tell_the_error_after_a_change_without_another_pass() -> None:
    x, f, w = problem(3)
    moments = moments_of(x, x @ w.mT, f @ w.mT)
    levels, _ = approach(w, damped(moments.xx), LEVELS)
    missed = f @ w.mT - x @ levels.mT
    torch.testing.assert_close(moments.mean_error(levels - w), missed.mean(1))
    snr = 10 * math.log10(float((f @ w.mT).square().sum() / missed.square().sum()))
    assert moments.snr_db(levels - w) == pytest.approx(snr)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 20),
    groups=st.sampled_from([1, 2]),
    rows=st.integers(1, 30),
    inputs=st.integers(1, 140),
    outputs=st.integers(1, 5),
    family=st.sampled_from(["paper", "full", "dense"]),
    bits=st.integers(2, 4),
    rescale=st.booleans(),
)
def test_the_levels_are_never_worse_than_the_nearest(
    seed: int, groups: int, rows: int, inputs: int, outputs: int, family: str, bits: int, rescale: bool
) -> None:
    x, _, w = problem(seed, groups, rows, inputs, outputs)
    xx = damped(x.mT @ x)
    grid = PowerOfTwoGrid.from_weights(w, bits, exponent="mse", family=family)  # type: ignore[arg-type]
    levels, factor = approach(w, xx, grid.levels, rescale)
    assert torch.equal(grid.round(levels), levels)
    ours = error(levels * factor[..., None], w, xx)
    if not rescale:
        nearest = error(grid.round(w), w, xx)
        assert bool((ours <= nearest * (1 + 1e-9) + 1e-12).all())
    assert bool((factor == 1).all()) or rescale


def test_no_single_weight_can_be_moved_to_a_better_level() -> None:
    x, _, w = problem(5, rows=200)
    xx = damped(x.mT @ x)
    levels, _ = approach(w, xx, LEVELS)
    best = error(levels, w, xx)
    for place in range(w.shape[2]):
        for level in LEVELS:
            other = levels.clone()
            other[..., place] = level
            assert bool((error(other, w, xx) >= best - 1e-9).all())


def test_a_free_scale_lets_every_output_round_as_well_as_if_it_had_a_grid_of_its_own() -> None:
    x, _, w = problem(6, rows=2000, inputs=64, outputs=16)
    w = w * torch.logspace(-2, 2, 16, dtype=torch.float64)[:, None]  # no power of two suits all
    xx = damped(x.mT @ x)
    signal = error(torch.zeros_like(w), w, xx)
    levels, factor = approach(w, xx, LEVELS, rescale=True)
    fixed, _ = approach(w, xx, LEVELS)
    assert float((error(levels * factor[..., None], w, xx) / signal).max()) < 0.2
    assert float((error(fixed, w, xx) / signal).max()) > 0.9


def test_inputs_that_are_always_zero_and_weights_of_zero_do_no_harm() -> None:
    _, _, w = problem(7, groups=2)
    w[0] = 0
    nothing = damped(torch.zeros(2, 6, 6, dtype=torch.float64))
    for rescale in (False, True):
        levels, factor = approach(w, nothing, LEVELS, rescale)
        assert bool(torch.isfinite(levels).all())
        assert bool((factor > 0).all())
    assert torch.equal(target(w, torch.zeros(2, 6, 6).double(), torch.zeros(2, 6, 4).double()), w)
