"""Accuracy of quantized networks against their full-precision baselines: one cell of the study, or a sweep of cells.

A Hydra application over `conf/study.yaml`, which holds all of `inq-train`'s keys. Each cell is a file of `conf/cell`
and starts from the baseline of its seed, the one in the study's folder or else the one in `baselines/`::

    python -m benchmarks.accuracy.study -m cell=baseline seed=0,1 folder=runs data.path=cifar10.npz
    python -m benchmarks.accuracy.study -m 'cell=glob(*)' seed=0 folder=runs data.path=cifar10.npz

A cell that has its result is skipped, and an interrupted one goes on from its last epoch.

Settings are chosen by trials, `val/acc` of images held out of the training set, under names that begin with ``try-``:
``name=try-lr experiment=cifar10_resnet20_2bit model.lr=0.05``. Test images are for cells only, and only for their
finished networks.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import MISSING, DictConfig, OmegaConf
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from pytorch_lightning.callbacks import ModelCheckpoint
from safetensors.torch import load_file, save_file

from inq_lightning import INQCallback, PowerOfTwoGrid, Schedule, lower
from inq_lightning.core.frozen import fit_levels
from inq_lightning.core.restart import Restart
from inq_lightning.formats.layers import find_grids
from inq_lightning.recipes.classifier import Classifier
from inq_lightning.recipes.config import TrainConfig, register_training
from inq_lightning.recipes.stages import build_trainer, first_images
from inq_lightning.recipes.start import plan_epochs
from inq_lightning.report.plots import count_exponents

register_training()


@dataclass
class StudyConfig(TrainConfig):
    """What a cell has beside the keys of `inq-train`."""

    method: str = "inq"
    name: str = MISSING
    folder: str = MISSING
    prune: float = 0.0


ConfigStore.instance().store("base_study", StudyConfig)

IMAGES = 512  # by which the predictions of whole numbers are compared

TRIAL = "try-"  # what a trial's name begins with

BASELINES = Path(__file__).parent / "baselines"  # trained ones, a file for each seed


class History(Callback):
    """Keeps the metrics of every epoch."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epochs.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        print(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}", self.epochs[-1], flush=True)

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epochs = state_dict["epochs"]


class RestartsOnly(Callback):
    """The control: INQ's learning-rate restarts without its quantization."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.restart = Restart(trainer.optimizers, [config.scheduler for config in trainer.lr_scheduler_configs])

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch in self.schedule.spread(trainer.max_epochs).starts:
            self.restart()


class Pruning(Callback):
    """Zeroes a share of each layer's weights, the smallest, when the whole network is the teacher already."""

    def __init__(self, callback: INQCallback, share: float) -> None:
        self.callback = callback
        self.share = share

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step:  # resumed
            return
        for selected in self.callback.select(pl_module):
            size = selected.parameter.detach().abs()
            largest_pruned = size.flatten().kthvalue(round(self.share * size.numel())).values
            selected.parameter.data.mul_(size > largest_pruned)


