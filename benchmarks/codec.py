"""What packing costs, against copying the codes in memory: ``python -m benchmarks.codec``.

100 M codes of one byte each; median of interleaved runs in one process.
"""

from __future__ import annotations

import torch

from benchmarks.overhead import medians
from inq_lightning.export.codec import pack, pack_entropy, unpack, unpack_entropy

NUMEL = 100_000_000


def main() -> None:
    print(f"{NUMEL:,} codes; {torch.get_num_threads()} threads; times as multiples of a memory copy\n")
    print("bits      copy    pack   unpack")
    for bits in range(2, 9):
        copy, there, back = packing(bits, NUMEL)
        print(f"{bits:4d} {copy:7.3f} s {there / copy:6.1f}x {back / copy:7.1f}x", flush=True)
    copy, there, back = entropy_coding(5, NUMEL // 10)
    print(f"\n5 bits entropy-coded, {NUMEL // 10:,} codes: {there / copy:.0f}x there, {back / copy:.0f}x back")


def packing(bits: int, numel: int) -> list[float]:
    """Seconds of a copy, of pack and of unpack."""
    codes = some_codes(bits, numel)
    target, packed = torch.empty_like(codes), pack(codes, bits)
    return medians(5, lambda: target.copy_(codes), lambda: pack(codes, bits), lambda: unpack(packed, bits, numel))


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
