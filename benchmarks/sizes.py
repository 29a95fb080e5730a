"""How small networks get, and what packing and loading them costs: ``python -m benchmarks.sizes [--json PATH]``.

Random weights of the published shapes, rounded to grids of 2 to 5 bits, as every file format of the package. Sizes do
not depend on training, except for the entropy: ``--trained PATH`` adds what a checkpoint or safetensors file has.
``--markdown`` prints the tables of an earlier run's JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from inq_lightning import PowerOfTwoGrid
from inq_lightning.export.accelerator import FORMATS, save_accelerator
from inq_lightning.export.artifact import load_packed, save_packed
from inq_lightning.export.codec import pack, pack_entropy
from inq_lightning.export.grids import fit_grid

RESULTS = Path(__file__).with_suffix(".json")
BITS = (2, 3, 4, 5)
ACCELERATORS = {"mxfp4": 4, "fp8": 5}  # written at one bit width only: their files have the same size at all
LARGE = 50_000_000  # weights from which on times are of one run rather than medians of three


# ---- the networks: layers that own parameters, without a forward -----------------------------------------------------


def resnet(counts: Iterable[int], bottleneck: bool) -> nn.Module:
    """He et al. 2016, "Deep residual learning", table 1, with the shortcuts of option B."""
    layers: list[nn.Module] = [*conv_bn(3, 64, 7)]
    channels = 64
    for stage, blocks in enumerate(counts):
        width = 64 << stage
        out = 4 * width if bottleneck else width
        for block in range(blocks):
            if bottleneck:
                layers += conv_bn(channels, width, 1) + conv_bn(width, width, 3) + conv_bn(width, out, 1)
            else:
                layers += conv_bn(channels, width, 3) + conv_bn(width, out, 3)
            if block == 0 and (stage > 0 or bottleneck):
                layers += conv_bn(channels, out, 1)
            channels = out
    return nn.Sequential(*layers, nn.Linear(channels, 1000))


def conv_bn(in_channels: int, out_channels: int, size: int) -> list[nn.Module]:
    return [nn.Conv2d(in_channels, out_channels, size, bias=False), nn.BatchNorm2d(out_channels)]


def vgg16() -> nn.Module:
    """Simonyan and Zisserman 2015, configuration D."""
    channels = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    convolutions = [nn.Conv2d(i, o, 3) for i, o in itertools.pairwise(channels)]
    return nn.Sequential(*convolutions, nn.Linear(512 * 49, 4096), nn.Linear(4096, 4096), nn.Linear(4096, 1000))


class ViTB16(nn.Module):
    """Dosovitskiy et al. 2021, ViT-B/16 for images of 224×224."""

    def __init__(self) -> None:
        super().__init__()
        self.class_token = nn.Parameter(torch.empty(1, 1, 768))
        self.positions = nn.Parameter(torch.empty(1, 197, 768))
        self.patches = nn.Conv2d(3, 768, 16)
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                [
                    nn.LayerNorm(768),
                    nn.MultiheadAttention(768, 12),
                    nn.LayerNorm(768),
                    nn.Linear(768, 3072),
                    nn.Linear(3072, 768),
                ]
            )
            for _ in range(12)
        )
        self.norm = nn.LayerNorm(768)
        self.head = nn.Linear(768, 1000)


def llm_layer() -> nn.Module:
    """The linear layers of one decoder layer as wide as LLaMA-7B's: q, k, v, o, and the three of its MLP."""
    attention = [nn.Linear(4096, 4096, bias=False) for _ in range(4)]
    shapes = [(4096, 11008), (4096, 11008), (11008, 4096)]
    return nn.Sequential(*attention, *(nn.Linear(i, o, bias=False) for i, o in shapes))


# Each with its published number of parameters.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "ResNet-18": (lambda: resnet([2, 2, 2, 2], bottleneck=False), 11_689_512),
    "ResNet-50": (lambda: resnet([3, 4, 6, 3], bottleneck=True), 25_557_032),
    "VGG-16": (vgg16, 138_357_544),
    "ViT-B/16": (ViTB16, 86_567_656),
    "LLM layer": (llm_layer, 4 * 4096**2 + 3 * 4096 * 11008),
}


