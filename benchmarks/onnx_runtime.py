"""ONNX files against float32 in ONNX Runtime and in torch: ``python -m benchmarks.onnx_runtime [--json PATH]``.

Size, latency at batch 1 and 64 (one thread; networks alternate in bursts, medians), and, each in a new process (Linux),
load time and peak memory; weights are random, rounded to grids. ``--trained NAME CHECKPOINT`` compares the predictions
of a trained network's files on the whole test set instead. Rows of other networks stay in the JSON;
docs/benchmarks.md is made of it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import onnxruntime as ort
import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor, nn

from benchmarks.sizes import export_float32, fresh_process, status
from inq_lightning import export_onnx, read_checkpoint, session_options
from inq_lightning.core.selection import select_parameters
from inq_lightning.grid import PowerOfTwoGrid
from inq_lightning.recipes.data import DigitsDataModule, NpzDataModule
from inq_lightning.recipes.models import ResNetCIFAR, SmallCNN

RESULTS = Path(__file__).with_suffix(".json")
BITS = (2, 3, 4, 5)
MODES = ("exact", "low-memory", "fast")
Rows = list[dict[str, Any]]


def perceptron() -> nn.Module:
    hidden = [layer for _ in range(2) for layer in (nn.Linear(2048, 2048), nn.ReLU())]
    return nn.Sequential(nn.Linear(1024, 2048), nn.ReLU(), *hidden, nn.Linear(2048, 10))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear 4096×4096": (lambda: nn.Linear(4096, 4096), (4096,)),
    "MLP 1024-2048-2048-2048-10": (perceptron, (1024,)),
    "ResNet-20, 32×32": (lambda: ResNetCIFAR(20), (3, 32, 32)),
}
CONVOLUTIONAL = ("ResNet-20, 32×32",)  # nothing that activations="int8" would change
# By the first part of a trained network's name, such as "ResNet-20, CIFAR-10".
TRAINED: dict[str, tuple[Callable[[], nn.Module], Callable[[str], LightningDataModule]]] = {
    "SmallCNN": (SmallCNN, lambda _: DigitsDataModule()),
    "ResNet-20": (lambda: ResNetCIFAR(20), lambda path: NpzDataModule(path)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULTS, help="the results, to which this run's are added")
    parser.add_argument("--networks", nargs="*", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--trained", nargs=2, action="append", default=[], metavar=("NAME", "CHECKPOINT"))
    parser.add_argument("--data", default="", help="the .npz that holds the test images of ResNet-20")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")  # of the exporter
    torch.set_num_threads(1)
    results: dict[str, Rows] = {"networks": [], "trained": []}
    if options.json.exists():
        results = json.loads(options.json.read_text())
    if options.trained:
        for name, checkpoint in options.trained:
            row = predictions(name, Path(checkpoint), options.data)
            print(row, flush=True)
            replace(results["trained"], [row], "network", "bits")
    else:
        for name in options.networks:
            replace(results["networks"], measure(name), "network")
    options.json.write_text(json.dumps(results, indent=1) + "\n")


def replace(rows: Rows, new: Rows, *keys: str) -> None:
    """Put new rows in the place of those that have the same keys."""
    measured = {tuple(row[key] for key in keys) for row in new}
    rows[:] = [row for row in rows if tuple(row[key] for key in keys) not in measured] + new


class Case(NamedTuple):
    """A file, and how it is run."""

    bits: int  # 32 for the float32 file
    mode: str
    activations: str
    path: Path
    difference: float


def measure(name: str) -> Rows:
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    network, example = make().eval(), torch.randn(64, *shape)
    weights = {name: p.detach().clone() for name, p in network.named_parameters()}
    with tempfile.TemporaryDirectory() as folder:
        floats = Path(folder) / "float32.onnx"
        export_float32(network, floats, shape)
        cases = [Case(32, "default", "float", floats, 0.0)]
        for bits in BITS:
            network.load_state_dict(weights, strict=False)
            quantize(network, bits)
            for activations in ("float", "int8")[: 1 + (name not in CONVOLUTIONAL)]:
                path = Path(folder) / f"{bits}-{activations}.onnx"
                difference = export_onnx(network, path, example, activations=activations)
                modes = ("fast",) if activations == "int8" else MODES
                cases += [Case(bits, mode, activations, path, difference) for mode in modes]
        print(f"{name}: exported, now timing", flush=True)
        sessions = [session(case.path, case.mode) for case in cases]
        speeds = {batch: latencies(network, sessions, example[:batch]) for batch in (1, 64)}
        loaded = [fresh_process(load, str(case.path), case.mode) for case in cases]
        print(f"{name}: timed", flush=True)
        return [
            {
                "network": name,
                "bits": case.bits,
                "mode": case.mode,
                "activations": case.activations,
                "size": case.path.stat().st_size / floats.stat().st_size,
                "difference": case.difference,
                **{f"batch_{batch}_ms": 1e3 * speeds[batch][i] for batch in speeds},
                **{f"torch_batch_{batch}_ms": 1e3 * speeds[batch][-1] for batch in speeds},
                **loaded[i],
            }
            for i, case in enumerate(cases)
        ]


def quantize(network: nn.Module, bits: int) -> None:
    with torch.no_grad():
        for selected in select_parameters(network, bits):
            p = selected.parameter
            p.copy_(PowerOfTwoGrid.from_weights(p, bits, exponent="mse").quantize(p))


def session(path: str | Path, mode: str) -> Any:
    options = ort.SessionOptions() if mode == "default" else session_options(mode)  # type: ignore[arg-type]
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(session: Any, batch: Tensor) -> Any:
    return session.run(None, {session.get_inputs()[0].name: batch.numpy()})[0]


@torch.inference_mode()
def latencies(network: nn.Module, sessions: list[Any], batch: Tensor) -> list[float]:
    """Median seconds of a run of each session, and at last of torch; the first of each burst warms the cache."""
    calls: list[Callable[[], object]] = [lambda s=s: run(s, batch) for s in sessions]  # type: ignore[misc]
    calls.append(lambda: network(batch))
    rounds, burst = (6, 8) if len(batch) == 1 else (3, 4)
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, seconds in zip(calls, times, strict=True):
            for repetition in range(burst):
                start = time.perf_counter()
                call()
                if repetition:
                    seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in times]


def load(path: str, mode: str) -> dict[str, float]:
    """Median milliseconds to make a session, and by how many MiB the first one raises the process's peak memory."""
    tiny = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 21]> g (float[1] x) => (float[1] y) {y = Neg(x)}'
    )
    ort.InferenceSession(tiny.SerializeToString())  # what the library takes once is not the file's
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    kept = session(path, mode)
    grown = status("VmHWM") - before
    del kept
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        session(path, mode)
        seconds.append(time.perf_counter() - start)
    return {"load_ms": 1e3 * statistics.median(seconds), "peak_mib": grown / 2**20}


