from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Trainer, seed_everything
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from inq_lightning import INQCallback
from inq_lightning.classifier import Classifier
from inq_lightning.data import DigitsDataModule
from inq_lightning.models import SmallCNN
from inq_lightning.monitor import INQMonitor


def train(tmp_path: Path, logger: Any, *callbacks: Any) -> Classifier:
    seed_everything(0)
    module = Classifier(SmallCNN(), 10, lr=0.05)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=4,
        limit_train_batches=3,
        logger=logger,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        log_every_n_steps=1,
    )
    trainer.fit(module, DigitsDataModule())
    return module


def test_tensorboard_gets_figures_histograms_hyperparameters_and_a_layout(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    train(tmp_path, logger, INQCallback(bits=4, schedule={0: 0.5, 2: 1.0}), INQMonitor())
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0, "histograms": 0})
    events.Reload()
    tags = events.Tags()
    assert {"inq/exponents", "inq/heatmap", "inq/metrics"} <= set(tags["images"])
    assert all(event.encoded_image_string.startswith(b"\x89PNG") for event in events.Images("inq/exponents"))
    assert len({event.step for event in events.Images("inq/exponents")}) == 3, "two phases and the end"
    assert "inq_exponents/net.linear.weight/frozen" in tags["histograms"]
    assert {"inq/quantized_fraction", "inq/phase", "inq/sqnr_db", "inq/bytes"} <= set(tags["scalars"])
    assert events.Scalars("inq/quantized_fraction")[-1].value == 1
    plugins = events.summary_metadata
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= set(plugins)
    assert any(tag.startswith("custom_scalars__config__") for tag in plugins)


@pytest.mark.parametrize("kind", ["csv", "none"])
def test_loggers_without_figures_and_none_at_all_are_served_without_a_warning(
    kind: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    logger = CSVLogger(tmp_path) if kind == "csv" else False
    train(tmp_path, logger, INQCallback(schedule={0: 0.5, 2: 1.0}), INQMonitor())
    assert not [str(w.message) for w in recwarn if "INQMonitor" in str(w.message) or "figure" in str(w.message)]
    if kind == "csv":
        assert "inq/bytes" in (Path(logger.log_dir) / "metrics.csv").read_text()  # type: ignore[union-attr]


def test_training_is_the_same_with_and_without_the_monitor(tmp_path: Path) -> None:
    schedule = {0: 0.5, 2: 1.0}
    plain = train(tmp_path, False, INQCallback(schedule=schedule)).state_dict()
    watched = train(tmp_path, TensorBoardLogger(tmp_path), INQCallback(schedule=schedule), INQMonitor()).state_dict()
    assert all(torch.equal(value, watched[name]) for name, value in plain.items())


def test_a_trainer_without_inq_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the Trainer has none"):
        train(tmp_path, False, INQMonitor())
