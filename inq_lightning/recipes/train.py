"""`inq-train`: pre-train (or load) a network, quantize it, test both, report.

A Hydra application over `conf/`::

    inq-train inq.bits=3 inq/schedule=resnet18
    inq-train -m inq.bits=2,3,4,5
    inq-train ckpt=outputs/.../interrupted.ckpt resume=true
    inq-train --json | jq .metrics
"""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import Any

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from pytorch_lightning.callbacks import LearningRateMonitor, ProgressBar

from inq_lightning._common import import_extra
from inq_lightning.core.schedule import Schedule
from inq_lightning.formats import checkpoint as checkpoints
from inq_lightning.formats.packed import save_packed
from inq_lightning.frontends.lightning.callback import INQCallback
from inq_lightning.frontends.lightning.jsonlines import JSONLines
from inq_lightning.frontends.lightning.monitor import INQMonitor
from inq_lightning.recipes.config import register_training
from inq_lightning.report.run import Report, print_json
from inq_lightning.report.tables import report_table

register_training()

EPOCHS_PER_PHASE = 4  # where neither the schedule nor trainer.max_epochs says


class FullPrecision(Callback):
    """Carries the full-precision network's test metrics and the time spent along with the checkpoints."""

    def __init__(self, metrics: dict[str, float] | None = None, seconds: float = 0.0) -> None:
        self.metrics = metrics or {}
        self._before = seconds
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


def command() -> None:
    """The console script."""
    accept_json()
    main()


def accept_json() -> None:
    """Let ``--json`` on the command line, which Hydra would refuse, stand for ``output=json``."""
    sys.argv[1:] = ["output=json" if argument == "--json" else argument for argument in sys.argv[1:]]


@hydra.main(version_base="1.3", config_path="../conf", config_name="train")
def main(cfg: DictConfig) -> None:
    """Run the configured experiment."""
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # model._target_ may name a module of the user's own, as under python -m
    choose_output(cfg)
    console = import_extra("rich.console", "train").Console(stderr=cfg.output == "json")
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    seed_everything(cfg.seed, workers=True)
    checkpoint = load_checkpoint(cfg)
    data: LightningDataModule = instantiate(cfg.data)
    callback: INQCallback = instantiate(cfg.inq)
    plan_epochs(cfg, callback.options.phases)

    interrupted = checkpoint.get("callbacks", {}) if cfg.resume else {}
    quantizing = "INQCallback" in interrupted
    carried = FullPrecision()
    weights = checkpoint.get("state_dict", checkpoint)
    if cfg.ckpt is None or (cfg.resume and not quantizing):
        weights = pretrain(cfg, data, callback, carried)

    module: LightningModule = instantiate(cfg.model, _convert_="all")
    if not quantizing:
        load_weights(module, weights, cfg)
    trainer = build_trainer(cfg, cfg.trainer, [callback, carried])
    if not quantizing:
        carried.metrics = test(trainer, module, data)
    trainer.fit(module, data, ckpt_path=cfg.ckpt if quantizing else None)
    after = test(trainer, module, data)
    result = Report.of(module, callback.layers, carried.metrics, after, carried.seconds, callback.coverage)

    folder = Path(cfg.output_dir)
    trainer.save_checkpoint(folder / "quantized.ckpt", weights_only=False)
    if trainer.is_global_zero:
        result.write(folder / "report.json")
        if callback.quantized_fraction == 1:
            pack(module, callback, folder / "quantized.safetensors")
        if cfg.output == "json":
            print_json(event="report", **result.as_dict(), folder=str(folder))
        console.print(report_table(result))
        console.print(f"Checkpoint, report and logs are in {folder}", soft_wrap=True, markup=False)


def choose_output(cfg: DictConfig) -> None:
    """Settle ``output``: ``rich`` on a terminal, else ``json``, which keeps standard output for lines of JSON.

    Raises:
        ValueError: It is none of the allowed values.
    """
    if cfg.output not in ("auto", "rich", "json"):
        raise ValueError(f"output must be auto, rich or json, got {cfg.output!r}")
    if cfg.output == "auto":
        cfg.output = "rich" if sys.stdout.isatty() else "json"
    if cfg.output == "json":
        for handler in logging.getLogger().handlers:  # Hydra's
            if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout:
                handler.setStream(sys.stderr)


def pack(module: LightningModule, callback: INQCallback, path: Path) -> None:
    """Write the artifact, unless the module's state is of a kind that it cannot hold, such as sharded weights."""
    try:
        save_packed(module, path, layers=callback.layers, schedule=callback.options.phases)
    except ValueError as error:
        logging.getLogger(__name__).warning("%s was not written: %s", path.name, error)


