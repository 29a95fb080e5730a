"""Packed inference against float32, one thread, as ratios: ``python -m benchmarks.latency [--json PATH]``.

Both networks alternate in bursts of ten calls: a network in service finds its own weights in the cache, as far as they
fit; above 1 the packed one is faster. On a busy machine the fastest of many calls is the better guide, on a quiet one
the median. Weights are random, rounded to their grid.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from inq_lightning import PowerOfTwoGrid
from inq_lightning.export.packed import to_packed
from inq_lightning.models import ResNetCIFAR, SmallCNN
from inq_lightning.selection import select_parameters

BURST = 10
Row = dict[str, str | int | float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows to this file, too")
    parser.add_argument("--calls", type=int, default=100, help="calls of each network at batch 1")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows: list[Row] = []
    print("| network | bits | activations | batch | median | fastest | float32 ms | memory | largest error |")
    print("|---|---:|---|---:|---:|---:|---:|---:|---:|")
    for name, (make, shape) in NETWORKS.items():
        for bits in (2, 3, 4, 5):
            model = quantized(make(), bits)
            for activations in ("float", "int8") if any(big(m) for m in model.modules()) else ("float",):
                for batch in (1, 64):
                    calls = options.calls if batch == 1 else options.calls // 5
                    row = compare(model, torch.randn(batch, *shape), activations, calls)
                    rows.append({"network": name, "bits": bits, "activations": activations, "batch": batch, **row})
                    line = "| {network} | {bits} | {activations} | {batch} | {median:.2f}× | {fastest:.2f}× "
                    print((line + "| {float32_ms:.3f} | {memory:.3f}× | {error:.1e} |").format(**rows[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear 4096×4096": (lambda: nn.Linear(4096, 4096), (4096,)),
    "MLP 784-1024-1024-10": (
        lambda: nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)),
        (784,),
    ),
    "ResNet-20, 32×32": (lambda: ResNetCIFAR(20), (3, 32, 32)),
    "SmallCNN, 8×8": (SmallCNN, (1, 8, 8)),
}


def quantized(model: nn.Module, bits: int) -> nn.Module:
    for selected in select_parameters(model):
        weight = selected.parameter.data
        weight.normal_(0, 0.02)
        weight.copy_(PowerOfTwoGrid.from_weights(weight, bits).quantize(weight))
    return model.eval()


def big(module: nn.Module) -> bool:
    """Whether int8 activations change anything."""
    return isinstance(module, nn.Linear) and module.weight.numel() >= 1 << 17


@torch.inference_mode()
def compare(model: nn.Module, x: Tensor, activations: str, calls: int) -> Row:
    packed = to_packed(model, activations=activations)  # type: ignore[arg-type]
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(calls // BURST):
        for network, times in zip((model, packed), seconds, strict=True):
            for call in range(BURST + 1):
                start = time.perf_counter()
                network(x)
                if call:
                    times.append(time.perf_counter() - start)
    expected = model(x)
    mine, theirs = (weight_bytes(network) for network in (packed, model))
    return {
        "median": statistics.median(seconds[0]) / statistics.median(seconds[1]),
        "fastest": min(seconds[0]) / min(seconds[1]),
        "float32_ms": 1000 * statistics.median(seconds[0]),
        "memory": mine / theirs,
        "error": float((packed(x) - expected).abs().max() / expected.abs().max()),
    }


def weight_bytes(model: nn.Module) -> int:
    """Bytes that linear layers and convolutions keep besides their biases."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)]
    return sum(
        tensor.untyped_storage().nbytes()
        for layer in layers
        for name, tensor in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]
        if name != "bias"
    )


if __name__ == "__main__":
    main()
