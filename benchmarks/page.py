"""Write docs/benchmarks.md from the JSON files of this folder: ``python -m benchmarks.page``.

Each JSON file is what one benchmark has measured: ``python -m benchmarks.sizes``, ``codec``, ``onnx_runtime``,
``latency`` and ``fuzz``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.sizes import ACCELERATORS
from inq_lightning.formats.accelerator import NUMBER_FORMATS

FOLDER = Path(__file__).parent
PAGE = FOLDER.parent / "docs" / "benchmarks.md"

Row = dict[str, Any]

# What is not a figure: sentences, and the test that holds each.
TESTS = {
    "Round trip, bit for bit, of every type of layer at 2 to 8 bits, from a trained checkpoint": (
        "test_every_layer_type_comes_back_from_a_trained_checkpoint"
    ),
    "Checkpoint → artifact → a process without Lightning: the same class for every test image": (
        "test_an_exported_checkpoint_predicts_the_same_in_a_fresh_process_without_lightning"
    ),
    "A network that is not fully quantized is refused by name": (
        "test_a_network_that_is_not_fully_quantized_is_refused_unless_asked_for"
    ),
    "Reading an artifact takes at most twice the memory of its tensors": (
        "test_reading_takes_less_than_twice_the_memory_of_the_tensors"
    ),
    "ONNX weights are bit-identical to those of the float32 file, batch norm folded or not": (
        "test_weights_in_the_file_are_bit_identical_to_those_of_the_float_file"
    ),
    "MXFP4, MXFP6, FP8 and int8 files hold every grid bit for bit": "test_files_hold_every_grid_bit_for_bit",
    "torchao's tensors give every grid back bit for bit": ("test_torchao_gives_every_grid_back_bit_for_bit_or_refuses"),
}


def main() -> None:
    PAGE.write_text(page())


def page() -> str:
    sizes, codec, onnx, latency, fuzz = (read(name) for name in ("sizes", "codec", "onnx_runtime", "latency", "fuzz"))
    sections = [
        INTRODUCTION,
        "## Promised and measured",
        table(("promise", "target", "measured", "kept"), promises(sizes, codec, onnx, latency, fuzz)),
        "What cannot be a figure is a test:",
        table(("promise", "test"), ((what, f"`{test}`") for what, test in TESTS.items())),
        *size_tables(sizes),
        *load_tables(sizes),
        *packed_tables(latency),
        *onnx_tables(onnx),
        *codec_tables(codec),
        CLOSING,
    ]
    return "\n\n".join(section.strip() for section in sections) + "\n"


INTRODUCTION = """
<!-- Written by python -m benchmarks.page; change benchmarks/page.py, not this file. -->

# Sizes and speed

What the files of a quantized network take, what loading and running them costs, and what was promised. Measured on two
cores of a server CPU with AVX-512 VNNI instructions, with torch 2.13 and ONNX Runtime 1.32; times are medians, and
ratios travel better than times. `python -m benchmarks.page` makes this page from the JSON files that the benchmarks
leave in `benchmarks/`.
"""

CLOSING = """
## Measure again

