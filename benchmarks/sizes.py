"""How small networks get, and what packing and loading them costs: ``python -m benchmarks.sizes [--json PATH]``.

Random weights of the published shapes, rounded to grids of 2 to 5 bits, as every file format of the package. Sizes do
not depend on training, except for the entropy: ``--trained PATH`` adds what a checkpoint or safetensors file has.
Rows of networks and bits that are not measured this time stay in the JSON; docs/benchmarks.md is made of it.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.networks import NETWORKS, build, randomize
from inq_lightning import PowerOfTwoGrid, export_onnx, fit_grid, load_packed, save_accelerator, save_packed
from inq_lightning.core.layer import Layer
from inq_lightning.formats.codec import pack, pack_entropy
from inq_lightning.grid.recognize import encode

RESULTS = Path(__file__).with_suffix(".json")
BITS = (2, 3, 4, 5)
ACCELERATORS = {"mxfp4": 4, "fp8": 5}  # written at one bit width only: their files have the same size at all
LARGE = 50_000_000  # weights from which on times are of one run, not medians of three, and zip is estimated


@torch.no_grad()
def quantize(model: nn.Module, originals: Mapping[str, Tensor], bits: int) -> list[Layer]:
    layers = []
    for name, weight in originals.items():
        # By the largest weight, two bits would make nearly all of them zero. All are alike here: a sample will do.
        grid = PowerOfTwoGrid.from_weights(weight.flatten()[: 1 << 16], bits, exponent="mse")
        parts = (torch.split(tensor.view(-1), 1 << 16) for tensor in (model.get_parameter(name), weight))
        for target, part in zip(*parts, strict=True):
            target.copy_(grid.quantize(part))
        layers.append(Layer(name, tuple(weight.shape), bits, grid))
    return layers


def entropy(codes: Tensor) -> float:
    """Order-0 entropy of codes, in bits for all of them together."""
    counts = torch.zeros(256, dtype=torch.int64)
    for chunk in torch.split(codes.flatten(), 1 << 20):
        counts += torch.bincount(chunk.int() + 128, minlength=256)
    counts = counts[counts > 0].double()
    return float((counts * (counts.sum() / counts).log2()).sum())


def measure(network: str, bits_to_measure: list[int], folder: Path) -> dict[str, Any]:
    model = build(network)
    randomize(model)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == NETWORKS[network].parameters, f"{network} has {parameters} parameters"
    names = [name for name, p in model.named_parameters() if p.dim() > 1 and name not in ("class_token", "positions")]
    originals = {name: model.get_parameter(name).detach().clone() for name in names}
    onnx = export_float32(model, folder / "float32.onnx", NETWORKS[network].input)
    (folder / "float32.onnx").unlink()
    rows = [measure_bits(network, model, originals, bits, folder) for bits in bits_to_measure]
    return {
        "network": network,
        "parameters": parameters,
        "selected": sum(w.numel() for w in originals.values()),
        "layers": len(names),
        "onnx_float32": onnx,
        "rows": rows,
    }


def export_float32(model: nn.Module, path: Path, shape: tuple[int, ...]) -> int:
    """The size of the network's ONNX file in float32."""
    program = torch.onnx.export(
        model,
        (torch.randn(2, *shape),),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
        verbose=False,
    )
    assert program is not None
    program.save(path)
    return path.stat().st_size


