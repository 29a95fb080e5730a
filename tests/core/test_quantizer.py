"""The engine by itself; what it does under Lightning is in tests/frontends/lightning."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from support import SCHEDULE, TinyModule, assert_same_state, trainer
from torch import nn

from inq_lightning import INQCallback, Options, Quantizer
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
