"""Rounded activations in real Trainers: when they are calibrated, resumed runs, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from support import SCHEDULE, TinyModule, same_bits, trainer
from torch import Tensor, nn

from inq_lightning import INQCallback, load_integer, load_packed, lower, save_packed
from inq_lightning.core.activations import activations_of
from inq_lightning.frontends.lightning.callback import INQCallback as Base


class Scales(Callback):
    """Every activation's exponent after each batch."""

    def __init__(self) -> None:
        self.seen: list[list[int | None]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.seen.append([activation.exponent for activation in activations_of(pl_module).values()])


def inq(**options: Any) -> INQCallback:
    return INQCallback(**{"bits": 4, "schedule": SCHEDULE, "activation_bits": 4, **options})


def test_they_are_calibrated_by_the_first_batch_of_each_phase_and_stay_within_it() -> None:
    module, scales = TinyModule(), Scales()

    class Grows(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, index: int) -> None:
            with torch.no_grad():
                module.net[1].weight.fill_(8.0**trainer.current_epoch)  # type: ignore[union-attr, operator]

    trainer(inq(), Grows(), scales, max_epochs=4).fit(module)
    assert len(scales.seen) == 16
    for epoch in range(4):
        assert len({tuple(seen) for seen in scales.seen[4 * epoch : 4 * epoch + 4]}) == 1
    growth = [after[1] - before[1] for before, after in zip(scales.seen[::4], scales.seen[4::4], strict=False)]  # type: ignore[operator]
    assert growth == [3, 3, 3]


@pytest.mark.parametrize("steps", [2, 4, 6, 9])
def test_a_resumed_run_ends_with_the_same_bits_and_the_same_whole_numbers(steps: int, tmp_path: Path) -> None:
    whole = TinyModule()
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=steps, save_top_k=-1)
    trainer(inq(), saver, enable_checkpointing=True).fit(whole)
    resumed = TinyModule(seed=1)
    trainer(inq()).fit(resumed, ckpt_path=str(tmp_path / f"step={steps}.ckpt"))
    state = whole.state_dict()
    assert state.keys() == resumed.state_dict().keys()
    assert all(same_bits(tensor.float(), state[name].float()) for name, tensor in resumed.state_dict().items())
    x = torch.cat([x for x, _ in whole.batches])
    logits = lower(whole, x).run(x)
    assert torch.equal(lower(resumed, x).run(x), logits)
    path = tmp_path / "net.safetensors"
    save_packed(resumed, path, integer=lower(resumed, x))
    assert torch.equal(load_integer(path).run(x), logits)
    assert torch.equal(lower(load_packed(path, TinyModule(seed=2)), x).run(x), logits)


def test_the_trainer_tests_whole_numbers_in_place_of_the_network() -> None:
    class WithForward(TinyModule):
        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.net(x)
            return output

        def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
            self.log("loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    module = WithForward()
    run = trainer(inq(), limit_test_batches=1.0)
    run.fit(module)
    x, y = next(iter(module.val_dataloader()))
    network = lower(module, x)
    floats = run.test(module, verbose=False)[0]["loss"]
    with network.computing(module):
        measured = run.test(module, verbose=False)[0]["loss"]
    expected = nn.functional.cross_entropy(network.run(x).double() * 2.0**network.exponent, y)
    assert measured == pytest.approx(float(expected), rel=1e-6)
    assert measured != floats
    assert run.test(module, verbose=False)[0]["loss"] == floats


def test_what_cannot_be_rounded_is_said_before_anything_trains() -> None:
    module = TinyModule()
    module.net[2] = nn.GELU()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(ValueError, match="Sequential calls 2, a GELU, which integers cannot follow"):
        trainer(inq()).fit(module)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_nan_in_the_batch_that_calibrates_is_refused_by_name() -> None:
    module = TinyModule()
    module.batches[0][0][0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^net\.0: the batch that calibrates its activations holds infinite values"):
        trainer(inq()).fit(module)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation_bits": 9}, "activation_bits must be a whole number from 2 to 8, got 9"),
        ({"activation_bits": None, "layer_activation_bits": {"a": 4}}, "layer_activation_bits needs activation_bits"),
        ({"layer_activation_bits": {"a": 1}}, r"layer_activation_bits\['a'\]: bits must be"),
        ({"input_bits": True}, "input_bits must be a whole number from 2 to 8, got True"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inq(**options)


def test_a_run_resumed_with_other_widths_is_refused(tmp_path: Path) -> None:
    module = TinyModule()
    run = trainer(inq())
    run.fit(module)
    run.save_checkpoint(tmp_path / "net.ckpt", weights_only=False)
    with pytest.raises(ValueError, match="activations of codes 0 to 15 were saved, here they are 0 to 255"):
        trainer(inq(activation_bits=8), max_epochs=5).fit(TinyModule(), ckpt_path=str(tmp_path / "net.ckpt"))


def test_a_module_that_rounds_its_activations_itself_needs_no_option() -> None:
    from inq_lightning import quantize_activations

    module = TinyModule()
    quantize_activations(module, 6)
    trainer(Base(schedule=SCHEDULE)).fit(module)
    assert [activation.bits for activation in activations_of(module).values()] == [8, 6]
    assert all(activation.exponent is not None for activation in activations_of(module).values())
