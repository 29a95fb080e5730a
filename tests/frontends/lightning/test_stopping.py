from __future__ import annotations

import csv
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint, Timer
from pytorch_lightning.loggers import CSVLogger
from support import TinyModule, assert_quantized, trainer

from inq_lightning import INQCallback, Schedule

SCHEDULE = {0: 0.5, 2: 0.75, 4: 1.0}
FALLS_ONLY_AT_THE_END = [1.0, 2.0, 3.0, 4.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
NAN = float("nan")


class Scripted(TinyModule):
    """Its metrics are given, one for each epoch."""

    def __init__(self, losses: list[float]) -> None:
        super().__init__()
        self.losses = losses

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("train_loss", self.losses[self.current_epoch], on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.losses[self.current_epoch])


class Own(EarlyStopping):
    """A subclass with hooks of its own, one of which stops the run by itself."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if trainer.current_epoch < 4:
            trainer.should_stop = True


def run(losses: list[float], *callbacks: Callback, schedule: Any = SCHEDULE, **options: Any) -> Trainer:
    fitted = trainer(INQCallback(schedule=schedule), *callbacks, **{"max_epochs": 10, "limit_val_batches": 1} | options)
    fitted.fit(Scripted(losses))
    return fitted


STOPPERS = {
    "patience": (FALLS_ONLY_AT_THE_END, lambda: [EarlyStopping("val_loss", patience=2)]),
    "no-patience": (FALLS_ONLY_AT_THE_END, lambda: [EarlyStopping("val_loss", patience=1)]),
    "the-larger-the-better": ([-x for x in FALLS_ONLY_AT_THE_END], lambda: [EarlyStopping("val_loss", mode="max")]),
    "train-metric": (FALLS_ONLY_AT_THE_END, lambda: [EarlyStopping("train_loss", patience=2)]),
    "after-validation": (
        FALLS_ONLY_AT_THE_END,
        lambda: [EarlyStopping("val_loss", patience=2, check_on_train_epoch_end=False)],
    ),
    "several": (
        FALLS_ONLY_AT_THE_END,
        lambda: [EarlyStopping("val_loss", patience=2), EarlyStopping("train_loss", patience=1)],
    ),
    "subclass": (FALLS_ONLY_AT_THE_END, lambda: [Own("val_loss", patience=2)]),
    "reached": ([0.1] * 4 + FALLS_ONLY_AT_THE_END[4:], lambda: [EarlyStopping("val_loss", stopping_threshold=0.2)]),
    "diverged": (FALLS_ONLY_AT_THE_END, lambda: [EarlyStopping("val_loss", patience=9, divergence_threshold=1.5)]),
    "not-finite": ([1.0, NAN, *FALLS_ONLY_AT_THE_END[2:]], lambda: [EarlyStopping("val_loss", patience=9)]),
}


@pytest.mark.parametrize("kind", STOPPERS)
@pytest.mark.parametrize("first", [False, True], ids=["stopper-last", "stopper-first"])
def test_early_stopping_does_not_count_what_came_before_everything_was_quantized(kind: str, first: bool) -> None:
    losses, make = STOPPERS[kind]
    stoppers, callback, module = make(), INQCallback(schedule=SCHEDULE), Scripted(losses)
    order = [*stoppers, callback] if first else [callback, *stoppers]
    fitted = trainer(*order, max_epochs=10, limit_val_batches=1)
    fitted.fit(module)
    assert fitted.current_epoch == 10
    assert [stopper.wait_count for stopper in stoppers] == [0] * len(stoppers)
    assert [stopper.stopped_epoch for stopper in stoppers] == [0] * len(stoppers)
    assert_quantized(module, callback)


@pytest.mark.parametrize("losses", [[float(i) for i in range(12)], [1.0] * 12], ids=["rising", "flat"])
def test_its_patience_counts_from_the_first_check_of_the_quantized_network(losses: list[float]) -> None:
    stop = EarlyStopping("val_loss", patience=2)
    fitted = run(losses, stop, max_epochs=12)
    assert stop.stopped_epoch == 6  # 4 sets the best, 5 and 6 are no better
    assert fitted.current_epoch == 7
    assert stop.best_score == losses[4]


def test_a_schedule_in_steps_lets_patience_begin_in_the_epoch_in_which_it_ends() -> None:
    stop = EarlyStopping("val_loss", patience=2)
    fitted = run([float(i) for i in range(12)], stop, schedule=Schedule([0.5, 1.0], [0, 14], "step"), max_epochs=12)
    assert stop.stopped_epoch == 5  # step 14 lies in epoch 3
    assert fitted.current_epoch == 6


def test_a_run_held_open_logs_no_more_often_and_says_nothing_of_min_epochs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def rows(*callbacks: Callback) -> int:
        logger = CSVLogger(tmp_path, name="", version=str(len(callbacks)))
        fitted = run(FALLS_ONLY_AT_THE_END, *callbacks, logger=logger, log_every_n_steps=3)
        assert fitted.fit_loop.min_epochs == 0
        assert fitted.fit_loop.min_steps is None
        assert not fitted.should_stop
        with (Path(logger.log_dir) / "metrics.csv").open() as file:
            return len(list(csv.DictReader(file)))

    stop = EarlyStopping("val_loss", patience=1)
    with caplog.at_level(logging.INFO):
        assert rows(stop) == rows()
    assert "min_epochs" not in caplog.text
    assert "EarlyStopping of val_loss asks to stop in epoch 1" in caplog.text
    assert not [name for name in vars(stop) if name.startswith("on_")]


def test_a_min_epochs_of_the_user_still_counts() -> None:
    fitted = run([float(i) for i in range(12)], EarlyStopping("val_loss", patience=1), max_epochs=12, min_epochs=9)
    assert fitted.current_epoch == 9


@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_resumed_run_stops_where_the_uninterrupted_one_does(at: int, tmp_path: Path) -> None:
    losses = [float(i) for i in range(12)]
    save = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    run(losses, EarlyStopping("val_loss", patience=3), save, max_epochs=12, enable_checkpointing=True)
    stop, callback = EarlyStopping("val_loss", patience=3), INQCallback(schedule=SCHEDULE)
    resumed = trainer(callback, stop, max_epochs=12, limit_val_batches=1)
    resumed.fit(Scripted(losses), ckpt_path=tmp_path / f"epoch={at}.ckpt")
    assert stop.stopped_epoch == 7
    assert resumed.current_epoch == 8


def test_after_an_error_the_stopper_is_what_it_was() -> None:
    class Fails(Scripted):
        def on_train_epoch_end(self) -> None:
            raise OSError("the disk is gone")

    stop = EarlyStopping("val_loss", patience=1)
    with pytest.raises(OSError, match="the disk is gone"):
        trainer(INQCallback(schedule=SCHEDULE), stop, max_epochs=10, limit_val_batches=1).fit(
            Fails(FALLS_ONLY_AT_THE_END)
        )
    assert not [name for name in vars(stop) if name.startswith("on_")]


class StopsItself(Scripted):
    def on_train_epoch_end(self) -> None:
        self.trainer.should_stop = self.current_epoch == 2


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside-early-stopping"])
@pytest.mark.parametrize("stopper", ["timer", "max-time", "module"])
def test_who_else_stops_the_run_does_so_and_what_is_left_undone_is_said(stopper: str, beside: bool) -> None:
    others = [EarlyStopping("val_loss", patience=1)] if beside else []
    options: dict[str, Any] = {"max_time": {"microseconds": 1}} if stopper == "max-time" else {}
    others += [Timer({"microseconds": 1})] if stopper == "timer" else []
    module = (StopsItself if stopper == "module" else Scripted)(FALLS_ONLY_AT_THE_END)
    callback = INQCallback(schedule=SCHEDULE)
    fitted = trainer(callback, *others, max_epochs=10, limit_val_batches=1, **options)
    with pytest.warns(UserWarning, match=r"quantized; it was told to stop .*Timer, max_time") as said:
        fitted.fit(module)
    assert fitted.current_epoch < 4
    assert callback.quantized_fraction < 1
    assert len([w for w in said if "told to stop" in str(w.message)]) == 1


def test_a_run_stopped_when_everything_is_quantized_gives_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*selected weights quantized")
        run([1.0] * 12, EarlyStopping("val_loss", patience=2), max_epochs=12)


def test_somebody_elses_early_stopping_of_the_same_name_is_held_too() -> None:
    class EarlyStopping(Callback):
        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.should_stop = trainer.current_epoch in (1, 6)

    fitted = run(FALLS_ONLY_AT_THE_END, EarlyStopping())
    assert fitted.current_epoch == 7


def test_a_stop_before_the_first_batch_is_said() -> None:
    with pytest.warns(UserWarning, match="nothing was trained.* was told to stop .* before the first batch"):
        run(FALLS_ONLY_AT_THE_END, Timer({"seconds": 0}))
