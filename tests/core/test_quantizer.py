"""The engine by itself; what it does under Lightning is in tests/frontends/lightning."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from support import SCHEDULE, TinyModule, assert_same_state, trainer
from torch import nn

from inq_lightning import INQCallback, Options, PowerOfTwoGrid, Quantizer
from inq_lightning.core.schedule import Length

EPOCHS = 4


def run(
    module: TinyModule, options: Options, start: int = 0, stop: int = 4 * EPOCHS, state: dict[str, Any] | None = None
) -> tuple[Quantizer, torch.optim.Optimizer]:
    """A loop of one's own, four steps an epoch, from step ``start`` on."""
    optimizer = module.configure_optimizers()
    quantizer = Quantizer(options)
    quantizer.configure([optimizer])
    if state is not None:
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        quantizer.load_state_dict(state["inq"])
    module.train()
    quantizer.attach(module)
    quantizer.begin(module, Length(epochs=EPOCHS), lambda unit: start // 4)
    assert quantizer.hold()
    for step in range(start, stop):
        quantizer.advance(module, step // 4)
        optimizer.zero_grad()
        module.loss(module.batches[step % 4]).backward()
        quantizer.mask_gradients()
        optimizer.step()
        assert quantizer.held()
    quantizer.release()
    quantizer.verify()
    return quantizer, optimizer


@pytest.mark.parametrize("options", [{}, {"partition": "random", "seed": 3}, {"bits": 3, "exponent": "mse"}], ids=str)
def test_a_loop_of_ones_own_trains_what_the_callback_does(options: dict[str, Any]) -> None:
    ours, theirs = TinyModule(), TinyModule()
    quantizer, _ = run(ours, Options(schedule=SCHEDULE, **options))
    callback = INQCallback(schedule=SCHEDULE, **options)
    trainer(callback).fit(theirs)
    assert quantizer.quantized_fraction == callback.quantized_fraction == 1
    assert quantizer.layers == callback.layers
    assert_same_state(ours, theirs)


def test_a_loop_goes_on_bit_for_bit_from_what_was_saved_in_mid_phase() -> None:
    options = Options(schedule=SCHEDULE, partition="random")
    whole, first, second = TinyModule(), TinyModule(), TinyModule(seed=1)
    run(whole, options)
    quantizer, optimizer = run(first, options, stop=6)
    state = {"module": first.state_dict(), "optimizer": optimizer.state_dict(), "inq": quantizer.state_dict()}
    run(second, options, start=6, state=copy.deepcopy(state))
    assert_same_state(whole, second)


def test_no_layer_is_frozen_where_one_has_diverged() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    quantizer = Quantizer(Options(schedule={0: 0.5, 1: 1.0}))
    quantizer.attach(module)
    quantizer.begin(module, Length(epochs=2), lambda unit: 0)
    with torch.no_grad():
        module[1].weight[0, 0] = math.nan
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=r"1\.weight: .*nan or inf"):
        quantizer.advance(module, 0)
    assert [layer.frozen for layer in quantizer.layers] == [0, 0]
    assert quantizer.phase == 0
    assert all(
        torch.equal(a, b) for a, b in zip(before.values(), module.state_dict().values(), strict=True) if a.ndim == 1
    )
    assert torch.equal(before["0.weight"], module[0].weight)


def test_an_optimizer_that_takes_no_hook_is_told() -> None:
    class Wrapper:
        """A wrapper that never initialized torch's Optimizer."""

    quantizer = Quantizer(Options(restart_lr=False))
    quantizer.configure([Wrapper()])  # type: ignore[list-item]
    assert not quantizer.hold()
    assert not quantizer.held()


# ---- what a width gets by itself -------------------------------------------------------------------------------------


def net_of(*outliers: float) -> nn.Sequential:
    """A linear layer for each number, which is its largest weight; the others are normally distributed."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(40, 40, bias=False) for _ in outliers))
    for layer, largest in zip(net, outliers, strict=True):
        layer.weight.data = torch.randn(40, 40).clamp_(-largest, largest)
        layer.weight.data[0, 0] = largest
    return net


def first_phase(net: nn.Module, **options: Any) -> tuple[Quantizer, list[str]]:
    """Let the first two phases begin; returns what was warned of."""
    quantizer = Quantizer(Options(schedule={0: 0.5, 1: 0.75, 2: 1.0}, **options))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quantizer.attach(net)
        quantizer.begin(net, Length(epochs=3), lambda unit: 0)
        assert quantizer.advance(net, 0)
        assert quantizer.advance(net, 1)
    return quantizer, [str(w.message) for w in caught]


@pytest.mark.parametrize("bits", range(2, 9))
def test_each_layers_grid_is_fitted_as_its_bits_need_it(bits: int) -> None:
    net = net_of(4.0, 4.0)
    w = net[0].weight.detach().clone()
    least, largest = (PowerOfTwoGrid.from_weights(w, bits, exponent=rule) for rule in ("mse", "max"))
    assert (least != largest) or bits > 3
    expected = least if bits <= 4 else largest
    quantizer, _ = first_phase(net, bits=bits, levels="paper")
    assert quantizer.layers[0].grid == expected
    net[0].weight.data = w.clone()
    quantizer, _ = first_phase(net, bits=8 if bits < 5 else 2, layer_bits={"0": bits}, levels="paper")
    assert quantizer.layers[0].grid == expected
    net[0].weight.data = w.clone()
    for rule, grid in (("mse", least), ("max", largest)):
        quantizer, _ = first_phase(net_like(net, w), bits=bits, exponent=rule, levels="paper")
        assert quantizer.layers[0].grid == grid


def net_like(net: nn.Sequential, w: torch.Tensor) -> nn.Sequential:
    same = copy.deepcopy(net)
    same[0].weight.data = w.clone()
    return same


def test_a_layer_that_its_grid_would_wipe_out_is_named_once_with_the_remedy() -> None:
    _, said = first_phase(net_of(4.0, 3000.0), exponent="max")
    assert len(said) == 1
    assert "1.weight: 99.9% (5 bits)" in said[0]
    assert "0.weight" not in said[0]
    assert all(remedy in said[0] for remedy in ('exponent="mse"', "layer_bits", "exclude"))
    assert "underflow" not in said[0]


def test_least_error_leaves_nothing_to_warn_of_where_it_can() -> None:
    assert first_phase(net_of(4.0, 20.0), bits=3, levels="paper")[1] == []
    _, said = first_phase(net_of(4.0, 40000.0), bits=2, levels="paper")  # too far for it
    assert len(said) == 1
    assert 'exponent="mse"' not in said[0]
    assert "layer_bits" in said[0]


def test_the_paper_s_rule_is_warned_of_where_it_wipes_out_2_bits() -> None:
    _, said = first_phase(net_of(4.0, 4.0), bits=2, exponent="max", levels="paper")
    assert len(said) == 1
    assert "0.weight: 9" in said[0]
    assert "1.weight: 9" in said[0]
    _, said = first_phase(net_of(4.0), bits=3, exponent="max", underflow="truncate", levels="paper")
    assert 'underflow="nearest"' in said[0]


def test_zeros_of_a_pruned_network_are_not_taken_for_wiped_out() -> None:
    net = net_of(4.0)
    net[0].weight.data[1:] = 0.0
    assert first_phase(net)[1] == []
    assert first_phase(net, keep_zeros=True)[1] == []


def test_what_stays_in_floating_point_is_warned_of_in_any_loop() -> None:
    net = nn.ModuleDict({"table": nn.Embedding(5, 4), "head": nn.Linear(4, 4)})
    _, said = first_phase(net)
    assert len(said) == 1
    assert "16 of the network's 36 matrix weights" in said[0]
    assert first_phase(net, exclude=["table"])[1] == []
