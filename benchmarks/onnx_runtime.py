"""ONNX files against the float32 one in ONNX Runtime: ``python -m benchmarks.onnx_runtime [--json PATH]``.

Size, latency at batch 1 and 64 (one thread, medians of interleaved runs, as multiples of float32's speed), and, each in
a new process (Linux), load time and peak memory. ResNet-20 and a multilayer perceptron, rounded to grids at random.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch
from torch import Tensor, nn

from inq_lightning.export.onnx import export_onnx, session_options
from inq_lightning.grid import PowerOfTwoGrid
from inq_lightning.models import ResNetCIFAR
from inq_lightning.selection import select_parameters

warnings.filterwarnings("ignore")

MODES = ("exact", "low-memory", "fast")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the rows there")
    parser.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        print(json.dumps(load(*arguments.load)))
        return
    rows = []
    for name, network, example in networks():
        print(f"{name}\n{'':22s} size   difference   batch 1   batch 64   load ms   peak MiB")
        for row in measure(network, example):
            rows.append({"network": name} | row)
            print(
                f"{row['file']:>9s} {row['mode']:11s} {row['size']:5.3f}   {row['difference']:10.1e}   "
                f"{row['speed_1']:7.2f}   {row['speed_64']:8.2f}   {row['load_ms']:7.1f}   {row['peak_mib']:8.1f}",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def networks() -> list[tuple[str, nn.Module, Tensor]]:
    torch.manual_seed(0)
    hidden = [layer for _ in range(2) for layer in (nn.Linear(2048, 2048), nn.ReLU())]
    perceptron = nn.Sequential(nn.Linear(1024, 2048), nn.ReLU(), *hidden, nn.Linear(2048, 10))
    return [
        ("ResNet-20, 32x32 images", ResNetCIFAR(20).eval(), torch.randn(64, 3, 32, 32)),
        ("perceptron 1024-2048-2048-2048-10", perceptron.eval(), torch.randn(64, 1024)),
    ]


def measure(network: nn.Module, example: Tensor) -> list[dict[str, Any]]:
    weights = {name: p.detach().clone() for name, p in network.named_parameters()}
    linear = not any(isinstance(module, nn.Conv2d) for module in network.modules())
    with tempfile.TemporaryDirectory() as folder:
        floats = Path(folder) / "float32.onnx"
        torch.onnx.export(
            network, (example,), dynamo=True, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), verbose=False
        ).save(floats)
        cases = [("float32", "default", floats, 0.0)]
        for bits in (2, 3, 4, 5, 7):
            network.load_state_dict(weights, strict=False)
            quantize(network, bits)
            for speed in (False, True)[: 1 + (linear and bits <= 5)]:
                file = f"{bits} bits{' S' if speed else ''}"
                path = Path(folder) / f"{bits}-{speed}.onnx"
                difference = export_onnx(network, path, example, speed=speed)
                cases += [(file, mode, path, difference) for mode in (("fast",) if speed else MODES)]
        sessions = [session(path, mode) for _, mode, path, _ in cases]
        speeds = {batch: latencies(sessions, example[:batch]) for batch in (1, 64)}
        rows = []
        for i, (file, mode, path, difference) in enumerate(cases):
            loaded = in_process(path, mode)
            size = path.stat().st_size / floats.stat().st_size
            row = {"file": file, "mode": mode, "size": size, "difference": difference}
            rows.append(row | {f"speed_{batch}": speeds[batch][0] / speeds[batch][i] for batch in speeds} | loaded)
    return rows


def quantize(network: nn.Module, bits: int) -> None:
    with torch.no_grad():
        for selected in select_parameters(network, bits):
            p = selected.parameter
            p.copy_(PowerOfTwoGrid.from_weights(p, bits).quantize(p))


def session(path: str | Path, mode: str) -> Any:
    options = ort.SessionOptions() if mode == "default" else session_options(mode)  # type: ignore[arg-type]
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def latencies(sessions: list[Any], batch: Tensor) -> list[float]:
    """Median seconds of a run of each session, called in turn."""
    times: list[list[float]] = [[] for _ in sessions]
    inputs = batch.numpy()
    for _ in range(32 if len(batch) == 1 else 9):
        for run, seconds in zip(sessions, times, strict=True):
            start = time.perf_counter()
            run.run(None, {run.get_inputs()[0].name: inputs})
            seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds[2:]) for seconds in times]


def load(path: str, mode: str) -> dict[str, float]:
    """Median milliseconds to make a session, and by how many MiB the first one raises the process's peak memory."""
    before = peak()
    kept = session(path, mode)
    grown = peak() - before
    del kept
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        session(path, mode)
        seconds.append(time.perf_counter() - start)
    return {"load_ms": 1e3 * statistics.median(seconds), "peak_mib": grown / 1024}


def peak() -> int:
    """Peak resident KiB of this process alone; getrusage's has the parent's in it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def in_process(path: Path, mode: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.onnx_runtime", "--load", str(path), mode]
    result: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return result


if __name__ == "__main__":
    main()
