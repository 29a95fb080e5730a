"""`inq-train`: pre-train (or load) a network, quantize it, test both, report.

A Hydra application over `conf/`::

    inq-train inq.bits=3 inq/schedule=resnet18
    inq-train -m inq.bits=2,3,4,5
    inq-train ckpt=outputs/.../interrupted.ckpt resume=true
    inq-train --json | jq .metrics
"""

from __future__ import annotations

import logging
import shlex
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig
from pytorch_lightning import LightningDataModule, LightningModule, seed_everything
from pytorch_lightning.utilities import rank_zero_only

from inq_lightning.formats.packed import save_packed
from inq_lightning.frontends.lightning.callback import INQCallback
from inq_lightning.integer.network import IntegerNetwork
from inq_lightning.recipes.command import prepare
from inq_lightning.recipes.config import register_training
from inq_lightning.recipes.stages import (
    FullPrecision,
    first_images,
    pretrain,
    quantize,
    test,
    test_whole,
    whole_numbers,
)
from inq_lightning.recipes.start import Start, plan_epochs
from inq_lightning.report.run import Report, print_json
from inq_lightning.report.tables import report_table

register_training()

IMAGES = 512  # by which the predictions of a network in whole numbers are compared


@hydra.main(version_base="1.3", config_path="pkg://inq_lightning.conf", config_name="train")
def main(cfg: DictConfig) -> None:
    """Run the configured experiment."""
    console = prepare(cfg)
    seed_everything(cfg.seed, workers=True, verbose=False)
    train(cfg, console)


def train(cfg: DictConfig, console: Any) -> None:
    """Take a network through the stages that it has not been through yet, and leave what came of it in its folder.

    Raises:
        ValueError: The config asks for what cannot be done; the message says which key of it.
    """
    start = Start.of(cfg)
    data: LightningDataModule = instantiate(cfg.data)
    inq: INQCallback = instantiate(cfg.inq)
    plan_epochs(cfg, inq.options.phases)

    say = rank_zero_only(partial(console.print, soft_wrap=True, markup=False, highlight=False))
    carried = FullPrecision()
    if start.stage == "pretrain":
        say(f"Stage 1: training at full precision, {_count(cfg.pretrain.max_epochs, 'epoch')}")
        start = pretrain(cfg, start, data, inq, carried)
    epochs, phases = cfg.trainer.max_epochs, _count(len(inq.options.phases.portions), "phase")
    length = _count(cfg.trainer.max_steps, "step") if epochs is None else _count(epochs, "epoch")
    say(f"Stage 2: quantizing to {inq.options.bits} bits, {length} in {phases}")
    trainer, module = quantize(cfg, start, data, inq, carried)
    say("Stage 3: testing the quantized network")
    after = test(trainer, module, data)
    whole = None
    if inq.options.activation_bits is not None and inq.quantized_fraction == 1 and not inq.quantizer.sharded:
        whole = whole_numbers(module, first_images(data, IMAGES), inq.layers)
    integer = None if whole is None else test_whole(trainer, module, data, whole)
    report = Report.of(module, inq.layers, carried.metrics, after, carried.seconds, inq.coverage, integer)

    folder = Path(cfg.output_dir)
    trainer.save_checkpoint(folder / "quantized.ckpt", weights_only=False)
    if trainer.is_global_zero:
        report.write(folder / "report.json")
        if inq.quantized_fraction == 1:
            pack(module, inq, whole, folder / "quantized.safetensors")
        if cfg.output == "json":
            print_json(event="report", **report.as_dict(), folder=str(folder))
        console.print(report_table(report))
        say(f"Checkpoint, report and logs are in {folder}\n" + "\n".join(["", "Next:", *next_commands(folder)]))


def _count(number: int, of: str) -> str:
    return f"{number} {of}{'' if number == 1 else 's'}"


def next_commands(folder: Path) -> list[str]:
    """Lines for a shell: what to do with a run's files, from the working directory."""
    here = Path.cwd()
    at = shlex.quote(str(folder.relative_to(here) if folder.is_relative_to(here) else folder))
    logs = [f"  tensorboard --logdir {at}"] if (folder / "tensorboard").is_dir() else []
    return [*logs, f"  inq-inspect {at}/quantized.ckpt", f"  inq-export {at}/quantized.ckpt network.onnx"]


def pack(module: LightningModule, inq: INQCallback, whole: IntegerNetwork | None, path: Path) -> None:
    """Write the artifact, unless the module's state is of a kind that it cannot hold, such as sharded weights."""
    try:
        save_packed(module, path, layers=inq.layers, schedule=inq.options.phases, integer=whole)
    except ValueError as error:
        logging.getLogger(__name__).warning("%s was not written: %s", path.name, error)