def baseline(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Train the full-precision network."""
    cfg.model = {**cfg.model, **cfg.pretrain.model, "lr_epochs": None, "distillation": 0.0}
    cfg.trainer.max_epochs = cfg.pretrain.max_epochs
    data: LightningDataModule = instantiate(cfg.data)
    module: LightningModule = instantiate(cfg.model, _convert_="all")
    return fit(cfg, folder, module, data, [])


def inq(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Quantize the baseline; the result counts only if every selected weight is on its grid."""
    callback: INQCallback = instantiate(cfg.inq)
    module, data = start(cfg, callback)
    before = exponents(module, callback)
    first: list[Callback] = [Pruning(callback, cfg.prune)] if cfg.prune else []
    result = fit(cfg, folder, module, data, [*first, callback])
    find_grids(module, callback.layers)
    result["layers"] = [layer.as_dict() for layer in callback.layers]
    result["exponents"] = {"before": before, "after": exponents(module, callback)}
    if callback.options.activation_bits is not None:
        whole = lower(module, torch.cat(first_images(data, IMAGES)), layers=callback.layers)
        with whole.computing(module):
            result["integer"] = {**evaluate(cfg, module, data), **whole.summary}
    return result


def fine_tune(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Train the baseline on at full precision, for as long and with the same restarts as INQ would."""
    callback: INQCallback = instantiate(cfg.inq)
    module, data = start(cfg, callback)
    return fit(
        cfg, folder, module, data, [RestartsOnly(callback.options.phases)] if callback.options.restart_lr else []
    )


def one_shot(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Round the whole baseline at once, without any training."""
    callback: INQCallback = instantiate(cfg.inq)
    module, data = start(cfg, callback)
    options = callback.options
    with torch.no_grad():
        for selected in callback.select(module):
            weight = selected.parameter
            levels = fit_levels(weight, selected.bits, selected.levels)
            grid = PowerOfTwoGrid.from_weights(weight, selected.bits, options.underflow, options.exponent, levels)
            weight.copy_(grid.quantize(weight))
    return {**evaluate(cfg, module, data), "epochs": []}


METHODS = {"baseline": baseline, "inq": inq, "fine_tune": fine_tune, "one_shot": one_shot}


def start(cfg: DictConfig, callback: INQCallback) -> tuple[LightningModule, LightningDataModule]:
    """The baseline of the same seed, its data, and the length of the run settled.

    Raises:
        FileNotFoundError: There is neither a baseline in the study's folder nor one that comes with the project.
    """
    plan_epochs(cfg, callback.options.phases)
    own = Path(cfg.folder) / "baseline" / str(cfg.seed) / "weights.safetensors"
    trained = own if own.is_file() else BASELINES / f"{cfg.seed}.safetensors"
    if not trained.is_file():
        raise FileNotFoundError(f"there is no {own}: train it first, with cell=baseline seed={cfg.seed}")
    module: Classifier = instantiate(cfg.model, _convert_="all")
    module.load_state_dict(load_file(trained))
    return module, instantiate(cfg.data)


def fit(
    cfg: DictConfig, folder: Path, module: LightningModule, data: LightningDataModule, callbacks: list[Callback]
) -> dict[str, Any]:
    """Train, or go on from the last epoch of an interrupted run, and evaluate."""
    history = History()
    last = ModelCheckpoint(folder, "last", save_on_train_epoch_end=True, enable_version_counter=False)
    trainer = build_trainer(cfg, [*callbacks, history, last])
    interrupted = folder / "last.ckpt"
    trainer.fit(module, data, ckpt_path=interrupted if interrupted.exists() else None)
    weights = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
    save_file(weights, folder / "weights.safetensors")
    return {**evaluate(cfg, module, data), "epochs": history.epochs}


class Mistakes(Callback):
    """Keeps the places of the test images that the network takes for something else."""

    def __init__(self) -> None:
        self.places: list[int] = []
        self.seen = 0

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *where: Any
    ) -> None:
        images, labels = batch
        wrong = pl_module(images).argmax(1) != labels
        self.places += (wrong.nonzero().flatten() + self.seen).tolist()
        self.seen += len(labels)


def evaluate(cfg: DictConfig, module: LightningModule, data: LightningDataModule) -> dict[str, Any]:
    """Validation metrics and, unless it is a trial, test metrics; in float32, whatever the network was trained in."""
    mistakes = Mistakes()
    trainer = build_trainer(OmegaConf.merge(cfg, {"trainer": {"precision": "32-true"}}), [mistakes])
    metrics = trainer.validate(module, data, verbose=False)[0]
    if cfg.name.startswith(TRIAL):
        return {"metrics": metrics}
    return {"metrics": {**metrics, **trainer.test(module, data, verbose=False)[0]}, "mistakes": mistakes.places}


def exponents(module: LightningModule, callback: INQCallback) -> dict[str, dict[str, int]]:
    """How many weights of each layer are nearest to each power of two, by its exponent."""
    return {
        selected.name: {str(k): count for k, count in count_exponents(selected.parameter).frozen.items()}
        for selected in callback.select(module)
    }


@hydra.main(version_base="1.3", config_path="conf", config_name="study")
def main(cfg: DictConfig) -> None:
    folder = Path(cfg.folder) / cfg.name / str(cfg.seed)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "result.json"
    if path.exists():
        return
    print(f"{cfg.name}, seed {cfg.seed}", flush=True)
    seed_everything(cfg.seed, workers=True)
    settings = OmegaConf.to_container(cfg)
    result = METHODS[cfg.method](cfg, folder)
    for place in ("folder", "output_dir"):
        settings.pop(place)
    settings["data"].pop("path", None)
    of_the_run = ("name=", "seed=", "folder=", "data.path=")
    overrides = [text for text in HydraConfig.get().overrides.task if not text.startswith(of_the_run)]
    result = {"name": cfg.name, "seed": cfg.seed, "overrides": overrides, **result, "settings": settings}
    partial = path.with_name("result.json.partial")
    partial.write_text(json.dumps(result, indent=1))
    partial.replace(path)
    print({name: round(value, 4) for name, value in result["metrics"].items()}, flush=True)


if __name__ == "__main__":
    main()
