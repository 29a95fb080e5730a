"""What is settled before anything trains: where a run starts, and how long it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

from omegaconf import DictConfig
from pytorch_lightning import LightningModule

from inq_lightning.core.activations import saved_activations
from inq_lightning.core.schedule import Schedule
from inq_lightning.formats.checkpoint import holds_withheld, load_checkpoint

EPOCHS_PER_PHASE = 4  # where neither the schedule nor trainer.max_epochs says


class Start(NamedTuple):
    """Where a run starts.

    Attributes:
        stage: The first stage.
        weights: state_dict of the network that the stage begins with; None where it initializes one.
        checkpoint: The checkpoint from which the stage goes on, where it was interrupted.
    """

    stage: Literal["pretrain", "quantize"]
    weights: dict[str, Any] | None = None
    checkpoint: str | None = None

    @classmethod
    def of(cls, cfg: DictConfig) -> Start:
        """What ``ckpt`` and ``resume`` ask for.

        Raises:
            ValueError: ``ckpt`` is no checkpoint, or ``resume`` lacks one of an interrupted run.
        """
        if cfg.ckpt is None:
            if cfg.resume:
                raise ValueError("resume=true needs ckpt=PATH, the checkpoint of the interrupted run")
            return cls("pretrain")
        checkpoint = _load(cfg.ckpt)
        if not cfg.resume:
            return cls("quantize", weights=checkpoint.get("state_dict", checkpoint))
        if "callbacks" not in checkpoint:
            raise ValueError(
                f"ckpt={cfg.ckpt} holds weights only, nothing to resume; leave out resume=true to quantize them"
            )
        settings = ("hyper_parameters", "hparams_name", "hparams_type")  # the configured model has these itself
        lost = [k for k, v in checkpoint.items() if k.removeprefix("datamodule_") not in settings and holds_withheld(v)]
        if lost:
            raise ValueError(
                f"ckpt={cfg.ckpt} holds in {', '.join(lost)} objects that only code could restore, so the run cannot "
                "go on from it; leave out resume=true to quantize its weights"
            )
        quantizing = "INQCallback" in checkpoint["callbacks"]
        return cls("quantize" if quantizing else "pretrain", checkpoint=cfg.ckpt)


def _load(ckpt: str) -> dict[str, Any]:
    if not Path(ckpt).is_file():
        raise ValueError(f"ckpt={ckpt}: there is no such file")
    try:
        return load_checkpoint(ckpt)
    except ValueError as error:
        raise ValueError(f"ckpt={error}") from error


def load_weights(module: LightningModule, weights: dict[str, Any], cfg: DictConfig) -> None:
    """Load a state_dict into the module.

    Raises:
        ValueError: It belongs to another network.
    """
    try:
        with saved_activations(module, weights):
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
