from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import launch
from support import assert_quantized, assert_same_state, same_bits

transformers = pytest.importorskip("transformers", reason="needs the extra huggingface")
pytest.importorskip("accelerate", reason="needs the extra huggingface")

from huggingface_worker import Killed, Stream, Witness, make, train_and_resume  # noqa: E402

from inq_lightning import INQTrainerCallback, PowerOfTwoGrid  # noqa: E402


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, INQTrainerCallback, Witness]:
    run = make(tmp_path_factory.mktemp("whole"))
    run[0].train()
    return run


def test_a_trainer_of_transformers_quantizes_everything(whole: tuple[Any, INQTrainerCallback, Witness]) -> None:
    trainer, callback, witness = whole
    assert callback.inq is not None
    assert_quantized(trainer.model, callback.inq)  # type: ignore[arg-type]
    assert [layer.name for layer in callback.inq.layers] == ["net.0.weight", "net.3.weight"]
    assert witness.rates[0] == witness.rates[8] == witness.rates[16] == witness.rates[24]


def test_logs_have_the_fraction_for_the_history_and_for_the_callbacks_further_down_the_list(
    whole: tuple[Any, INQTrainerCallback, Witness],
) -> None:
    trainer, _, witness = whole
    fractions = [logs["inq/quantized_fraction"] for logs in witness.logged]
    assert fractions == [0.5] * 4 + [0.75] * 4 + [0.875] * 4 + [1.0] * 5  # the last one sums up the run
    assert [entry["inq/quantized_fraction"] for entry in trainer.state.log_history] == fractions


@pytest.mark.parametrize("step", [3, 8, 13])
def test_a_run_of_transformers_that_is_killed_resumes_bit_identical(
    step: int, whole: tuple[Any, INQTrainerCallback, Witness], tmp_path: Path
) -> None:
    killed, _, _ = make(tmp_path, Killed(step))
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    trainer, callback, witness = make(tmp_path, seed=5)
    trainer.train(resume_from_checkpoint=True)
    assert callback.inq is not None
    assert callback.inq.quantized_fraction == 1.0
    assert_same_state(trainer.model, whole[0].model)
    assert witness.rates == whole[2].rates[step:]


@pytest.mark.parametrize(
    "arguments",
    [{"max_steps": 12}, {"max_steps": 12, "data": Stream()}, {"num_train_epochs": 8, "gradient_accumulation_steps": 3}],
    ids=["steps", "stream", "accumulation"],
)
def test_an_open_schedule_is_spread_over_the_run(arguments: dict[str, Any], tmp_path: Path) -> None:
    trainer, callback, witness = make(tmp_path, inq={"schedule": None}, save_strategy="no", **arguments)
    trainer.train()
    assert callback.inq is not None
    assert callback.inq.quantized_fraction == 1.0
    portions = [logs["inq/quantized_fraction"] for logs in witness.logged[:-1]]
    assert set(portions) == {0.5, 0.75, 0.875, 1.0}
    assert portions == sorted(portions)


@pytest.mark.slow
def test_two_ddp_processes_of_transformers_agree_and_resume_bit_identical(tmp_path: Path) -> None:
    launch(2, train_and_resume, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for world, (fraction, whole), (again, resumed) in ranks:
        assert world == 2
        assert fraction == again == 1.0
        assert all(same_bits(whole[name].float(), resumed[name].float()) for name in whole)
    first, second = (whole for _, (_, whole), _ in ranks)
    trained = [name for name in first if "running" not in name]  # the statistics of each process's own last batch
    assert all(same_bits(first[name].float(), second[name].float()) for name in trained)


def test_the_best_model_is_a_fully_quantized_one(tmp_path: Path) -> None:
    best = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    trainer, callback, _ = make(tmp_path, inq={"schedule": {0: 0.5, 2: 1.0}}, learning_rate=0.5, **best)
    trainer.train()
    assert callback.inq is not None
    assert trainer.state.best_global_step >= 24
    for layer in callback.inq.layers:
        levels = set(PowerOfTwoGrid(layer.n1, layer.bits).levels.tolist())
        assert set(trainer.model.get_parameter(layer.name).unique().tolist()) <= levels


def test_a_second_run_of_one_trainer_begins_anew(tmp_path: Path) -> None:
    trainer, callback, _ = make(tmp_path, save_strategy="no")
    trainer.train()
    first = callback.inq
    trainer.train()
    assert callback.inq is not first
    assert callback.inq is not None
    assert callback.inq.quantized_fraction == 1.0


def test_a_checkpoint_without_inq_goes_on_with_it(tmp_path: Path) -> None:
    plain, callback, _ = make(tmp_path, Killed(16))
    plain.callback_handler.callbacks = [c for c in plain.callback_handler.callbacks if isinstance(c, Killed)] + [
        transformers.trainer_callback.DefaultFlowCallback()
    ]
    with pytest.raises(KeyboardInterrupt):
        plain.train()
    trainer, callback, _ = make(tmp_path, inq={"schedule": {0: 0.5, 1: 1.0}})
    trainer.train(resume_from_checkpoint=True)
    assert callback.inq is not None
    assert callback.inq.quantizer.origin == 2
    assert callback.inq.quantized_fraction == 1.0


def test_the_state_of_a_finished_run_is_small(whole: tuple[Any, INQTrainerCallback, Witness]) -> None:
    file = Path(whole[0].args.output_dir) / "checkpoint-32" / "trainer_state.json"
    saved = json.loads(file.read_text())["stateful_callbacks"]["INQTrainerCallback"]["attributes"]["saved"]
    assert len(saved) < 4096


def test_options_are_checked_when_the_callback_is_made() -> None:
    with pytest.raises(ValueError, match="bits"):
        INQTrainerCallback(bits=9)


def test_other_options_than_the_checkpoints_are_refused(tmp_path: Path) -> None:
    killed, _, _ = make(tmp_path, Killed(10))
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    trainer, _, _ = make(tmp_path, inq={"partition": "random"})
    with pytest.raises(ValueError, match="partition: 'magnitude' in the checkpoint, 'random' here"):
        trainer.train(resume_from_checkpoint=True)


def test_what_splits_the_weights_is_refused(tmp_path: Path) -> None:
    trainer, callback, _ = make(tmp_path)
    arguments = {"model": trainer.model, "optimizer": None, "lr_scheduler": None, "train_dataloader": None}
    trainer.args.fsdp = True  # which the Trainer itself takes only with GPUs
    with pytest.raises(ValueError, match="needs the whole weights in every process"):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, **arguments)


def test_a_second_callback_is_refused(tmp_path: Path) -> None:
    trainer, _, _ = make(tmp_path, INQTrainerCallback())
    with pytest.raises(ValueError, match="a Trainer takes one INQTrainerCallback"):
        trainer.train()
