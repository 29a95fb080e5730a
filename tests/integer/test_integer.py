"""Integer networks: every logit of the definition, of its module in floats, and of what the artifact gives back."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import networks, quantized
from torch import Tensor, nn

from inq_lightning import (
    IntegerNetwork,
    calibrate_activations,
    load_integer,
    load_packed,
    lower,
    quantize_activations,
    save_packed,
)
from inq_lightning.formats.packed import ArtifactError
from inq_lightning.integer.operations import Average, Product, Scaled
from inq_lightning.integer.scaling import Scaling, fit_scaling, powers_of_two, shift_right
from inq_lightning.recipes.models import LeNet5, ResNetCIFAR, SmallCNN

MOST = (1 << 31) - 1


def same_logits(network: IntegerNetwork, images: Tensor) -> Tensor:
    """Logits, the same by the definition and in both floating types."""
    logits = network.run(images)
    for dtype in (torch.float64, torch.float32):
        computed = network.to_torch(dtype)(images)
        assert torch.equal(computed.double(), logits.double() * 2.0**network.exponent), dtype
    return logits


# ---- scaling ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(-MOST >> 1, MOST >> 1), min_size=1), st.integers(0, 30))
def test_a_shift_rounds_half_to_even(values: list[int], shift: int) -> None:
    shifted = shift_right(torch.tensor(values, dtype=torch.int32), torch.tensor(shift, dtype=torch.int32))
    assert shifted.tolist() == [round(Fraction(value, 1 << shift)) for value in values]


@given(st.floats(-1e6, 1e6), st.integers(1, 4))
def test_a_factor_of_more_powers_of_two_is_nearer_and_each_halves_what_is_left(factor: float, terms: int) -> None:
    found = powers_of_two(factor, terms)
    assert len(found) <= terms
    left = abs(factor - sum(sign * 2.0**k for sign, k in found))
    assert left <= abs(factor) / 3**terms
    assert powers_of_two(0.75, 2) in ([(1, 0), (-1, -2)], [(1, -1), (1, -2)])


@given(
    st.lists(st.tuples(st.floats(-8, 8), st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)), min_size=1, max_size=4),
    st.integers(1, 1 << 24),
    st.integers(-12, 4),
    st.integers(-12, 4),
    st.integers(1, 4),
)
def test_scaling_is_what_exact_arithmetic_says_and_never_leaves_32_bits(
    channels: list[tuple[float, float, float]], peak: int, exponent: int, to: int, terms: int
) -> None:
    factors, before, after = (torch.tensor(column, dtype=torch.float64) for column in zip(*channels, strict=True))
    peaks = torch.full((len(channels),), peak)
    try:
        scaling, _ = fit_scaling("layer", factors, before, after, peaks, exponent, to, terms, -128, 127)
    except ValueError as error:
        if "layer: its accumulator would need" not in str(error):
            raise
        return
    assert scaling.peak(peaks) <= MOST
    sums = torch.tensor([[peak, -peak, peak // 3, 0]], dtype=torch.int32).T.expand(4, len(channels)).contiguous()
    results = scaling.run(sums)
    for c in range(len(channels)):
        whole = sum(int(s) * (1 << int(k)) for s, k in zip(scaling.signs[:, c], scaling.lefts[:, c], strict=True))
        for row in range(4):
            exact = Fraction(int(sums[row, c]) * whole + int(scaling.bias[c]), 1 << int(scaling.rights[c]))
            assert int(results[row, c]) == max(-128, min(127, round(exact)))


def test_a_bias_is_worked_out_with_the_factor_as_it_has_become() -> None:
    one = torch.tensor([0.7], dtype=torch.float64)
    mean, offset = torch.tensor([-10.0], dtype=torch.float64), torch.tensor([3.0], dtype=torch.float64)
    scaling, _ = fit_scaling("layer", one, mean, offset, torch.tensor([100]), 0, -8, 1, -(1 << 20), 1 << 20)
    assert scaling.factors.item() * 2.0 ** -int(scaling.rights) / 2**8 == 0.5  # not 0.7
    assert scaling.run(torch.tensor([[10]], dtype=torch.int32)).item() == 3 * 2**8  # at the mean, exactly the offset


# ---- whole networks --------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(networks(), st.sampled_from([1, 2, 3, 4]))
def test_every_logit_of_random_networks_is_the_same(made: tuple[nn.Module, Tensor], terms: int) -> None:
    net, images = made
    try:
        network = lower(net, images, terms=terms)
    except ValueError as error:
        if "its accumulator would need" not in str(error):
            raise
        return
    assert 0 <= network.changed <= network.images == len(images)
    assert network.accumulator_bits <= 32
    values = [network.round_input(images)]
    for operation in network.operations:  # bounds hold, and are reached by something, at least in sign
        values.append(operation.run(*(values[k] for k in operation.sources)))
        assert int(values[-1].min()) >= operation.low
        assert int(values[-1].max()) <= operation.high
        assert tuple(values[-1].shape[1:]) == operation.shape
        if isinstance(operation, Scaled):
            assert int(operation.accumulate(*(values[k] for k in operation.sources)).abs().max()) <= operation.sums
    same_logits(network, torch.cat([images, 100 * images, torch.zeros_like(images)]))


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_without_norms_and_biases_nothing_is_lost(bits: int) -> None:
    torch.manual_seed(bits)
    net = nn.Sequential(
        *(nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 8, 3, groups=4, stride=2, bias=False), nn.ReLU6(), nn.Flatten()),
        *(nn.Linear(32, 16, bias=False), nn.ReLU(), nn.Linear(16, 5, bias=False)),
    )
    images = torch.randn(64, 2, 10, 10)
    quantized(net, images, bits)
    network = lower(net, images)
    assert network.terms == 1
    assert network.changed == 0
    assert torch.equal(same_logits(network, images).double() * 2.0**network.exponent, net.double()(images.double()))


@pytest.mark.parametrize(
    ("make", "shape"),
    [(SmallCNN, (1, 8, 8)), (LeNet5, (1, 28, 28)), (lambda: ResNetCIFAR(8), (3, 16, 16))],
    ids=["SmallCNN", "LeNet5", "ResNetCIFAR"],
)
def test_the_packages_own_networks_become_whole_numbers_and_come_back_from_the_artifact(
    make: Callable[[], nn.Module], shape: tuple[int, ...], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    images = torch.randn(32, *shape)
    net = make()
    net.train()(images)  # statistics
    quantized(net, images, 4)
    network = lower(net, images)
    logits = same_logits(network, images)
    path = tmp_path / "net.safetensors"
    save_packed(net, path, integer=network)
    again = load_integer(path)
    assert torch.equal(again.run(images), logits)
    assert (again.changed, again.terms, again.counts) == (network.changed, network.terms, network.counts)
    loaded = load_packed(path, make()).eval()  # puts the activations in place
    assert torch.equal(loaded(images), net(images))
    assert torch.equal(lower(loaded, images).run(images), logits)


def test_operations_are_counted() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 2, 0], [0, 0, 0], [0, 0, 4]]).expand(2, 1, 3, 3))
        net[3].weight.fill_(0.5)
    images = torch.rand(4, 1, 4, 4)
    quantize_activations(net)
    calibrate_activations(net, [images])
    network = lower(net, images)
    convolution, linear = (op for op in network.operations if isinstance(op, Product))
    shift = int(convolution.scaling.rights[0] > 0) * 8  # of the result to eight bits
    assert convolution.counts()[:2] == (72 + 8 * int(convolution.scaling.factors[0] != 1), 24)  # 3 of 9 weights
    assert convolution.counts().shifts == 16 + shift  # those of 2 and 4
    assert linear.counts() == (24, 24, 0)
    total = network.counts
    assert total.multiplications == convolution.counts().multiplications + 24
    assert network.record().program["summary"]["additions"] == total.additions


@pytest.mark.parametrize("window", [(8, 8), (7, 7), (4, 2)])
def test_averages_over_any_window(window: tuple[int, int]) -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.AvgPool2d(window), nn.Flatten(), nn.Linear(3 * (8 // window[0]) * (8 // window[1]), 4))
    images = torch.rand(16, 3, 8, 8)
    quantized(net, images, 5)
    network = lower(net, images, terms=4)
    same_logits(network, images)
    (average,) = (op for op in network.operations if isinstance(op, Average))
    factor = int(average.scaling.factors[0]) * 2.0 ** -int(average.scaling.rights[0])
    area, step = window[0] * window[1], network.input_exponent - average.exponent
    assert factor == pytest.approx(2.0**step / area, rel=4e-3)


# ---- accumulators at their bound -------------------------------------------------------------------------------------


def at_bound(inputs: int, weight: float) -> tuple[nn.Module, Tensor]:
    """One linear layer of equal weights, all inputs at the largest code."""
    net = nn.Sequential(nn.Linear(inputs, 2, bias=False))
    with torch.no_grad():
        net[0].weight.fill_(1.0)
        net[0].weight[:, 0] = weight
    quantize_activations(net, input_bits=8)
    images = torch.full((1, inputs), 127.0)
    calibrate_activations(net, [images])
    return net, images


def test_accumulators_go_up_to_32_bits_and_no_further() -> None:
    net, images = at_bound(2, 2.0**23)
    network = lower(net, images)
    assert same_logits(network, images)[0, 0] == 127 * 2**23 + 127
    assert network.accumulator_bits == 32  # 128 · 2^23 can come, too
    net, images = at_bound(2, 2.0**24)
    with pytest.raises(ValueError, match=r"^0: its accumulator would need 33 bits, 32 are there"):
        lower(net, images)


# ---- refusals --------------------------------------------------------------------------------------------------------


def ready(**options: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3, **options), nn.ReLU(), nn.Flatten(), nn.Linear(72, 2))
    images = torch.randn(8, 1, 8, 8)
    return quantized(net, images, 4), images


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        output: Tensor = self.net(x) + self.net(y)
        return output


def spoil_weight(net: nn.Module) -> None:
    nn.init.normal_(net[3].weight)  # type: ignore[index]


def spoil_calibration(net: nn.Module) -> None:
    net[1].inq_activation.exponent = None  # type: ignore[index]


def take_off(net: nn.Module) -> None:
    net[1] = nn.ReLU()  # type: ignore[index]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_weight, r"not fully quantized: 3\.weight is not on a grid"),
        (spoil_calibration, "1: its activations are not calibrated"),
        (take_off, "3 takes what 2 returns, which is not rounded"),
    ],
)
def test_what_is_not_ready_is_refused_by_name(spoil: Callable[[nn.Module], None], message: str) -> None:
    net, images = ready()
    spoil(net)
    with pytest.raises(ValueError, match=message):
        lower(net, images)


def test_what_whole_numbers_cannot_follow_is_refused_by_name() -> None:
    images = torch.randn(8, 1, 8, 8)
    with pytest.raises(ValueError, match=r"Sequential calls 0, a Sigmoid, which integers cannot follow. There are"):
        quantize_activations(nn.Sequential(nn.Sigmoid()))
    net, _ = ready(padding_mode="circular")
    with pytest.raises(ValueError, match="0 pads by padding_mode='circular'"):
        lower(net, images)
    net, _ = ready()
    with pytest.raises(ValueError, match="terms must be 1 to 4"):
        lower(net, images, terms=5)
    with pytest.raises(ValueError, match="images hold nan"):
        lower(net, images / 0 * 0)
    network = lower(net, images)
    with pytest.raises(ValueError, match=r"inputs must be of shape \(batch, 1, 8, 8\)"):
        network.run(images[:, :, 1:])
    with pytest.raises(ValueError, match="inputs hold nan"):
        network.run(images * float("nan"))
    with pytest.raises(ValueError, match=r"dtype must be torch\.float64 or torch\.float32"):
        network.to_torch(torch.bfloat16)


def test_an_artifact_refuses_whole_numbers_of_other_weights_and_says_where_there_are_none(tmp_path: Path) -> None:
    net, images = ready()
    network = lower(net, images)
    path = tmp_path / "net.safetensors"
    with torch.no_grad():
        net[0].weight.neg_()  # type: ignore[index]
    with pytest.raises(ValueError, match=r"the integer network was not made of this network's 0\.weight"):
        save_packed(net, path, integer=network)
    assert not path.exists()
    save_packed(net, path)
    with pytest.raises(ArtifactError, match="holds no integer network"):
        load_integer(path)


def test_scalings_without_terms_are_constants() -> None:
    empty = torch.zeros(1, 1, dtype=torch.int32)
    scaling = Scaling(empty, empty, torch.tensor([5], dtype=torch.int32), torch.tensor([0], dtype=torch.int32))
    assert scaling.run(torch.tensor([[7], [-7]], dtype=torch.int32)).tolist() == [[5], [5]]
