"""`inq-plan`: what `inq-train` would do with the same keys, without data and without training.

A Hydra application over `conf/`, like `inq-train`::

    inq-plan model=resnet20 data=npz inq.bits=4
    inq-plan inq/schedule=alexnet trainer.max_epochs=20 --json
"""

from __future__ import annotations

import json
import math
from typing import Any

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig
from pytorch_lightning import LightningModule

from inq_lightning.core.plan import Plan
from inq_lightning.core.schedule import Length, Schedule
from inq_lightning.frontends.lightning import clock
from inq_lightning.frontends.lightning.callback import INQCallback
from inq_lightning.recipes.command import prepare
from inq_lightning.recipes.config import register_training
from inq_lightning.recipes.start import Start, load_weights, plan_epochs
from inq_lightning.report.tables import plan_table

register_training()

DOWNLOADS: dict[str, dict[str, Any]] = {  # arguments of networks that would fetch weights, which no plan needs
    "inq_lightning.recipes.models.torchvision_model": {"weights": None},
    "inq_lightning.recipes.models.timm_model": {"pretrained": False},
}


@hydra.main(version_base="1.3", config_path="pkg://inq_lightning.conf", config_name="plan")
def main(cfg: DictConfig) -> None:
    """Print the plan of the configured run."""
    console = prepare(cfg)
    plan = make_plan(cfg)
    if cfg.output == "json":
        print(json.dumps(plan.as_dict()))
    else:
        console.print(plan_table(plan))


def make_plan(cfg: DictConfig) -> Plan:
    """The plan of the run that a config describes; ``ckpt``, where given, tells which weights are zero.

    Raises:
        ValueError: ``resume`` is set, or `inq-train` would refuse the run.
    """
    if cfg.resume:
        raise ValueError("inq-plan plans a run from its beginning; leave out resume=true")
    callback: INQCallback = instantiate(cfg.inq)
    plan_epochs(cfg, callback.options.phases)
    net = cfg.model.get("net") or {}
    for key, value in DOWNLOADS.get(net.get("_target_", ""), {}).items():
        net[key] = value
    module: LightningModule = instantiate(cfg.model, _convert_="all")
    if (weights := Start.of(cfg).weights) is not None:
        load_weights(module, weights, cfg)
    return callback.quantizer.plan(module, length(cfg, callback.options.phases))


def length(cfg: DictConfig, schedule: Schedule) -> Length | None:
    """How long the run is; None where an open schedule stays open, since spreading it takes the number of batches."""
    epochs, steps = clock.limit(cfg.trainer.max_epochs), clock.limit(cfg.trainer.max_steps)
    if schedule.starts is None and math.isfinite(epochs) and (schedule.unit == "step" or math.isfinite(steps)):
        return None
    return Length(epochs, steps)
