"""The loader against 100,000 mutated files: ``python -m benchmarks.fuzz [--json PATH]``; Linux only.

What is asserted of each file is in tests/formats/test_packed_fuzz.py; docs/benchmarks.md is made of the JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from tests.test_artifact_fuzz import fuzz

RESULTS = Path(__file__).with_suffix(".json")
SEEDS = (1, 2, 3, 4)
FILES = 25_000  # of each seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULTS, help="the results; those of other seeds stay")
    parser.add_argument("--seeds", nargs="*", type=int, choices=SEEDS, default=SEEDS)
    options = parser.parse_args()
    rows = json.loads(options.json.read_text()) if options.json.exists() else []
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            row = {"seed": seed} | fuzz(FILES, Path(folder), seed)
        print(row, flush=True)
        rows = sorted([r for r in rows if r["seed"] != seed] + [row], key=lambda r: r["seed"])
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
