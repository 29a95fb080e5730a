"""`inq-quantize`: test a trained network, quantize it without training, test it again, report.

A Hydra application over `conf/`, with the keys of `inq-train`::

    inq-quantize ckpt=trained.ckpt model=resnet20 data=npz data.path=images.npz inq.bits=3
    inq-quantize ckpt=trained.ckpt inq.bits=2 images=256 --json
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig
from pytorch_lightning import LightningDataModule, LightningModule, seed_everything

from inq_lightning._common import import_extra
from inq_lightning.closed_form.quantize import quantize
from inq_lightning.core.options import Options
from inq_lightning.formats.packed import save_packed
from inq_lightning.recipes.command import prepare
from inq_lightning.recipes.config import register_training
from inq_lightning.recipes.stages import build_trainer, first_images, test, test_whole, whole_numbers
from inq_lightning.recipes.start import Start, load_weights
from inq_lightning.report.run import Report, print_json
from inq_lightning.report.tables import report_table

register_training()

#: Options of INQ that say something without training.
USED = (
    *("bits", "levels", "layer_levels", "include", "exclude", "layer_bits", "embeddings"),
    *("activation_bits", "layer_activation_bits", "input_bits"),
)


@hydra.main(version_base="1.3", config_path="pkg://inq_lightning.conf", config_name="quantize")
def main(cfg: DictConfig) -> None:
    """Quantize the configured network."""
    console = prepare(cfg)
    seed_everything(cfg.seed, workers=True, verbose=False)
    run(cfg, console)


def run(cfg: DictConfig, console: Any) -> None:
    """Quantize a trained network and leave what came of it in its folder.

    Raises:
        ValueError: ``ckpt`` names no trained network, ``images`` is no number of images, or ``inq`` has an option that
            needs training.
    """
    begun = time.monotonic()
    options = used_options(cfg)
    weights = Start.of(cfg).weights
    if weights is None:
        raise ValueError("inq-quantize needs ckpt=PATH, a trained network; resume=true is for inq-train")
    if cfg.images < 1:
        raise ValueError(f"images must be at least 1, got {cfg.images}")
    folder = Path(cfg.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    data: LightningDataModule = instantiate(cfg.data)
    module: LightningModule = instantiate(cfg.model, _convert_="all")
    load_weights(module, weights, cfg)
    trainer = build_trainer(cfg, [])
    before = test(trainer, module, data)
    images = first_images(data, cfg.images)
    with shown(console, cfg.output == "rich") as progress:
        found = quantize(module, images, **options, progress=progress)
    quantized = cast(LightningModule, found.model)
    after = test(trainer, quantized, data)
    whole = whole_numbers(quantized, images, found.layers) if options["activation_bits"] is not None else None
    integer = None if whole is None else test_whole(trainer, quantized, data, whole)
    report = Report.of(found.model, found.layers, before, after, time.monotonic() - begun, found.coverage, integer)
    report.write(folder / "report.json")
    save_packed(found.model, folder / "quantized.safetensors", layers=found.layers, integer=whole)
    if cfg.output == "json":
        print_json(event="report", **report.as_dict(), folder=str(folder))
    console.print(report_table(report))
    for layer in found.layers:
        if layer.nearest:
            console.print(f"{layer.name} has its nearest levels: {layer.nearest}", soft_wrap=True, markup=False)
    console.print(f"Artifact and report are in {folder}", soft_wrap=True, markup=False)


def used_options(cfg: DictConfig) -> dict[str, Any]:
    """INQ's options that say something without training.

    Raises:
        ValueError: Another one is set, which would do nothing; the message names it.
    """
    options: Options = instantiate(cfg.inq).options
    values, default = options.as_dict(), Options().as_dict()
    idle = [f"inq.{name}" for name in values if name not in USED and values[name] != default[name]]
    if idle:
        raise ValueError(f"{', '.join(idle)} would do nothing without training; leave out, or use inq-train")
    return {name: getattr(options, name) for name in USED}


@contextmanager
def shown(console: Any, visible: bool) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar for people; gives what :func:`quantize` calls."""
    progress = import_extra("rich.progress", "train").Progress(console=console, disable=not visible, transient=True)
    with progress:
        task = progress.add_task("quantize")
        yield lambda done, total, name: progress.update(task, completed=done, total=total, description=name)
