"""What rounded activations and whole numbers cost ResNet-20 without any training, on all test images.

``python -m benchmarks.accuracy.integers IMAGES [--seeds 0 1] [--bits 5 4 3 2]`` takes the baselines that come with the
project and the archive IMAGES, quantizes weights in closed form on 512 training images, with activations in floats
and of 8, 6 and 4 bits, lowers the network to whole numbers, and adds what it finds to integers.json beside this.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize
from hydra.utils import instantiate
from pytorch_lightning import LightningDataModule, seed_everything
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.accuracy.study import BASELINES
from inq_lightning import lower, quantize
from inq_lightning.recipes.classifier import Classifier

KEPT = Path(__file__).parent / "integers.json"
IMAGES = 512  # to calibrate by


def tensors(loader: Any, count: int | None = None) -> tuple[Tensor, Tensor]:
    """The first images and labels of a loader, or all."""
    images, labels, found = [], [], 0
    for x, y in loader:
        images.append(x)
        labels.append(y)
        found += len(y)
        if count is not None and found >= count:
            break
    return torch.cat(images)[:count], torch.cat(labels)[:count]


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percent of the images that the network takes for what they are."""
    network.eval()
    right = sum(
        int((network(x).argmax(1) == y).sum()) for x, y in zip(images.split(250), labels.split(250), strict=True)
    )
    return 100 * right / len(labels)


def measure(archive: Path, seed: int, widths: list[int], activations: list[int]) -> list[dict[str, Any]]:
    """Accuracies of one baseline at each width, with activations in floats and of 8, 6 and 4 bits."""
    with initialize(version_base="1.3", config_path="conf"):
        cfg = compose("study", ["name=integers", "folder=.", f"seed={seed}", f"data.path={archive}"])
    seed_everything(seed)
    data: LightningDataModule = instantiate(cfg.data)
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    module: Classifier = instantiate(cfg.model, _convert_="all")
    module.load_state_dict(load_file(BASELINES / f"{seed}.safetensors"))
    some, _ = tensors(data.train_dataloader(), IMAGES)
    images, labels = tensors(data.test_dataloader())
    baseline = accuracy(module.net, images, labels)
    print(f"seed {seed}: baseline {baseline:.2f}", flush=True)
    rows = []
    for bits in widths:
        start = time.perf_counter()
        weights = quantize(module.net, list(some.split(128)), bits)
        row: dict[str, Any] = {"seed": seed, "bits": bits, "baseline": baseline, "seconds": time.perf_counter() - start}
        row["float"] = accuracy(weights.model, images, labels)
        for width in activations:
            net = quantize(module.net, list(some.split(128)), bits, activation_bits=width).model
            whole = lower(net, some)
            row[f"a{width}"] = accuracy(net, images, labels)
            row[f"a{width} integer"] = accuracy(whole.to_torch(torch.float32), images, labels)
            row[f"a{width} terms"], row[f"a{width} changed"] = whole.terms, whole.changed
        print({name: round(value, 2) for name, value in row.items()}, flush=True)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", type=Path, help="the archive of the images")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--bits", type=int, nargs="+", default=[5, 4, 3, 2])
    parser.add_argument("--activations", type=int, nargs="*", default=[8, 6, 4])
    given = parser.parse_args()
    found = json.loads(KEPT.read_text()) if KEPT.exists() else []
    for seed in given.seeds:
        new = measure(given.images, seed, given.bits, given.activations)
        known = {(row["seed"], row["bits"]): row for row in found}
        for row in new:
            known[row["seed"], row["bits"]] = known.get((row["seed"], row["bits"]), {}) | row
        found = list(known.values())
        KEPT.write_text(json.dumps(sorted(found, key=lambda row: (row["seed"], -row["bits"])), indent=1) + "\n")


if __name__ == "__main__":
    main()
