"""Rounded activations: what they compute, where they stand, how they are calibrated and saved."""

from __future__ import annotations

import copy
import pickle
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from inq_lightning import (
    INQ,
    PowerOfTwoActivation,
    calibrate_activations,
    export_onnx,
    lower,
    quantize,
    quantize_activations,
    session_options,
    to_packed,
)
from inq_lightning.core.activations import activations_of
from inq_lightning.recipes.models import LeNet5, ResNetCIFAR, SmallCNN


def calibrated(bits: int, signed: bool, values: Tensor) -> PowerOfTwoActivation:
    activation = PowerOfTwoActivation(bits, signed, "here")
    activation.calibrate(values)
    return activation.eval()


@given(
    st.lists(st.floats(-1e4, 1e4, width=32).filter(lambda x: not 0 < abs(x) < 1e-20), min_size=1, max_size=20),
    st.integers(2, 8),
    st.booleans(),
)
def test_values_become_the_nearest_steps_ties_to_even_and_the_error_is_the_least_of_five(
    values: list[float], bits: int, signed: bool
) -> None:
    x = torch.tensor(values)
    activation = calibrated(bits, signed, x)
    assert activation.exponent is not None
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)

    def rounded(exponent: int) -> list[Fraction]:
        step = Fraction(2) ** exponent
        return [max(low, min(high, round(Fraction(value) / step))) * step for value in values]

    assert [Fraction(value) for value in activation(x).tolist()] == rounded(activation.exponent)

    def error(exponent: int) -> float:
        return float(sum((a - Fraction(b)) ** 2 for a, b in zip(rounded(exponent), values, strict=True)))

    largest = max(map(abs, values)) if signed else max(values)
    if largest > 0:
        top = next(e for e in range(-160, 40) if high * Fraction(2) ** e >= Fraction(largest))
        assert top - 5 < activation.exponent <= top
        assert error(activation.exponent) <= min(error(e) for e in range(top - 4, top + 1)) * (1 + 1e-5) + 1e-30


def test_gradients_pass_straight_through_what_is_not_clamped() -> None:
    activation = calibrated(4, False, torch.linspace(0, 1, 99))
    x = torch.tensor([-0.5, 0.3, 0.9, 50.0], requires_grad=True)
    activation(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_steps_are_exact_in_every_floating_type(dtype: torch.dtype) -> None:
    activation = calibrated(8, False, torch.linspace(0, 2, 999))
    steps = activation(torch.linspace(0, 2, 999).to(dtype)) / 2.0 ** (activation.exponent or 0)
    assert steps.dtype == dtype
    assert torch.equal(steps, steps.round())


def test_it_changes_nothing_before_it_is_calibrated_and_says_where_nan_came_from() -> None:
    activation = PowerOfTwoActivation(8, True, "net.conv1").eval()
    x = torch.randn(9)
    assert torch.equal(activation(x), x)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"^net\.conv1: the batch that calibrates its activations holds infinite"):
            activation.calibrate(torch.tensor([1.0, bad]))
    assert activation.exponent is None
    assert calibrated(8, False, torch.zeros(4))(torch.ones(1)).item() == 1


def test_it_can_be_copied_and_pickled_and_loads_what_was_saved() -> None:
    net = LeNet5()
    quantize_activations(net, 6)
    calibrate_activations(net, [torch.rand(8, 1, 28, 28)])
    x = torch.rand(4, 1, 28, 28)
    expected = net.eval()(x)
    fresh = LeNet5()
    quantize_activations(fresh, 6)
    fresh.load_state_dict(net.state_dict())
    for again in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), fresh.eval()):
        assert torch.equal(again(x), expected)
    assert not any(activation.pending for activation in activations_of(fresh).values())
    other = LeNet5()
    quantize_activations(other, 4)
    with pytest.raises(ValueError, match="activations of codes 0 to 63 were saved, here they are 0 to 15"):
        other.load_state_dict(net.state_dict())


# ---- where they stand ------------------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """What a LightningModule does: the network is a part of it, and its input is moved about first."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        if mask is not None:
            x = x * mask
        output: Tensor = self.net(x.view(x.size(0), -1))
        return output


class Bottleneck(nn.Module):
    """Without a ReLU after the sum, as in MobileNetV2; and the function relu where nothing can stand behind it."""

    def __init__(self, functional: bool) -> None:
        super().__init__()
        self.conv1, self.conv2, self.relu = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.ReLU()
        self.functional = functional

    def forward(self, x: Tensor) -> Tensor:
        inner = nn.functional.relu(self.conv1(x)) if self.functional else self.relu(self.conv1(x))
        return x + self.conv2(inner)