```bash
python -m benchmarks.sizes         # all networks and bits: an hour; --networks and --bits choose
python -m benchmarks.codec
python -m benchmarks.onnx_runtime  # on a quiet machine
python -m benchmarks.latency --json benchmarks/latency.json
python -m benchmarks.fuzz
python -m benchmarks.page
```
"""


# What else the packed modules are compared with: keys of latency.json, heads of columns.
RIVALS = {
    "median_vs_default": "against the contiguous float32 network",
    "median_vs_onnxruntime": "against float32 in ONNX Runtime",
}
NOT_YET = "Not measured yet."


def read(name: str) -> Any:
    """What a benchmark has measured; None if it has not."""
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


# ---- promises --------------------------------------------------------------------------------------------------------


def promises(sizes: Any, codec: Any, onnx: Any, latency: Any, fuzz: Any) -> Iterable[Sequence[object]]:
    rows = [row for network in sizes["networks"] for row in network["rows"]]
    over = max(row["packed_bits_per_weight"] - row["bits"] for row in rows)
    yield "packed artifact, all metadata included", "≤ b + 0.05 bits a weight", f"≤ b + {over:.3f}", kept(over <= 0.05)
    limit = max(row["entropy_coded_over_limit"] for row in rows)
    yield (
        "entropy-coded artifact",
        "≤ 1.03 × entropy + 1 KiB a layer",
        f"{limit:.3f} of that at most",
        kept(limit <= 1),
    )
    if codec:
        packing = [row for row in codec if not row["entropy_coded"]]
        slowest = max(row[way] for row in packing for way in ("pack", "unpack"))
        copies = max(row[way] / row["copy"] for row in packing for way in ("pack", "unpack"))
        yield (
            f"packing or unpacking {packing[0]['numel'] // 10**6} M weights",
            "seconds",
            f"{slowest:.1f} s at most; {copies:.0f} times a copy of the codes",
            kept(slowest < 10),
        )
    for bits, target in ((5, 0.27), (4, 0.14), (3, 0.14), (2, 0.08)):
        shares = [
            row["size"]["onnx"] / network["onnx_float32"]
            for network in sizes["networks"]
            for row in network["rows"]
            if row["bits"] == bits
        ] + [row["size"] for row in onnx["trained"] if row["bits"] == bits]
        yield (
            f"ONNX file at {bits} bits, against its float32 file",
            f"≤ {target} ×",
            f"{between(shares, '.3f')} ×",
            kept(max(shares) <= target),
        )
    for network in {row["network"]: None for row in onnx["trained"]}:
        trained = [row for row in onnx["trained"] if row["network"] == network]
        different = sum(row["images"] - same for row in trained for same in row["same"].values())
        images = trained[0]["images"]
        yield (
            f"{network}, trained: predictions in ONNX Runtime on all {images:,} test images",
            "those of torch",
            f"{different or 'none'} differ ({bit_list(trained)} bits, {len(trained[0]['same'])} session modes each)",
            kept(different == 0),
        )
    yield from latency_promises(latency)
    if fuzz:
        files, accepted = (sum(row.get(what, 0) for row in fuzz) for what in ("files", "accepted, blind"))
        slowest, most = (max(row[what] for row in fuzz) for what in ("slowest_seconds", "most_mib"))
        yield (
            "loading mutated files: no crash, no hang, no wrong weights, at most twice the declared memory",
            "100,000",
            f"{files:,}; {slowest:.2f} s, {most:.1f} MiB more at most; {accepted} accepted, with the saved weights",
            kept(files >= 100_000),
        )


def latency_promises(latency: list[Row] | None) -> Iterable[Sequence[object]]:
    if not latency:
        yield "packed inference", "", "not measured", "–"
        return
    for activations, most_bits, target in (("float", 4, 2.0), ("int8", 5, 3.5)):
        rows = [
            row
            for row in latency
            if row["network"].startswith("Linear")
            and row["batch"] == 1
            and row["activations"] == activations
            and row["bits"] <= most_bits
        ]
        if not rows:
            continue
        speeds, error = [row["median"] for row in rows], max(row["error"] for row in rows)
        yield (
            f"4096² Linear, batch 1, {activations} activations, ≤ {most_bits} bits, against float32 torch",
            f"≥ {target} × as fast" + (", error < 1e-6" if activations == "float" else ""),
            f"{between(speeds, '.2f')} ×; error {error:.0e}",
            kept(min(speeds) >= target and (activations != "float" or error < 1e-6)),
        )
    for network in dict.fromkeys(row["network"] for row in latency if not row["network"].startswith("Linear")):
        for activations in ("float", "int8"):
            rows = [
                row
                for row in latency
                if (row["network"], row["activations"], row["batch"]) == (network, activations, 1)
            ]
            if rows:
                # Where the memory format is another one than the network comes in, the faster float32 counts.
                speeds = [min(row["median"], row.get("median_vs_default", row["median"])) for row in rows]
                memory = max(row["memory"] for row in rows)
                yield (
                    f"{network}, batch 1, {activations} activations, against float32 torch",
                    "≥ 1 × as fast; weights in ≤ 0.3 × the memory",
                    f"{between(speeds, '.2f')} ×; {memory:.2f} ×",
                    kept(min(speeds) >= 1 and memory <= 0.3),
                )


def kept(holds: bool) -> str:
    return "yes" if holds else "**no**"


# ---- tables ----------------------------------------------------------------------------------------------------------


def size_tables(sizes: Any) -> Iterable[str]:
    yield "## Files"
    yield """