@torch.no_grad()
def predictions(name: str, checkpoint: Path, data: str) -> dict[str, Any]:
    """Size of a trained network's file, and how many of all test images it classifies as torch does."""
    make, make_data = TRAINED[name.split(",")[0]]
    network, datamodule = make().eval(), make_data(data)
    saved = read_checkpoint(checkpoint)
    network.load_state_dict({key.removeprefix("net."): value for key, value in saved.state_dict.items()})
    layers = [x._replace(name=x.name.removeprefix("net.")) for x in saved.layers or []]
    datamodule.prepare_data()
    datamodule.setup("test")
    images, labels = (torch.cat(parts) for parts in zip(*datamodule.test_dataloader(), strict=True))
    expected = torch.cat([network(batch) for batch in torch.split(images, 256)]).argmax(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        float32 = export_float32(network, path, tuple(images.shape[1:]))
        difference = export_onnx(network, path, images[:1], layers=layers)
        same = {}
        for mode in MODES:
            made = session(path, mode)
            found = torch.cat([torch.from_numpy(run(made, batch)) for batch in torch.split(images, 256)]).argmax(1)
            same[mode] = int((found == expected).sum())
        return {
            "network": name,
            "bits": layers[0].bits,
            "weights": sum(saved.state_dict[f"net.{layer.name}"].numel() for layer in layers),
            "images": len(images),
            "accuracy": float((expected == labels).float().mean()),
            "same": same,
            "difference": difference,
            "size": path.stat().st_size / float32,
        }


if __name__ == "__main__":
    main()