class Shared(nn.Module):
    """One ReLU for two places, as in torchvision's ResNets."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3, self.relu = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.fc3(self.relu(self.fc2(self.relu(self.fc1(x)))))
        return output


@pytest.mark.parametrize(
    ("net", "expected"),
    [
        (SmallCNN(), {"features.0.inq_input": True, "features.2": False, "features.6": False, "features.10": False}),
        (
            Wrapped(nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))),
            {"net.0.inq_input": True, "net.2": False},
        ),
        (
            nn.Sequential(Bottleneck(False), nn.Flatten(), nn.Linear(2, 2)),
            {"0.inq_input": True, "0.relu": False, "0.conv2": True, "0": True},
        ),
        (
            nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.BatchNorm1d(4), nn.Linear(4, 2)),
            {"0.inq_input": True, "0": True, "2": True},
        ),
        (
            ResNetCIFAR(8),
            {
                "conv1.inq_input": True,
                "relu": False,
                **{f"layer{n}.0.{m}": m == "bn2" for n in (1, 2, 3) for m in ("relu1", "bn2", "relu2")},
                "pool": False,
            },
        ),
    ],
    ids=["SmallCNN", "within", "sum", "norm on its own", "ResNetCIFAR"],
)
def test_they_stand_behind_what_products_sums_and_averages_take(net: nn.Module, expected: dict[str, bool]) -> None:
    before = [name for name, _ in net.named_parameters()]
    found = quantize_activations(net, 4)
    names = {name if name.endswith("inq_input") else f"{name}.inq_activation": s for name, s in expected.items()}
    assert {name: activation.signed for name, activation in found.items()} == names
    terms = [name for name in found if name.split(".")[-2:-1] in (["bn2"], ["conv2"])]  # only sums take them
    assert [name for name, a in found.items() if a.bits == 8] == [n for n in found if n in terms or "inq_input" in n]
    assert [name for name, _ in net.named_parameters()] == before
    again = quantize_activations(net, 4)  # those that stand there already
    assert list(again) == list(found)
    assert all(again[name] is activation for name, activation in found.items())


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (Bottleneck(True), r"relu in the forward of the network is no module, .* make it nn\.ReLU\(\)"),
        (Shared(), "relu is called 2 times; give each call a module of its own"),
        (nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)), "Sequential calls 1, a GELU"),
    ],
)
def test_where_none_can_stand_is_said_and_nothing_changes(net: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_activations(net)
    assert not activations_of(net)


def test_layers_have_widths_of_their_own() -> None:
    net = Wrapped(SmallCNN())
    found = quantize_activations(net.net, 8, input_bits=4, layer_bits={"features.*": 6, "features.10": 3})
    assert [activation.bits for activation in found.values()] == [6, 6, 6, 3]
    found = quantize_activations(SmallCNN(), 8, input_bits=4, layer_bits={"features.10": 3})
    assert [activation.bits for activation in found.values()] == [4, 8, 8, 3]
    with pytest.raises(ValueError, match=r"layer_activation_bits pattern 'features\.11' matches no"):
        quantize_activations(SmallCNN(), layer_bits={"features.11": 3})
    with pytest.raises(ValueError, match="bits must be a whole number from 2 to 8, got 9"):
        quantize_activations(SmallCNN(), 9)
    with pytest.raises(ValueError, match="has activations of 6 bits already, 8 are asked for"):
        quantize_activations(net.net)


# ---- without Lightning -----------------------------------------------------------------------------------------------


def test_calibration_without_training_takes_all_batches_and_leaves_mode_and_statistics() -> None:
    torch.manual_seed(0)
    net = SmallCNN().train()
    statistics = copy.deepcopy(net.state_dict())
    quantize_activations(net)
    small, large = torch.randn(16, 1, 8, 8), 4 * torch.randn(16, 1, 8, 8)
    with pytest.raises(ValueError, match="batches is empty"):
        calibrate_activations(net, [])
    calibrate_activations(net, [small, (large,)])
    assert net.training
    assert all(torch.equal(net.state_dict()[name], value) for name, value in statistics.items())
    both = next(iter(activations_of(net).values())).exponent
    calibrate_activations(net, [torch.cat([small, large])])
    assert next(iter(activations_of(net).values())).exponent == both
    with pytest.raises(ValueError, match="no activations to calibrate"):
        calibrate_activations(LeNet5(), [small])


def test_a_loop_of_ones_own_calibrates_at_each_phase_and_ends_in_whole_numbers() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    inq = INQ(net, optimizer, bits=4, epochs=3, schedule={0: 0.5, 2: 1.0}, activation_bits=4)
    x = torch.randn(64, 8)
    seen: list[Any] = []
    for epoch in range(3):
        inq.advance(epoch)
        if epoch == 2:
            with torch.no_grad():
                net[1].weight *= 64  # its outputs grow, so that the last phase needs another scale
        for part in x.split(16):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(part), part[:, :4].argmax(1)).backward()
            optimizer.step()
            seen.append(net[2].inq_activation.exponent)
    inq.finish()
    assert len(set(seen[:8])) == 1  # fixed within a phase
    assert seen[8] > seen[7]
    network = lower(net.eval(), x)
    assert torch.equal(network.run(x).double() * 2.0**network.exponent, network.to_torch()(x))


def test_a_step_that_leaves_out_a_part_of_the_network_is_refused_by_name() -> None:
    net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 4))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    inq = INQ(net, optimizer, epochs=4, activation_bits=8)
    inq.advance(0)
    net[0](torch.randn(4, 8)).sum().backward()
    with pytest.raises(RuntimeError, match=r"the training batch has not reached 1\.inq_activation"):
        optimizer.step()


def test_onnx_and_packed_modules_keep_them_bit_for_bit(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    x = torch.randn(32, 1, 8, 8)
    net = quantize(SmallCNN(), [x], 4, activation_bits=6).model.eval()
    expected = net(x)
    assert torch.equal(to_packed(net)(x), expected)
    export_onnx(net, tmp_path / "net.onnx", x)
    session = runtime.InferenceSession(tmp_path / "net.onnx", session_options())
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    steps = 2.0 ** net.features[10].inq_activation.exponent
    assert abs(torch.from_numpy(logits) - expected).max() <= 4 * steps  # a sum may fall on the other side of a half


def test_a_container_gets_no_child_that_it_would_call() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Bottleneck(False), nn.Flatten(), nn.Linear(2, 2)).eval()
    x = torch.randn(8, 2, 1, 1)
    quantize_activations(net)
    assert torch.equal(net(x), net[2](net[1](net[0](x))))
    assert list(net._modules) == ["0", "1", "2"]
