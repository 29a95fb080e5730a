"""Packed inference against float32, one thread, as ratios: ``python -m benchmarks.latency [--json PATH]``.

The rivals are float32 in torch, in the same memory format, and in ONNX Runtime; for channels_last also float32 in
torch as the network comes. All alternate in bursts of ten calls: a network in service finds its own weights in the
cache, as far as they fit; above 1 the packed one is faster. On a busy machine the fastest of many calls is the better
guide, on a quiet one the median. Weights are random, rounded to their grid.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch
from torch import Tensor, nn

from benchmarks.sizes import export_float32
from inq_lightning import PowerOfTwoGrid, to_packed
from inq_lightning.core.selection import select_parameters
from inq_lightning.recipes.models import ResNetCIFAR, SmallCNN

BURST = 10
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows to this file, too")
    parser.add_argument("--calls", type=int, default=100, help="calls of each network at batch 1")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")  # of the ONNX exporter
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows: list[Row] = []
    print("| network | bits | activations | batch | median | fastest | float32 ms | memory | largest error | others |")
    print("|---|---:|---|---:|---:|---:|---:|---:|---:|---|")
    for name in NETWORKS:
        for row in measure(name, options.calls):
            rows.append(row)
            others = ", ".join(f"{key}: {row[key]:.2f}×" for key in row if key.startswith("median_vs"))
            line = "| {network} | {bits} | {activations} | {batch} | {median:.2f}× | {fastest:.2f}× "
            line += "| {float32_ms:.3f} | {memory:.3f}× | {error:.1e} | {others} |"
            print(line.format(**row, others=others), flush=True)
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


def measure(name: str, calls: int) -> Iterator[Row]:
    make, shape = NETWORKS[name]
    onnx = onnx_session(make().eval(), shape)
    formats = {name: torch.contiguous_format}
    if len(shape) == 3:
        formats[f"{name}, channels last"] = torch.channels_last
    for (network, memory_format), bits in itertools.product(formats.items(), (2, 3, 4, 5)):
        default = quantized(make(), bits)
        model = copy.deepcopy(default).to(memory_format=memory_format)  # type: ignore[call-overload]
        rivals = {"onnxruntime": onnx} | ({} if network == name else {"default": default})
        modes = ("float", "int8") if any(big(m) for m in model.modules()) else ("float",)
        for activations, batch in itertools.product(modes, (1, 64)):
            x = torch.randn(batch, *shape)
            row = compare(model, x, activations, rivals, calls if batch == 1 else calls // 5)
            yield {"network": network, "bits": bits, "activations": activations, "batch": batch, **row}


def quantized(model: nn.Module, bits: int) -> nn.Module:
    for selected in select_parameters(model):
        weight = selected.parameter.data
        weight.normal_(0, 0.02)
        weight.copy_(PowerOfTwoGrid.from_weights(weight, bits).quantize(weight))
    return model.eval()


def big(module: nn.Module) -> bool:
    """Whether int8 activations change anything."""
    return isinstance(module, nn.Linear) and module.weight.numel() >= 1 << 17


def onnx_session(model: nn.Module, shape: tuple[int, ...]) -> Callable[[Tensor], Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "float32.onnx")
        export_float32(model, path, shape)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x.numpy()})


@torch.inference_mode()
def compare(
    model: nn.Module, x: Tensor, activations: str, rivals: Mapping[str, Callable[[Tensor], Any]], calls: int
) -> Row:
    packed = to_packed(model, activations=activations)  # type: ignore[arg-type]
    networks: dict[str, Callable[[Tensor], Any]] = {"packed": packed, "float32": model, **rivals}
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    for _ in range(calls // BURST):
        for name, network in networks.items():
            for call in range(BURST + 1):
                start = time.perf_counter()
                network(x)
                if call:
                    seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    expected = model(x)
    mine, theirs = (weight_bytes(network) for network in (packed, model))
    return {
        "median": medians["float32"] / medians["packed"],
        "fastest": min(seconds["float32"]) / min(seconds["packed"]),
        "float32_ms": 1000 * medians["float32"],
        "memory": mine / theirs,
        "error": float((packed(x) - expected).abs().max() / expected.abs().max()),
    } | {f"median_vs_{name}": medians[name] / medians["packed"] for name in rivals}


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
