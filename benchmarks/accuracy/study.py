"""Accuracy of quantized networks against their full-precision baselines: one cell of the study, or a sweep of cells.

A Hydra application over `conf/study.yaml`, which holds all of `inq-train`'s keys::

    python -m benchmarks.accuracy.study -m method=baseline seed=0,1 folder=runs data.path=cifar10.npz

A cell that has its result is skipped, and an interrupted one goes on from its last epoch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.config_store import ConfigStore
from hydra.utils import instantiate
from omegaconf import MISSING, DictConfig
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from pytorch_lightning.callbacks import ModelCheckpoint

from inq_lightning.cli.train import build_trainer
from inq_lightning.config import TrainConfig


@dataclass
class StudyConfig(TrainConfig):
    """What a cell has beside the keys of `inq-train`."""

    method: str = "inq"
    folder: str = MISSING


ConfigStore.instance().store("base_study", StudyConfig)


class History(Callback):
    """Keeps the validation metrics of every epoch."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.epochs.append(metrics)
        print(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}", metrics, flush=True)

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epochs = state_dict["epochs"]


def baseline(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Train the full-precision network."""
    cfg.model = {**cfg.model, **cfg.pretrain.model, "lr_epochs": None}
    cfg.trainer.max_epochs = cfg.pretrain.max_epochs
    data: LightningDataModule = instantiate(cfg.data)
    module: LightningModule = instantiate(cfg.model, _convert_="all")
    history = History()
    last = ModelCheckpoint(folder, "last", save_on_train_epoch_end=True, enable_version_counter=False)
    trainer = build_trainer(cfg, cfg.trainer, [history, last])
    resumed = folder / "last.ckpt"
    trainer.fit(module, data, ckpt_path=resumed if resumed.exists() else None)
    torch.save(module.state_dict(), folder / "weights.pt")
    metrics = {**trainer.validate(module, data)[0], **trainer.test(module, data)[0]}
    return {"metrics": metrics, "epochs": history.epochs}


@hydra.main(version_base="1.3", config_path="conf", config_name="study")
def main(cfg: DictConfig) -> None:
    seed_everything(cfg.seed, workers=True)
    folder = Path(cfg.folder) / f"baseline-{cfg.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / "result.json"
    if not result.exists():
        result.write_text(json.dumps(baseline(cfg, folder), indent=1))


if __name__ == "__main__":
    main()