Random weights of the published shapes, rounded to grids; MB are 10⁶ bytes, of the whole file. `zip` is the safetensors
file of the quantized network, in float32, compressed; of more than 50 M weights, estimated from an eighth of the file.
All networks fit into an ONNX file, which is of 2 GB at most.
"""
    rows = []
    for network in sizes["networks"]:
        once = {name: size for row in network["rows"] for name, size in row["size"].items() if name in ACCELERATORS}
        for row in network["rows"]:
            size = row["size"] | {name: mb for name, mb in once.items() if row["bits"] <= NUMBER_FORMATS[name].max_bits}
            kinds = ("float32", "zip", "packed", "entropy_coded", "onnx", *ACCELERATORS)
            cells = [f"{size[kind] / 1e6:.2f}" if kind in size else "–" for kind in kinds]
            rows.append((network["network"], row["bits"], *cells))
    heads = ("network", "bits", "float32", "zip", "packed", "entropy-coded", "ONNX", *ACCELERATORS)
    yield table(heads, rows)
    yield "Bits a quantized weight, all metadata of the file included, and the ONNX file against the float32 one:"
    rows = [
        (
            network["network"],
            row["bits"],
            *(f"{row[f'{kind}_bits_per_weight']:.3f}" for kind in ("packed", "entropy", "entropy_coded")),
            f"{row['entropy_coded_over_entropy']:.4f}",
            f"{row['size']['onnx'] / network['onnx_float32']:.4f}",
        )
        for network in sizes["networks"]
        for row in network["rows"]
    ]
    yield table(
        ("network", "bits", "packed", "order-0 entropy", "entropy-coded", "coded / entropy", "ONNX / float32"), rows
    )
    if sizes["trained"]:
        yield """
Trained networks, codes only. Of few weights, the table of frequencies that precedes each layer's code weighs more
(four bytes for each code, so within the promised KiB a layer):
"""
        yield table(
            ("network", "weights", "bits", "packed", "order-0 entropy", "coded / entropy"),
            (
                (
                    row["network"],
                    f"{row['selected']:,}",
                    ", ".join(map(str, row["bits"])),
                    *(f"{row[f'{kind}_bits_per_weight']:.3f}" for kind in ("packed", "entropy")),
                    f"{row['entropy_coded_over_entropy']:.4f}",
                )
                for row in sizes["trained"]
            ),
        )


def load_tables(sizes: Any) -> Iterable[str]:
    yield "## Saving and loading"
    yield """
Times as multiples of those of a float32 file, on a busy machine: a file of float32 loads faster than a packed one,
whose weights have to be decoded, so packed files save disk and transfer. The peak of memory while a network loads is
given against its float32 tensors, and includes the network itself (1 ×); float32 files are mapped into memory and
copied, which counts the mapped file as well.
"""
    kinds = ("float32", "packed", "entropy_coded")
    yield table(
        (
            "network",
            "bits",
            *(f"{what} {kind.replace('_', '-')}" for what in ("save", "load") for kind in kinds[1:]),
            *(f"peak {kind.replace('_', '-')}" for kind in kinds),
        ),
        (
            (
                network["network"],
                row["bits"],
                *(
                    f"{row[f'{what}_seconds'][kind] / row[f'{what}_seconds']['float32']:.1f} ×"
                    for what in ("save", "load")
                    for kind in kinds[1:]
                ),
                *(f"{row['load_peak_memory'][kind]:.2f} ×" for kind in kinds),
            )
            for network in sizes["networks"]
            for row in network["rows"]
        ),
    )


def packed_tables(latency: list[Row] | None) -> Iterable[str]:
    yield "## Packed modules"
    if not latency:
        yield NOT_YET
        return
    yield """
