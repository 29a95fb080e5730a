"""Write docs/benchmarks.md from page.md and the JSON files of this folder: ``python -m benchmarks.page``.

The text is in page.md; the tables that it names are made here. Each JSON file is what one benchmark has measured:
``python -m benchmarks.sizes``, ``codec``, ``onnx_runtime``, ``latency`` and ``fuzz``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.sizes import ACCELERATORS
from benchmarks.template import fill
from inq_lightning.formats.accelerator import NUMBER_FORMATS

FOLDER = Path(__file__).parent
PAGE = FOLDER.parent / "docs" / "benchmarks.md"

Row = dict[str, Any]


def main() -> None:
    PAGE.write_text(page())


def page() -> str:
    sizes, codec, onnx, latency, fuzz = (read(name) for name in ("sizes", "codec", "onnx_runtime", "latency", "fuzz"))
    return fill(
        FOLDER / "page.md",
        promises=table(("promise", "target", "measured", "kept"), promises(sizes, codec, onnx, latency, fuzz)),
        sizes=size_table(sizes["networks"]),
        bits=bits_table(sizes["networks"]),
        trained_sizes=trained_size_table(sizes["trained"]),
        loading=load_table(sizes["networks"]),
        packed=packed_table(latency),
        onnx_trained=onnx_trained_table(onnx["trained"]),
        onnx_speed=onnx_speed_table(onnx["networks"]),
        codec=codec_table(codec),
    )


# What else the packed modules are compared with: keys of latency.json, heads of columns.
RIVALS = {
    "median_vs_default": "against the contiguous float32 network",
    "median_vs_onnxruntime": "against float32 in ONNX Runtime",
}


def read(name: str) -> Any:
    """What a benchmark has measured."""
    return json.loads((FOLDER / f"{name}.json").read_text())


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
    files, accepted = (sum(row.get(what, 0) for row in fuzz) for what in ("files", "accepted, blind"))
    slowest, most = (max(row[what] for row in fuzz) for what in ("slowest_seconds", "most_mib"))
    yield (
        "loading mutated files: no crash, no hang, no wrong weights, at most twice the declared memory",
        "100,000",
        f"{files:,}; {slowest:.2f} s, {most:.1f} MiB more at most; {accepted} accepted, with the saved weights",
        kept(files >= 100_000),
    )


def latency_promises(latency: list[Row]) -> Iterable[Sequence[object]]:
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


def size_table(networks: list[Row]) -> str:
    rows = []
    for network in networks:
        once = {name: size for row in network["rows"] for name, size in row["size"].items() if name in ACCELERATORS}
        for row in network["rows"]:
            size = row["size"] | {name: mb for name, mb in once.items() if row["bits"] <= NUMBER_FORMATS[name].max_bits}
            kinds = ("float32", "zip", "packed", "entropy_coded", "onnx", *ACCELERATORS)
            cells = [f"{size[kind] / 1e6:.2f}" if kind in size else "–" for kind in kinds]
            rows.append((network["network"], row["bits"], *cells))
    return table(("network", "bits", "float32", "zip", "packed", "entropy-coded", "ONNX", *ACCELERATORS), rows)


def bits_table(networks: list[Row]) -> str:
    heads = ("network", "bits", "packed", "order-0 entropy", "entropy-coded", "coded / entropy", "ONNX / float32")
    rows = [
        (
            network["network"],
            row["bits"],
            *(f"{row[f'{kind}_bits_per_weight']:.3f}" for kind in ("packed", "entropy", "entropy_coded")),
            f"{row['entropy_coded_over_entropy']:.4f}",
            f"{row['size']['onnx'] / network['onnx_float32']:.4f}",
        )
        for network in networks
        for row in network["rows"]
    ]
    return table(heads, rows)


def trained_size_table(trained: list[Row]) -> str:
    rows = [
        (
            row["network"],
            f"{row['selected']:,}",
            ", ".join(map(str, row["bits"])),
            *(f"{row[f'{kind}_bits_per_weight']:.3f}" for kind in ("packed", "entropy")),
            f"{row['entropy_coded_over_entropy']:.4f}",
        )
        for row in trained
    ]
    return table(("network", "weights", "bits", "packed", "order-0 entropy", "coded / entropy"), rows)


def load_table(networks: list[Row]) -> str:
    kinds = ("float32", "packed", "entropy_coded")
    ways = [(what, kind) for what in ("save", "load") for kind in kinds[1:]]
    heads = [
        *("network", "bits", *(f"{what} {kind.replace('_', '-')}" for what, kind in ways)),
        *(f"peak {kind.replace('_', '-')}" for kind in kinds),
    ]
    rows = [
        (
            network["network"],
            row["bits"],
            *(f"{row[f'{what}_seconds'][kind] / row[f'{what}_seconds']['float32']:.1f} ×" for what, kind in ways),
            *(f"{row['load_peak_memory'][kind]:.2f} ×" for kind in kinds),
        )
        for network in networks
        for row in network["rows"]
    ]
    return table(heads, rows)


def packed_table(latency: list[Row]) -> str:
    others = {key: head for key, head in RIVALS.items() if any(key in row for row in latency)}
    heads = ["network", "bits", "activations", "batch", "speed", *others.values(), "memory", "error"]
    rows = []
    for row in latency:
        speeds = [f"{row[key]:.2f} ×" if key in row else "–" for key in ("median", *others)]
        cells = [row[key] for key in ("network", "bits", "activations", "batch")]
        rows.append((*cells, *speeds, f"{row['memory']:.2f} ×", f"{row['error']:.0e}"))
    return table(heads, rows)


def onnx_trained_table(trained: list[Row]) -> str:
    heads = ("network", "weights", "bits", "file", "accuracy in torch", "same class", "largest difference of an output")
    rows = [
        (
            row["network"],
            f"{row['weights']:,}",
            row["bits"],
            f"{row['size']:.3f} ×",
            f"{row['accuracy']:.4f}",
            " / ".join(f"{same:,}" for same in row["same"].values()) + f" of {row['images']:,}",
            f"{row['difference']:.0e}",
        )
        for row in sorted(trained, key=lambda row: (row["weights"], row["bits"]))
    ]
    return table(heads, rows)


def onnx_speed_table(networks: list[Row]) -> str:
    rows = []
    for row in networks:
        base = next(r for r in networks if r["network"] == row["network"] and r["bits"] == 32)
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
    return table(("network", "bits", "mode", "file", "batch 1", "batch 64", "load", "memory", "difference"), rows)


def codec_table(codec: list[Row]) -> str:
    rows = []
    for bits in sorted({row["bits"] for row in codec}):
        cells: list[str] = []
        for coded in (False, True):
            row = next(r for r in codec if (r["bits"], r["entropy_coded"]) == (bits, coded))
            cells += [
                f"{row[way] * 1e8 / row['numel']:.1f} s ({row[way] / row['copy']:.0f} ×)" for way in ("pack", "unpack")
            ]
        rows.append((bits, *cells))
    return table(("bits", "pack", "unpack", "pack entropy-coded", "unpack entropy-coded"), rows)


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