def build(network: str) -> nn.Module:
    """The network with uninitialized memory, which is not resident until something is written to it."""
    with torch.device("meta"):
        model = NETWORKS[network][0]()
    return model.to_empty(device="cpu")


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Normal weights, as trained ones are roughly before they are quantized."""
    torch.manual_seed(0)
    for p in model.parameters():
        p.normal_(0, 0.02)
    for buffer in model.buffers():
        buffer.zero_()


# ---- measuring -------------------------------------------------------------------------------------------------------


@dataclass
class Layer:
    """What `INQCallback.layers` says of a weight."""

    name: str
    bits: int
    n1: int | None


@torch.no_grad()
def quantize(model: nn.Module, originals: Mapping[str, Tensor], bits: int) -> list[Layer]:
    layers = []
    for name, weight in originals.items():
        # By the largest weight, two bits would make nearly all of them zero. All are alike here: a sample will do.
        grid = PowerOfTwoGrid.from_weights(weight.flatten()[: 1 << 16], bits, exponent="mse")
        model.get_parameter(name).copy_(grid.quantize(weight))
        layers.append(Layer(name, bits, grid.n1))
    return layers


def entropy(codes: Tensor) -> float:
    """Order-0 entropy of codes, in bits for all of them together."""
    counts = torch.bincount(codes.flatten().int() + 128).double()
    counts = counts[counts > 0]
    return float((counts * (counts.sum() / counts).log2()).sum())


def measure(network: str, bits_to_measure: Iterable[int], folder: Path) -> dict[str, Any]:
    model = build(network)
    randomize(model)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == NETWORKS[network][1], f"{network} has {parameters} parameters"
    names = [name for name, p in model.named_parameters() if p.dim() > 1 and name not in ("class_token", "positions")]
    originals = {name: model.get_parameter(name).detach().clone() for name in names}
    selected = sum(w.numel() for w in originals.values())
    rest = sum(t.nbytes for name, t in model.state_dict().items() if name not in originals)
    rows = [measure_bits(network, model, originals, bits, rest, folder) for bits in bits_to_measure]
    return {"network": network, "parameters": parameters, "selected": selected, "layers": len(names), "rows": rows}


def measure_bits(
    network: str, model: nn.Module, originals: Mapping[str, Tensor], bits: int, rest: int, folder: Path
) -> dict[str, Any]:
    layers = quantize(model, originals, bits)
    selected = sum(w.numel() for w in originals.values())
    grids = {layer.name: PowerOfTwoGrid(layer.n1, bits) for layer in layers}
    order0 = sum(entropy(grid.encode(model.get_parameter(name))) for name, grid in grids.items())
    plain, packed, coded = (folder / f"{name}.safetensors" for name in ("plain", "packed", "coded"))
    rounds = 1 if selected > LARGE else 3
    save_plain, save, save_coded = seconds(
        rounds,
        lambda: save_file(model.state_dict(), plain),
        lambda: save_packed(model, packed, layers=layers),
        lambda: save_packed(model, coded, layers=layers, entropy_coded=True),
    )
    load_plain, load, load_coded = seconds(
        rounds,
        lambda: model.load_state_dict(load_file(plain)),
        lambda: load_packed(packed, model),
        lambda: load_packed(coded, model),
    )
    size = {"float32": plain.stat().st_size, "zip": zipped(plain, folder / "plain.zip")}
    size |= {"packed": packed.stat().st_size, "entropy_coded": coded.stat().st_size}
    for name, once in ACCELERATORS.items():
        if bits == once:
            save_accelerator(model, folder / name, name, layers=layers)  # type: ignore[arg-type]
            size[name] = (folder / name).stat().st_size
    float32 = sum(t.nbytes for t in model.state_dict().values())
    return {
        "bits": bits,
        "size": size,
        "packed_bits_per_weight": 8 * (size["packed"] - rest) / selected,
        "entropy_bits_per_weight": order0 / selected,
        "entropy_coded_bits_per_weight": 8 * (size["entropy_coded"] - rest) / selected,
        "entropy_coded_over_entropy": 8 * (size["entropy_coded"] - rest) / order0,
        "within_entropy_limit": size["entropy_coded"] - rest <= 1.03 * order0 / 8 + 1024 * len(layers),
        "save_time": {"packed": save / save_plain, "entropy_coded": save_coded / save_plain},
        "load_time": {"packed": load / load_plain, "entropy_coded": load_coded / load_plain},
        "load_peak_memory": {
            kind: fresh_process(peak_memory, network, str(path), kind) / float32
            for kind, path in (("float32", plain), ("packed", packed), ("entropy_coded", coded))
        },
    }


def seconds(rounds: int, *functions: Callable[[], object]) -> list[float]:
    """Median seconds of each function, called in turn."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for function, spent in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            spent.append(time.perf_counter() - start)
    return [statistics.median(spent) for spent in times]


def zipped(path: Path, out: Path) -> int:
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(path, path.name)
    return out.stat().st_size


def fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def peak_memory(network: str, path: str, kind: str) -> int:
    """Bytes by which resident memory grows at most while a file is loaded, the network's own included; Linux only."""
    model = build(network)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew; getrusage's outlives even exec
    before = status("VmRSS")
    if kind == "float32":
        model.load_state_dict(load_file(path))
    else:
        load_packed(path, model)
    return status("VmHWM") - before