def load_checkpoint(cfg: DictConfig) -> dict[str, Any]:
    """Read the file that ``ckpt`` names; empty without one.

    Raises:
        ValueError: There is no such file, it is no checkpoint, or ``resume`` lacks a ``ckpt``.
    """
    if cfg.ckpt is None:
        if cfg.resume:
            raise ValueError("resume=true needs ckpt=PATH, the checkpoint of the interrupted run")
        return {}
    path = Path(cfg.ckpt)
    if not path.is_file():
        raise ValueError(f"ckpt={cfg.ckpt}: there is no such file")
    try:
        checkpoint = checkpoints.load_checkpoint(path)
    except ValueError as error:
        raise ValueError(f"ckpt={error}") from error
    if cfg.resume and "callbacks" not in checkpoint:
        raise ValueError(
            f"ckpt={cfg.ckpt} holds weights only, nothing to resume; leave out resume=true to quantize them"
        )
    return checkpoint


def load_weights(module: LightningModule, weights: dict[str, Any], cfg: DictConfig) -> None:
    """Load a state_dict into the module.

    Raises:
        ValueError: It belongs to another network.
    """
    try:
        module.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"ckpt={cfg.ckpt} does not fit the configured model: {error}") from error


def plan_epochs(cfg: DictConfig, schedule: Schedule) -> None:
    """Settle ``trainer.max_epochs``, and the module's ``lr_epochs`` if it has one, where they are left open.

    Without ``trainer.max_epochs`` and ``trainer.max_steps``, each phase lasts ``inq.schedule.epochs_per_phase`` epochs,
    4 without it. ``lr_epochs`` becomes the length of a phase, so that the learning rate decays once in each; where only
    ``trainer.max_steps`` limits the run, it stays open.

    Raises:
        ValueError: The schedule does not say how long the run should be, or does not fit into ``trainer.max_epochs``.
    """
    phases = len(schedule.portions)
    per_phase = cfg.inq.schedule.epochs_per_phase
    if cfg.trainer.max_epochs is None and cfg.trainer.max_steps == -1:
        if schedule.starts is not None and per_phase is None:
            raise ValueError(
                "inq.schedule.starts says when phases begin, but not when the last one ends: set "
                "trainer.max_epochs or trainer.max_steps"
            )
        cfg.trainer.max_epochs = phases * (per_phase or EPOCHS_PER_PHASE)
    if "lr_epochs" in cfg.model and cfg.model.lr_epochs is None and cfg.trainer.max_epochs is not None:
        cfg.model.lr_epochs = per_phase or max(1, cfg.trainer.max_epochs // phases)
    epochs = cfg.trainer.max_epochs
    if schedule.unit == "epoch" and epochs is not None and epochs >= 0 and not cfg.trainer.fast_dev_run:
        schedule.spread(epochs).check_fits(epochs)  # rather than after hours of pre-training


def pretrain(
    cfg: DictConfig, data: LightningDataModule, callback: INQCallback, carried: FullPrecision
) -> dict[str, Any]:
    """Train the full-precision network, or go on with it, and return its state_dict.

    Raises:
        ValueError: ``pretrain.model`` has a key that the model lacks, or ``callback`` would find nothing to quantize.
    """
    cfg = cfg.copy()
    cfg.stage = "pretrain"
    for key, value in cfg.pretrain.model.items():
        if key not in cfg.model:
            raise ValueError(
                f"pretrain.model.{key} is no key of the model's config, which has {', '.join(cfg.model)}; "
                f"remove it with pretrain=plain"
            )
        cfg.model[key] = value
    for key, value in (("lr_epochs", None), ("distillation", 0.0)):  # what the quantization has need of
        if key in cfg.model and key not in cfg.pretrain.model:
            cfg.model[key] = value
    cfg.trainer.max_epochs = cfg.pretrain.max_epochs
    cfg.trainer.max_steps = -1
    module: LightningModule = instantiate(cfg.model, _convert_="all")
    callback.select(module)  # refuses bad patterns before hours of training rather than after
    build_trainer(cfg, cfg.trainer, [carried]).fit(module, data, ckpt_path=cfg.ckpt)
    return module.state_dict()


def build_trainer(cfg: DictConfig, trainer: DictConfig, callbacks: list[Callback]) -> Trainer:
    """Instantiate the Trainer with the configured callbacks and loggers; ``callbacks`` go first."""
    configured = [instantiate(c) for c in cfg.callbacks.values()]
    loggers = [instantiate(c) for c in cfg.logger.values()]
    if not loggers:  # the monitor refuses to work without one
        configured = [c for c in configured if not isinstance(c, LearningRateMonitor)]
    if not any(isinstance(c, INQCallback) for c in callbacks):  # pre-training
        configured = [c for c in configured if not isinstance(c, INQMonitor)]
    if cfg.output == "json":
        trainer.enable_progress_bar = False
        configured.append(JSONLines(cfg.stage))
    if not trainer.enable_progress_bar:
        configured = [c for c in configured if not isinstance(c, ProgressBar)]
    callbacks = [*callbacks, *configured]
    built: Trainer = instantiate(trainer, callbacks=callbacks, logger=loggers, default_root_dir=cfg.output_dir)
    return built


def test(trainer: Trainer, module: LightningModule, data: LightningDataModule) -> dict[str, float]:
    """Test metrics of the module as it is."""
    return {
        name: float(value) for metrics in trainer.test(module, data, verbose=False) for name, value in metrics.items()
    }


if __name__ == "__main__":
    command()
