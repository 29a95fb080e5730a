"""What packing costs, against copying the codes in memory: ``python -m benchmarks.codec [--json PATH]``.

100 M codes of one byte each, 10 M for the entropy-coded form; one thread, medians of interleaved runs in one process.
docs/benchmarks.md is made of the JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from benchmarks.overhead import medians
from inq_lightning.formats.codec import pack, pack_entropy, unpack, unpack_entropy

RESULTS = Path(__file__).with_suffix(".json")
NUMEL = 100_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--numel", type=int, default=NUMEL)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for bits in range(2, 9):
        for coded, numel in ((False, options.numel), (True, options.numel // 10)):
            copy, there, back = (entropy_coding if coded else packing)(bits, numel)
            rows.append(
                {"bits": bits, "entropy_coded": coded, "numel": numel, "copy": copy, "pack": there, "unpack": back}
            )
            print(
                f"{numel:,} codes of {bits} bits{' entropy-coded' * coded}: packed in {there:.2f} s "
                f"({there / copy:.0f} copies), unpacked in {back:.2f} s ({back / copy:.0f} copies)",
                flush=True,
            )
    options.json.write_text(json.dumps(rows, indent=1) + "\n")


def packing(bits: int, numel: int) -> list[float]:
    """Seconds of a copy, of pack and of unpack."""
    codes = some_codes(bits, numel)
    target, packed = torch.empty_like(codes), pack(codes, bits)
    return medians(3, lambda: target.copy_(codes), lambda: pack(codes, bits), lambda: unpack(packed, bits, numel))


def entropy_coding(bits: int, numel: int) -> list[float]:
    """The same of the entropy-coded form."""
    codes = some_codes(bits, numel)
    target, packed = torch.empty_like(codes), pack_entropy(codes, bits)
    there, back = lambda: pack_entropy(codes, bits), lambda: unpack_entropy(packed, bits, numel)
    return medians(3, lambda: target.copy_(codes), there, back)


def some_codes(bits: int, numel: int) -> torch.Tensor:
    largest = 1 << bits - 2
    return torch.randint(-largest, largest + 1, (numel,), dtype=torch.int8)


if __name__ == "__main__":
    main()
