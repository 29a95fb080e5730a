from __future__ import annotations

import doctest
import math

import pytest
import torch

from inq_lightning.report import metrics
from inq_lightning.report.metrics import BitsPerWeight, QuantizedFraction, SignalToQuantizationNoise


def test_the_examples_in_the_documentation_hold() -> None:
    result = doctest.testmod(metrics)
    assert result.attempted == 11
    assert result.failed == 0


def test_the_quantized_fraction_weighs_layers_by_their_size() -> None:
    metric = QuantizedFraction()
    metric.update(torch.ones(2, 3, dtype=torch.bool))
    assert metric.compute() == 1
    metric.update(torch.zeros(94, dtype=torch.bool))
    assert metric.compute() == 0.06
    metric.update(torch.zeros(0, dtype=torch.bool))
    assert metric.compute() == 0.06
    assert metric.compute().dtype == torch.float64


def test_the_quantized_fraction_is_exact_for_more_weights_than_float32_can_count() -> None:
    metric = QuantizedFraction()
    metric.update(torch.tensor([True]))
    mask = torch.ones(1, dtype=torch.bool).expand(1 << 24)
    metric.update(mask)
    metric.update(torch.tensor([False]))
    assert metric.compute().item() == (2**24 + 1) / (2**24 + 2)


def test_the_noise_ratio_is_the_one_of_all_weights_together() -> None:
    generator = torch.Generator().manual_seed(0)
    groups = [torch.randn(n, generator=generator) for n in (7, 50, 1)]
    rounded = [w.round() for w in groups]
    metric = SignalToQuantizationNoise()
    for w, q in zip(groups, rounded, strict=True):
        metric.update(w, q)
    w, q = torch.cat(groups).double(), torch.cat(rounded).double()
    expected = 10 * math.log10(w.square().sum() / (w - q).square().sum())
    assert metric.compute().item() == pytest.approx(expected, rel=1e-12)


def test_the_noise_ratio_of_half_precision_weights_is_computed_in_full_precision() -> None:
    metric = SignalToQuantizationNoise()
    metric.update(torch.full((1000,), 300.0, dtype=torch.float16), torch.full((1000,), 256.0, dtype=torch.float16))
    assert metric.compute().item() == pytest.approx(20 * math.log10(300 / 44), rel=1e-12)


def test_the_noise_ratio_is_infinite_where_rounding_changed_nothing() -> None:
    metric = SignalToQuantizationNoise()
    metric.update(torch.ones(3), torch.ones(3))
    assert metric.compute() == math.inf


def test_bits_per_weight_averages_over_weights_and_falls_back_to_the_width_of_the_dtype() -> None:
    metric = BitsPerWeight()
    metric.update(torch.zeros(10, 10), bits=5)
    assert metric.compute() == 5
    metric.update(torch.zeros(50))
    metric.update(torch.zeros(25, dtype=torch.bfloat16))
    metric.update(torch.zeros(25, dtype=torch.float64), bits=2)
    assert metric.compute().item() == (100 * 5 + 50 * 32 + 25 * 16 + 25 * 2) / 200


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("kind", [QuantizedFraction, SignalToQuantizationNoise, BitsPerWeight])
def test_metrics_are_undefined_before_any_update_and_after_a_reset(kind: type) -> None:
    metric = kind()
    assert math.isnan(metric.compute())
    metric.update(*((torch.ones(3), torch.zeros(3)) if kind is SignalToQuantizationNoise else (torch.ones(3),)))
    assert not math.isnan(metric.compute())
    metric.reset()
    assert math.isnan(metric.compute())


def test_a_forward_call_returns_the_value_of_its_own_batch_and_adds_to_the_whole() -> None:
    metric = QuantizedFraction()
    assert metric(torch.tensor([True, True])) == 1
    assert metric(torch.tensor([False, False])) == 0
    assert metric.compute() == 0.5


def test_the_states_of_two_processes_add_up() -> None:
    one, other, together = BitsPerWeight(), BitsPerWeight(), BitsPerWeight()
    for metric in (one, together):
        metric.update(torch.zeros(30), bits=3)
    for metric in (other, together):
        metric.update(torch.zeros(10))
    one.merge_state(other)
    assert one.compute() == together.compute() == (90 + 320) / 40