def status(key: str) -> int:
    """A line of the kernel's account of this process, in bytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])


def measure_trained(path: Path) -> dict[str, Any]:
    """Entropy of the weights of a trained network, of every matrix and kernel that lies on a grid."""
    if path.suffix == ".safetensors":
        state = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
    numel, packed, coded, order0, widths = 0, 0, 0, 0.0, set()
    for weight in state.values():
        grid = fit_grid(weight) if weight.is_floating_point() and weight.dim() > 1 else None
        if grid is not None:
            codes = grid.encode(weight)
            numel += codes.numel()
            packed += pack(codes, grid.bits).numel()
            coded += pack_entropy(codes, grid.bits).numel()
            order0 += entropy(codes)
            widths.add(grid.bits)
    if not numel:
        raise ValueError(f"{path}: no weight lies on a grid; give a network that INQ has quantized")
    return {
        "file": path.name,
        "selected": numel,
        "bits": sorted(widths),
        "packed_bits_per_weight": 8 * packed / numel,
        "entropy_bits_per_weight": order0 / numel,
        "entropy_coded_over_entropy": 8 * coded / order0 if order0 else math.nan,
    }


# ---- reporting -------------------------------------------------------------------------------------------------------


def markdown(results: Mapping[str, Any]) -> str:
    """Tables of the results, in Markdown."""
    lines = ["Sizes in MB (10⁶ bytes), of the whole file:", ""]
    columns = ["float32", "zip", "packed", "entropy_coded", *ACCELERATORS]
    lines += table_head("network", "bits", "float32", "zip of float32", "packed", "entropy-coded", *ACCELERATORS)
    for network in results["networks"]:
        once = {name: size for row in network["rows"] for name, size in row["size"].items()}
        for row in network["rows"]:
            size = row["size"] | {n: v for n, v in once.items() if n in FORMATS and row["bits"] <= FORMATS[n].max_bits}
            cells = [f"{size[c] / 1e6:.2f}" if c in size else "–" for c in columns]
            lines.append(table_row(network["network"], row["bits"], *cells))
    lines += ["", "Bits a quantized weight, all metadata of the file included:", ""]
    lines += table_head("network", "bits", "packed", "order-0 entropy", "entropy-coded", "entropy-coded / entropy")
    for network in results["networks"]:
        for row in network["rows"]:
            values = ("packed", "entropy", "entropy_coded")
            cells = [f"{row[f'{v}_bits_per_weight']:.4f}" for v in values]
            ratio = f"{row['entropy_coded_over_entropy']:.4f}"
            lines.append(table_row(network["network"], row["bits"], *cells, ratio))
    lines += ["", "Time against a plain safetensors file of float32, and peak memory of loading against the network's"]
    lines += ["tensors in float32:", ""]
    lines += table_head(
        "network", "bits", "save packed", "save entropy-coded", "load packed", "load entropy-coded",
        "memory float32", "memory packed", "memory entropy-coded",
    )  # fmt: skip
    for network in results["networks"]:
        for row in network["rows"]:
            times = [row[f"{way}_time"][kind] for way in ("save", "load") for kind in ("packed", "entropy_coded")]
            memory = [row["load_peak_memory"][kind] for kind in ("float32", "packed", "entropy_coded")]
            cells = [f"{t:.1f}" for t in times] + [f"{m:.2f}" for m in memory]
            lines.append(table_row(network["network"], row["bits"], *cells))
    if results["trained"]:
        lines += ["", "Trained networks:", ""]
        lines += table_head("file", "weights", "bits", "packed", "order-0 entropy", "entropy-coded / entropy")
        for row in results["trained"]:
            cells = [f"{row[v]:.4f}" for v in ("packed_bits_per_weight", "entropy_bits_per_weight")]
            ratio = f"{row['entropy_coded_over_entropy']:.4f}"
            bits = ", ".join(map(str, row["bits"]))
            lines.append(table_row(row["file"], f"{row['selected']:,}", bits, *cells, ratio))
    return "\n".join(lines) + "\n"


def table_head(first: str, *others: str) -> list[str]:
    return [table_row(first, *others), "|---" + "|---:" * len(others) + "|"]


def table_row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULTS, help="where results are written, and read by --markdown")
    parser.add_argument("--markdown", action="store_true", help="print tables of earlier results, measure nothing")
    parser.add_argument("--trained", type=Path, action="append", default=[], help="a trained network's file")
    parser.add_argument("--networks", nargs="*", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--bits", nargs="*", type=int, choices=BITS, default=list(BITS))
    options = parser.parse_args()
    if options.markdown:
        print(markdown(json.loads(options.json.read_text())), end="")
        return
    results: dict[str, Any] = {
        "environment": {"torch": torch.__version__, "python": platform.python_version(), "cpus": os.cpu_count()},
        "networks": [],
        "trained": [measure_trained(path) for path in options.trained],
    }
    for network in options.networks:
        with tempfile.TemporaryDirectory() as folder:
            results["networks"].append(measure(network, options.bits, Path(folder)))
        options.json.write_text(json.dumps(results, indent=2) + "\n")
        print(f"{network} done", flush=True)
    options.json.write_text(json.dumps(results, indent=2) + "\n")
    print(markdown(results), end="")


if __name__ == "__main__":
    main()
