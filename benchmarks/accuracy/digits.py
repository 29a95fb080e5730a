"""Rounded activations and whole numbers on digits, trained: ``python -m benchmarks.accuracy.digits [--seeds 0 1 2]``.

For each seed one network is trained at full precision and quantized by `inq-train`'s defaults, with activations in
floats and rounded; what it finds goes to digits.json beside this file.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module

from inq_lightning.recipes.train import main as inq_train

KEPT = Path(__file__).parent / "digits.json"
RUNS = [(5, None), (5, 8), (4, None), (4, 8), (4, 4), (2, None), (2, 8)]  # bits of weights and of activations


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    """One run of `inq-train`; its report."""
    with initialize_config_module("inq_lightning.conf", version_base="1.3"):
        quiet = ["output=json", "logger=none", "trainer.accelerator=cpu", f"output_dir={folder}"]
        cfg = compose("train", [*quiet, *overrides])
    folder.mkdir()
    inq_train(cfg)
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    rows = []
    for seed in parser.parse_args().seeds:
        with tempfile.TemporaryDirectory() as folder:
            first = Path(folder) / "0"
            run(first, f"seed={seed}", "trainer.max_epochs=4")
            trained = first / "pretrain" / "last.ckpt"
            for number, (bits, activations) in enumerate(RUNS, 1):
                overrides = (f"seed={seed}", f"ckpt={trained}", f"inq.bits={bits}")
                rounded = () if activations is None else (f"inq.activation_bits={activations}",)
                report = run(Path(folder) / str(number), *overrides, *rounded)
                whole = report["integer"] and report["integer"]["metrics"]["test/acc"]
                row = {"seed": seed, "bits": bits, "activations": activations, "integer": whole}
                rows.append(row | {"before": report["before"]["test/acc"], "after": report["after"]["test/acc"]})
                print(rows[-1], flush=True)
    KEPT.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
