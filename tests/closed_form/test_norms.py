"""Norms fitted to what is wanted of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from inq_lightning.closed_form.norms import Channels, Norm, refit


def norm_of(layer: nn.BatchNorm2d, x: Tensor) -> Norm:
    return Norm(x, layer.weight, layer.bias, layer.running_mean, layer.running_var, layer.eps)


@pytest.fixture
def x() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(40, 3, 5, 5, generator=generator) * torch.tensor([0.1, 1.0, 7.0])[:, None, None] + 3


def test_means_and_covariances_do_not_depend_on_how_the_values_are_cut_into_batches(x: Tensor) -> None:
    y = x.flip(0) + x
    seen = Channels()
    for rows in torch.arange(40).split(7):
        seen.add(x[rows], y[rows], 1)
    a, b = (t.double().transpose(0, 1).flatten(1) for t in (x, y))
    torch.testing.assert_close(seen.means, torch.stack([a.mean(1), b.mean(1)]), rtol=1e-5, atol=1e-6)
    expected = torch.stack([a.var(1, correction=0), b.var(1, correction=0)])
    torch.testing.assert_close(seen.spread[:2] / seen.count, expected, rtol=1e-5, atol=1e-6)
    covariance = ((a - a.mean(1, keepdim=True)) * (b - b.mean(1, keepdim=True))).mean(1)
    torch.testing.assert_close(seen.spread[2] / seen.count, covariance, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_batch_norm_gets_the_statistics_of_a_pass_in_training_mode(x: Tensor) -> None:
    layer, fresh = nn.BatchNorm2d(3), nn.BatchNorm2d(3, momentum=None)
    fresh(x)
    seen = Channels()
    seen.add(x, torch.randn_like(x), 1)
    refit(norm_of(layer, x), seen)
    torch.testing.assert_close(layer.running_mean, fresh.running_mean)
    count = x.numel() / 3  # torch keeps the unbiased variance
    torch.testing.assert_close(layer.running_var, fresh.running_var * (count - 1) / count)


@torch.no_grad()
def test_a_batch_norm_undoes_any_change_of_scale_and_constant(x: Tensor) -> None:
    layer = nn.BatchNorm2d(3).eval()
    layer.weight.copy_(torch.tensor([0.5, -1.0, 2.0]).abs())
    layer.bias.copy_(torch.tensor([0.1, -0.2, 0.3]))
    wanted = layer(x)
    changed = x * torch.tensor([0.01, 3.0, 200.0])[:, None, None] - 5
    seen = Channels()
    seen.add(changed, wanted, 1)
    refit(norm_of(layer, changed), seen)
    torch.testing.assert_close(layer(changed), wanted, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_the_factor_is_the_geometric_mean_of_regression_and_ratio_of_deviations(x: Tensor) -> None:
    generator = torch.Generator().manual_seed(1)
    layer = nn.GroupNorm(1, 3)
    wanted = layer(x)
    actual = wanted + 0.5 * torch.randn(x.shape, generator=generator)
    seen = Channels()
    seen.add(actual, wanted, 1)
    refit(Norm(x, layer.weight, layer.bias), seen)
    a, b = (t.transpose(0, 1).flatten(1) for t in (actual, wanted))
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    slope, ratio = (a * b).sum(1) / a.square().sum(1), b.std(1) / a.std(1)
    assert bool((slope < ratio).all())
    torch.testing.assert_close(layer.weight, (slope * ratio).sqrt(), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_channel_that_is_constant_keeps_its_factor() -> None:
    x = torch.randn(20, 2, 3, 3)
    x[:, 0] = 4.0
    layer = nn.BatchNorm2d(2)
    layer.weight.copy_(torch.tensor([0.7, 1.3]))
    seen = Channels()
    seen.add(x, torch.zeros_like(x), 1)
    refit(norm_of(layer, x), seen)
    torch.testing.assert_close(layer.weight, torch.tensor([0.7, 1.3]))
    assert bool(torch.isfinite(layer.eval()(x)).all())