[`to_packed`](how-to/export.md#packed-modules) against the float32 network in torch, one thread, in the same memory
format: how many times as fast, so above 1 the packed one is faster. Memory is that of weights, error the largest
against the largest output. Each row is the middle one of three runs of `python -m benchmarks.latency --calls 60`.
"""
    others = {key: head for key, head in RIVALS.items() if any(key in row for row in latency)}
    heads = ["network", "bits", "activations", "batch", "speed", *others.values(), "memory", "error"]
    rows = []
    for row in latency:
        speeds = [f"{row[key]:.2f} ×" if key in row else "–" for key in ("median", *others)]
        cells = [row[key] for key in ("network", "bits", "activations", "batch")]
        rows.append((*cells, *speeds, f"{row['memory']:.2f} ×", f"{row['error']:.0e}"))
    yield table(heads, rows)
    if any(verdict != "yes" for *_, verdict in latency_promises(latency)):
        yield """
Convolutions, and linear layers of fewer than 2^17 weights, decode their weights each time they run and then compute as
float32 does; in somewhat larger ones, rounding the activations takes the time that their products save. At batch 1 such
networks gain memory, not speed. In ONNX Runtime, a multilayer perceptron gains speed with `activations="int8"`, see
below.
"""


def onnx_tables(onnx: Any) -> Iterable[str]:
    yield "## ONNX Runtime"
    yield """
Trained networks: the file against the float32 one, and how many of all test images get the class that torch gives
them, in the session modes `exact`, `low-memory` and `fast`. Accuracies tell which networks were
compared, not what INQ keeps: for that, ResNet-20 was trained and quantized for too short a time.
"""
    yield table(
        ("network", "weights", "bits", "file", "accuracy in torch", "same class", "largest difference of an output"),
        (
            (
                row["network"],
                f"{row['weights']:,}",
                row["bits"],
                f"{row['size']:.3f} ×",
                f"{row['accuracy']:.4f}",
                " / ".join(f"{same:,}" for same in row["same"].values()) + f" of {row['images']:,}",
                f"{row['difference']:.0e}",
            )
            for row in sorted(onnx["trained"], key=lambda row: (row["weights"], row["bits"]))
        ),
    )
    yield """
The graph itself takes some kilobytes, a part of the file that counts only where a network is as small as SmallCNN.

Speed, one thread, as multiples of float32's in ONNX Runtime; in brackets against float32 torch. `A8` is
`activations="int8"` (MatMulNBits); `exact` and `fast` decode the weights when the session is made, `low-memory` at each
run. Loading is making a session, as a multiple of float32's time, memory by how much that raises the peak of the
process.
"""
    rows = []
    for row in onnx["networks"]:
        base = next(r for r in onnx["networks"] if r["network"] == row["network"] and r["bits"] == 32)
        speeds = [
            f"{base[key] / row[key]:.2f} × ({row[f'torch_{key}'] / row[key]:.2f} ×)"
            for key in ("batch_1_ms", "batch_64_ms")
        ]
        name = "float32" if row["bits"] == 32 else f"{row['bits']}{' A8' if row['activations'] == 'int8' else ''}"
        difference = f"{row['difference']:.0e}" if row["bits"] != 32 else "–"
        load = f"{row['load_ms'] / base['load_ms']:.2f} ×"
        rows.append(
            (row["network"], name, row["mode"], f"{row['size']:.3f} ×", *speeds, load,
             f"{row['peak_mib']:.0f} MiB", difference)
        )  # fmt: skip
    yield table(("network", "bits", "mode", "file", "batch 1", "batch 64", "load", "memory", "difference"), rows)


def codec_tables(codec: list[Row] | None) -> Iterable[str]:
    yield "## Codec"
    if not codec:
        yield NOT_YET
        return
    yield """
Seconds for 100 M codes, one thread, and as multiples of a copy of the codes (one byte each) in memory; entropy coding
was measured on 10 M codes, all equally frequent.
"""
    rows = []
    for bits in sorted({row["bits"] for row in codec}):
        cells: list[str] = []
        for coded in (False, True):
            row = next(r for r in codec if (r["bits"], r["entropy_coded"]) == (bits, coded))
            cells += [
                f"{row[way] * 1e8 / row['numel']:.1f} s ({row[way] / row['copy']:.0f} ×)" for way in ("pack", "unpack")
            ]
        rows.append((bits, *cells))
    yield table(("bits", "pack", "unpack", "pack entropy-coded", "unpack entropy-coded"), rows)


def between(values: Sequence[float], form: str) -> str:
    low, high = (format(end, form) for end in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def bit_list(rows: Sequence[Row]) -> str:
    return ", ".join(str(bits) for bits in sorted({row["bits"] for row in rows}))


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown; columns of cells that begin with digits, or have none, are aligned to the right."""
    filled = [[str(cell) for cell in row] for row in rows]
    numeric = [all(cell[:1].isdigit() or cell == "–" for cell in column) for column in zip(*filled, strict=True)]
    numeric = numeric or [False] * len(heads)
    lines = [heads, ["---:" if right else "---" for right in numeric], *filled]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
