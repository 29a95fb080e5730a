"""What finer grids could gain: rounding errors of the baseline's filters under a layer's grid and under their own.

``python -m benchmarks.accuracy.channels`` writes channels.json beside this file, for the results page. Batch
normalization follows each convolution and takes up any scale of a filter, so the error of a rounded filter q is what no
scale makes good: 1 - cos²(q, w).
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.accuracy.study import BASELINES
from inq_lightning import PowerOfTwoGrid
from inq_lightning.grid import Exponent

KEPT = Path(__file__).parent / "channels.json"
SCALES = torch.logspace(-1, 1, 41, base=2)  # two octaves hold all scales that differ under powers of two


def error(rounded: Tensor, weight: Tensor) -> Tensor:
    """Error of each filter, (out_channels,)."""
    return 1 - torch.cosine_similarity(rounded.flatten(1), weight.flatten(1)).square()


def by_layer(weight: Tensor, bits: int, exponent: Exponent) -> Tensor:
    return error(PowerOfTwoGrid.from_weights(weight, bits, exponent=exponent).quantize(weight), weight)


def by_channel(weight: Tensor, bits: int) -> Tensor:
    grids = [PowerOfTwoGrid.from_weights(row, bits, exponent="mse") for row in weight]
    return error(torch.stack([grid.quantize(row) for grid, row in zip(grids, weight, strict=True)]), weight)


def fitted(weight: Tensor, bits: int) -> Tensor:
    """Each filter multiplied by the factor that suits its own grid best."""
    return torch.stack([by_channel(weight * scale, bits) for scale in SCALES]).amin(0)


def measure() -> dict[int, dict[str, float]]:
    """Median error of all filters of the convolutions, in %, by bits and by kind of grid."""
    convolutions = [w for w in load_file(BASELINES / "0.safetensors").values() if w.ndim == 4]

    def median(errors: list[Tensor]) -> float:
        return round(100 * float(torch.cat(errors).median()), 1)

    return {
        bits: {
            "layer, by the maximum": median([by_layer(w, bits, "max") for w in convolutions]),
            "layer, by least error": median([by_layer(w, bits, "mse") for w in convolutions]),
            "channel, by least error": median([by_channel(w, bits) for w in convolutions]),
            "channel, times a fitted scale": median([fitted(w, bits) for w in convolutions]),
        }
        for bits in (5, 4, 3, 2)
    }


if __name__ == "__main__":
    KEPT.write_text(json.dumps(measure(), indent=1) + "\n")
