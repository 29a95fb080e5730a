"""What re-estimating batch normalization's statistics at the end would bring, on the images held out.

``python -m benchmarks.accuracy.norms RUNS IMAGES`` takes the finished quantized networks in the study's folder RUNS,
averages the statistics anew over the training images in the archive IMAGES, and writes norms.json beside this file, for
the results page.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from pytorch_lightning import LightningDataModule, Trainer
from safetensors.torch import load_file
from torch.optim.swa_utils import update_bn

from inq_lightning.recipes.classifier import Classifier

KEPT = Path(__file__).parent / "norms.json"


def measure(run: Path, images: Path) -> dict[str, Any]:
    """Held-out accuracy of one finished run, as it ended and with its statistics re-estimated."""
    result = json.loads((run / "result.json").read_text())
    settings = OmegaConf.create(result["settings"])
    settings.data.path = str(images)
    module: Classifier = instantiate(settings.model, _convert_="all")
    module.load_state_dict(load_file(run / "weights.safetensors"))
    data: LightningDataModule = instantiate(settings.data)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    ended = trainer.validate(module, data, verbose=False)[0]
    data.setup("fit")
    torch.manual_seed(0)
    update_bn(data.train_dataloader(), module)
    estimated = trainer.validate(module, data, verbose=False)[0]
    scores = {"ended": ended["val/acc"], "re-estimated": estimated["val/acc"]}
    return {"cell": result["name"], "seed": result["seed"], **scores}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, help="the study's folder")
    parser.add_argument("images", type=Path, help="the archive of the images")
    given = parser.parse_args()
    finished = [path.parent for path in sorted(given.runs.glob("?bit*/*/weights.safetensors"))]
    measured = [measure(run, given.images) for run in finished if "control" not in run.parent.name]
    KEPT.write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