def measure_bits(
    network: str, model: nn.Module, originals: Mapping[str, Tensor], bits: int, folder: Path
) -> dict[str, Any]:
    layers = quantize(model, originals, bits)
    state = model.state_dict()
    selected = sum(w.numel() for w in originals.values())
    float32 = sum(t.nbytes for t in state.values())
    rest = sum(t.nbytes for name, t in state.items() if name not in originals)
    order0 = sum(entropy(encode(x.grid, model.get_parameter(x.name))) for x in layers)
    paths = {kind: folder / f"{kind}.safetensors" for kind in ("float32", "packed", "entropy_coded")}
    save: dict[str, Callable[[], object]] = {
        "float32": lambda: save_file(state, paths["float32"]),
        "packed": lambda: save_packed(model, paths["packed"], layers=layers),
        "entropy_coded": lambda: save_packed(model, paths["entropy_coded"], layers=layers, entropy_coded=True),
    }
    rounds = 1 if selected > LARGE else 3
    save_seconds = seconds(rounds, save)
    loaded = {kind: fresh_process(load, network, str(path), kind, rounds) for kind, path in paths.items()}
    size = {kind: path.stat().st_size for kind, path in paths.items()}
    size["zip"] = zipped(paths["float32"], 8 if selected > LARGE else 1)
    export_onnx(model, folder / "onnx", torch.randn(1, *NETWORKS[network].input), layers=layers)
    size["onnx"] = (folder / "onnx").stat().st_size
    for name, once in ACCELERATORS.items():
        if bits == once:
            save_accelerator(model, folder / name, name, layers=layers)  # type: ignore[arg-type]
            size[name] = (folder / name).stat().st_size
    return {
        "bits": bits,
        "size": size,
        "packed_bits_per_weight": 8 * (size["packed"] - rest) / selected,
        "entropy_bits_per_weight": order0 / selected,
        "entropy_coded_bits_per_weight": 8 * (size["entropy_coded"] - rest) / selected,
        "entropy_coded_over_entropy": 8 * (size["entropy_coded"] - rest) / order0,
        "entropy_coded_over_limit": (size["entropy_coded"] - rest) / (1.03 * order0 / 8 + 1024 * len(layers)),
        "save_seconds": save_seconds,
        "load_seconds": {kind: spent for kind, (spent, _) in loaded.items()},
        "load_peak_memory": {kind: peak / float32 for kind, (_, peak) in loaded.items()},
    }


def seconds(rounds: int, functions: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each function, called in turn."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(spent) for name, spent in times.items()}


def zipped(path: Path, stride: int) -> int:
    """Size of a file in a zip archive, estimated from each ``stride``-th MiB of it."""
    deflate, size = zlib.compressobj(wbits=-15), 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            size += len(deflate.compress(chunk))
            file.seek((stride - 1) << 20, os.SEEK_CUR)
    return stride * (size + len(deflate.flush()))


def fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process that has imported what this one has, and done nothing else."""
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        return pool.apply(function, arguments)


def load(network: str, path: str, kind: str, rounds: int) -> tuple[float, int]:
    """Median seconds of loading a file, and bytes by which resident memory grows meanwhile; Linux only.

    The growth is the largest of the first round, the network's own memory included.
    """
    with tempfile.TemporaryDirectory() as folder:  # what libraries take once is not the file's
        small, tiny = nn.Linear(8, 8), str(Path(folder) / "tiny")
        nn.init.ones_(small.weight)
        if kind == "float32":
            save_file(small.state_dict(), tiny)
        else:
            save_packed(small, tiny, entropy_coded=kind == "entropy_coded")
        load_into(small, tiny, kind)
    model = build(network)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew; getrusage's outlives even exec
    before = status("VmRSS")
    load_into(model, path, kind)
    grown = status("VmHWM") - before
    return seconds(rounds, {kind: lambda: load_into(model, path, kind)})[kind], grown


def load_into(model: nn.Module, path: str, kind: str) -> None:
    if kind == "float32":
        model.load_state_dict(load_file(path))
    else:
        load_packed(path, model)


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
            codes = encode(grid, weight)
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


def merge(results: dict[str, Any], new: dict[str, Any]) -> None:
    """Put the rows of a network into the results; those of other bits stay."""
    kept = [row for n in results["networks"] if n["network"] == new["network"] for row in n["rows"]]
    measured = {row["bits"] for row in new["rows"]}
    new["rows"] = sorted([r for r in kept if r["bits"] not in measured] + new["rows"], key=lambda row: row["bits"])
    networks = {n["network"]: n for n in [*results["networks"], new]}
    results["networks"] = [networks[name] for name in NETWORKS if name in networks]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULTS, help="the results, to which this run's are added")
    parser.add_argument("--trained", nargs=2, action="append", default=[], metavar=("NAME", "PATH"))
    parser.add_argument("--networks", nargs="*", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--bits", nargs="*", type=int, choices=BITS, default=list(BITS))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")  # of the exporter
    results = json.loads(options.json.read_text()) if options.json.exists() else {"networks": [], "trained": []}
    environment = {"torch": torch.__version__, "python": platform.python_version(), "cpus": os.cpu_count()}
    results = {"environment": environment, "networks": results["networks"], "trained": results["trained"]}
    for name, path in options.trained:
        row = {"network": name} | measure_trained(Path(path))
        results["trained"] = [r for r in results["trained"] if r["network"] != name] + [row]
    for network in options.networks:
        with tempfile.TemporaryDirectory() as folder:
            merge(results, measure(network, options.bits, Path(folder)))
        print(f"{network}: {', '.join(map(str, options.bits))} bits measured", flush=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
