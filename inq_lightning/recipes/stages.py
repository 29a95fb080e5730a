"""The stages of `inq-train`: the full-precision network is trained, then quantized. Each has a Trainer of its own."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from pytorch_lightning.callbacks import LearningRateMonitor, ProgressBar
from torch import Tensor

from inq_lightning.core.layer import Layer
from inq_lightning.formats.checkpoint import withholding
from inq_lightning.frontends.lightning.callback import INQCallback
from inq_lightning.frontends.lightning.jsonlines import JSONLines
from inq_lightning.frontends.lightning.monitor import INQMonitor
from inq_lightning.integer.lower import lower
from inq_lightning.integer.network import IntegerNetwork
from inq_lightning.recipes.start import Start, load_weights


class FullPrecision(Callback):
    """What the report says that a resumed run could not know: the full-precision network's metrics, the time before.

    A callback, for Lightning keeps the state of callbacks in every checkpoint.
    """

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self._before = 0.0
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Wall time so far, that of interrupted runs included."""
        return self._before + time.monotonic() - self._started

    def state_dict(self) -> dict[str, Any]:
        """Metrics and time."""
        return {"metrics": self.metrics, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up metrics and time of the interrupted run."""
        self.metrics, self._before = state_dict["metrics"], state_dict["seconds"]


def pretrain(
    cfg: DictConfig, start: Start, data: LightningDataModule, inq: INQCallback, carried: FullPrecision
) -> Start:
    """Train the full-precision network, or go on with it; the quantization starts from its weights.

    Raises:
        ValueError: ``pretrain.model`` has a key that the model lacks, or ``inq`` would find nothing to quantize.
    """
    cfg = _for_pretraining(cfg)
    module: LightningModule = instantiate(cfg.model, _convert_="all")
    inq.select(module)  # refuses bad patterns before hours of training rather than after
    with withholding(start.checkpoint):
        build_trainer(cfg, [carried]).fit(module, data, ckpt_path=start.checkpoint)
    return Start("quantize", weights=module.state_dict())


def quantize(
    cfg: DictConfig, start: Start, data: LightningDataModule, inq: INQCallback, carried: FullPrecision
) -> tuple[Trainer, LightningModule]:
    """Test the full-precision network and quantize it, or go on with that.

    Raises:
        ValueError: The weights to start from belong to another network.
    """
    module: LightningModule = instantiate(cfg.model, _convert_="all")
    trainer = build_trainer(cfg, [inq, carried])
    if start.weights is not None:
        load_weights(module, start.weights, cfg)
        carried.metrics = test(trainer, module, data)
    with withholding(start.checkpoint):
        trainer.fit(module, data, ckpt_path=start.checkpoint)
    return trainer, module


def test(trainer: Trainer, module: LightningModule, data: LightningDataModule) -> dict[str, float]:
    """Test metrics of the module as it is."""
    return {
        name: float(value) for metrics in trainer.test(module, data, verbose=False) for name, value in metrics.items()
    }


def first_images(data: LightningDataModule, count: int) -> list[Tensor]:
    """The first training batches, of so many images in all."""
    data.prepare_data()
    data.setup("fit")
    batches: list[Tensor] = []
    for batch in data.train_dataloader():
        images = batch[0] if isinstance(batch, (tuple, list)) else batch
        batches.append(images[:count])
        count -= len(batches[-1])
        if not count:
            break
    return batches


def whole_numbers(module: LightningModule, images: Sequence[Tensor], layers: Sequence[Layer]) -> IntegerNetwork | None:
    """The network in whole numbers; None, and a warning, where it cannot become one."""
    try:
        return lower(module, torch.cat(list(images)), layers=layers)
    except ValueError as error:
        logging.getLogger(__name__).warning("the network was not turned into whole numbers: %s", error)
        return None


def test_whole(
    trainer: Trainer, module: LightningModule, data: LightningDataModule, network: IntegerNetwork
) -> dict[str, Any]:
    """Test metrics of a network in whole numbers, and what it takes."""
    with network.computing(module):
        return {"metrics": test(trainer, module, data), **network.summary}


def build_trainer(cfg: DictConfig, callbacks: Sequence[Callback]) -> Trainer:
    """Instantiate the Trainer of one stage with the configured loggers and callbacks; ``callbacks`` go first.

    A configured callback that would refuse this Trainer, as there is nothing here for it to show, is left out.
    """
    if cfg.output == "json":
        cfg.trainer.enable_progress_bar = False
    loggers = [instantiate(logger) for logger in cfg.logger.values()]
    shows = (
        (LearningRateMonitor, bool(loggers)),
        (INQMonitor, any(isinstance(callback, INQCallback) for callback in callbacks)),
        (ProgressBar, cfg.trainer.enable_progress_bar),
    )
    idle = tuple(kind for kind, something in shows if not something)
    configured = [c for c in map(instantiate, cfg.callbacks.values()) if not isinstance(c, idle)]
    lines = [JSONLines(cfg.stage)] if cfg.output == "json" else []
    trainer: Trainer = instantiate(
        cfg.trainer,
        callbacks=[*callbacks, *configured, *lines],
        logger=loggers,
        default_root_dir=cfg.output_dir,
    )
    return trainer


def _for_pretraining(cfg: DictConfig) -> DictConfig:
    """The config of the stage: what ``pretrain`` says, and nothing of what only the quantization needs."""
    cfg = cfg.copy()
    cfg.stage = "pretrain"
    cfg.trainer.max_epochs = cfg.pretrain.max_epochs
    cfg.trainer.max_steps = -1
    for key in cfg.pretrain.model:
        if key not in cfg.model:
            raise ValueError(
                f"pretrain.model.{key} is no key of the model's config, which has {', '.join(cfg.model)}; "
                f"remove it with pretrain=plain"
            )
    quantization_only = {"lr_epochs": None, "distillation": 0.0}
    for key, value in {**quantization_only, **cfg.pretrain.model}.items():
        if key in cfg.model:
            cfg.model[key] = value
    return cfg
