"""Mutated artifacts: each gives the saved weights, bit for bit, or the one error, in bounded memory and time."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import struct
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from support import same_bits
from torch import Tensor, nn

from inq_lightning import PowerOfTwoGrid, load_packed, save_packed
from inq_lightning.formats.packed import _KEY, ArtifactError, _checksum, read_packed

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="measures memory through /proc")

NUMBERS = [-1, 0, 1, 2, 3, 7, 8, 9, 64, 129, 1 << 31, 1 << 40, (1 << 63) - 1, 1 << 64, 10**30, 0.5, True, None, "x", []]
SLACK = 16 << 20  # bytes beside twice what a file declares: headers as Python objects, caches of libraries


def network(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(6, 20), nn.BatchNorm1d(20), nn.Linear(20, 20), nn.Linear(20, 3), nn.Linear(20, 3))
    net[4].weight = net[3].weight  # tied
    for bits, layer in ((5, net[0]), (3, net[2]), (2, net[3])):
        layer.weight.data.copy_(PowerOfTwoGrid.from_weights(layer.weight.data, bits).quantize(layer.weight.data))
    return net


def resident(field: str) -> int:
    """Bytes of memory of this process: VmRSS now, VmHWM at most so far."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) * 1024


def blind(data: bytes, others: list[bytes], chance: random.Random) -> bytes:
    """Bits flipped, bytes cut off, repeated, exchanged, taken from other files: whoever does it knows nothing."""
    mutated = bytearray(data)
    header = 8 + struct.unpack("<Q", data[:8])[0]
    for _ in range(chance.choice([1, 1, 2, 5])):
        kind = chance.choice(["flip", "flip header", "length", "cut", "delete", "insert", "splice", "zero", "digit"])
        at = chance.randrange(len(mutated) or 1)
        span = min(chance.choice([1, 1, 4, 16, 200]), len(mutated))
        if kind == "flip" and mutated:
            mutated[at] ^= 1 << chance.randrange(8)
        elif kind == "flip header":
            at = chance.randrange(min(header, len(mutated)) or 1)
            mutated[at : at + 1] = bytes([chance.randrange(256)])
        elif kind == "length":
            length = chance.choice([0, 1, header - 7, header, len(data), 1 << 24, 1 << 40, (1 << 64) - 1])
            mutated[:8] = struct.pack("<Q", length)
        elif kind == "cut":
            del mutated[at:]
        elif kind == "delete":
            del mutated[at : at + span]
        elif kind == "insert":
            mutated[at:at] = chance.randbytes(span)
        elif kind == "splice":
            other = chance.choice(others)
            begin = chance.randrange(len(other))
            mutated[at : at + span] = other[begin : begin + span]
        elif kind == "zero":
            mutated[at : at + span] = bytes(span)
        elif kind == "digit":
            digits = [i for i, byte in enumerate(mutated[: len(data)]) if 48 <= byte < 58]
            if digits:
                mutated[chance.choice(digits)] = chance.randrange(48, 58)
    return bytes(mutated)


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all keys and items below ``node``."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [place for key, value in items for place in [(*path, key), *places(value, (*path, key))]]


def hostile(data: bytes, chance: random.Random) -> bytes:
    """Metadata, tensors or header changed by someone who knows the format, and the checksum with them."""
    header = 8 + struct.unpack("<Q", data[:8])[0]
    metadata = json.loads(json.loads(data[8:header])["__metadata__"][_KEY])
    tensors = safetensors.torch.load(data)
    for _ in range(chance.choice([1, 1, 2, 3])):
        if chance.random() < 0.6:
            change(metadata, chance)
        else:
            change_tensors(tensors, chance)
    if isinstance(metadata, dict) and chance.random() < 0.95:
        metadata["sha256"] = _checksum(metadata, sorted(tensors.items()))
    text = json.dumps(metadata)
    if chance.random() < 0.05:
        text = chance.choice(["[" * 100_000, "", "null", text[:-1] + ',"version":1}', text.replace("1", "1" * 5000, 1)])
    made = safetensors.torch.save(tensors, {_KEY: text})
    return edit_header(made, chance) if chance.random() < 0.4 else made


def change(metadata: dict[str, Any], chance: random.Random) -> None:
    *path, key = chance.choice(places(metadata) or [("version",)])
    node: Any = metadata
    for step in path:
        node = node[step]
    names = ["0.weight", "2.weight", "3.weight", "4.weight", "0.bias", "1.running_var"]
    values = [*NUMBERS, "float16", "float32", "float64", "int64", *names, {}, [1 << 20] * 4, [0, 1 << 62], [1] * 99]
    kind = chance.choice(["set", "set", "delete", "rename", "append"])
    if kind == "set":
        node[key] = copy.deepcopy(chance.choice(values))
    elif kind == "delete" and len(node):
        node.pop(key)
    elif kind == "rename" and isinstance(node, dict):
        node[chance.choice(names)] = node.pop(key)
    elif isinstance(node, list):
        node.append(chance.choice(values))
    elif isinstance(node, dict):
        node[chance.choice([*names, "new"])] = copy.deepcopy(chance.choice([*values, node[key]]))


def change_tensors(tensors: dict[str, Tensor], chance: random.Random) -> None:
    if not tensors:
        return
    name = chance.choice(sorted(tensors))
    tensor = tensors[name].clone()
    kind = chance.choice(["value", "value", "delete", "rename", "shape", "dtype", "longer"])
    if kind == "value" and tensor.numel():
        flat = tensor.view(-1).view(torch.uint8)
        flat[chance.randrange(len(flat))] = chance.randrange(256)
        tensors[name] = tensor
    elif kind == "delete":
        del tensors[name]
    elif kind == "rename":
        tensors[chance.choice(["codes/", "n1/", "tensor/", ""]) + chance.choice(["0.weight", "new"])] = tensor
    elif kind == "shape":
        tensors[name] = tensor.view(1, -1)
    elif kind == "dtype":
        tensors[name] = tensor.to(chance.choice([torch.float16, torch.int32, torch.uint8, torch.float64, torch.bool]))
    elif kind == "longer":
        tensors[name] = torch.cat([tensor.view(-1), tensor.view(-1)])


def edit_header(data: bytes, chance: random.Random) -> bytes:
    """Offsets, shapes and types that safetensors would not write."""
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:end])
    *path, key = chance.choice(places(header))
    node = header
    for step in path:
        node = node[step]
    node[key] = chance.choice([*NUMBERS, "F4", "F8_E8M0", "C64", "F32", "U8", [1 << 62, 4], [1] * 5000, {}])
    text = json.dumps(header)
    if chance.random() < 0.2:
        text = chance.choice([text[:-1] + "," + text[1:], "[" * 100_000, text[:-1] + ',"\\ud800":1}', text + " " * 999])
    return struct.pack("<Q", len(text.encode())) + text.encode() + data[end:]


def fuzz(runs: int, folder: Path, seed: int) -> dict[str, Any]:
    """Load ``runs`` mutated files; returns how they ended, the most memory and the most time that one took."""
    chance = random.Random(seed)
    original, blank, target = network(1).state_dict(), network(2).state_dict(), network(2)
    files, rounded = [], {}
    for options in ({}, {"entropy_coded": True}, {"float_dtype": torch.float16}):
        path = folder / "original.safetensors"
        save_packed(network(1), path, **options)
        files.append(path.read_bytes())
        rounded = read_packed(path).state_dict
    expected = [original, original, rounded]
    counts: Counter[str] = Counter()
    path, slowest, most = folder / "mutated.safetensors", 0.0, 0
    begin = resident("VmRSS")
    for _ in range(runs):
        which = chance.randrange(len(files))
        knows = chance.random() < 0.5
        mutated = hostile(files[which], chance) if knows else blind(files[which], files, chance)
        path.write_bytes(mutated)
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        started = time.perf_counter()
        try:
            load_packed(path, target)
        except ArtifactError:
            outcome = "refused"
            wrong = blank
        else:
            outcome = "accepted"
            wrong = expected[which]
        found = target.state_dict()
        # Only who makes a new checksum can make other weights that pass.
        if not knows or outcome == "refused":
            different = [name for name in wrong if not same(found[name], wrong[name])]
            assert not different, (outcome, knows, which, different)
        if outcome == "accepted":
            target.load_state_dict(blank)
        declared = 0
        with contextlib.suppress(ArtifactError):
            declared = sum(t.numel() * t.element_size() for t in read_packed(path).state_dict.values())
        slowest = max(slowest, time.perf_counter() - started)
        grown = resident("VmHWM") - before
        assert grown <= 2 * declared + SLACK, f"grew by {grown} bytes for tensors of {declared}"
        most = max(most, grown)
        counts[f"{outcome}, {'hostile' if knows else 'blind'}"] += 1
    assert slowest < 20
    assert resident("VmRSS") - begin < 64 << 20  # nothing is kept
    return {"files": runs, **counts, "most_mib": most / 2**20, "slowest_seconds": slowest}


def same(a: Tensor, b: Tensor) -> bool:
    return same_bits(a, b) if a.is_floating_point() else a.dtype == b.dtype and torch.equal(a, b)


def test_mutated_files_give_the_saved_weights_or_the_error(tmp_path: Path) -> None:
    counts = fuzz(2_000, tmp_path, seed=0)
    assert counts["refused, blind"] > 900
    assert counts["refused, hostile"] > 500
    assert counts["accepted, hostile"] > 10  # the mutations reach behind the checksum


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_a_hundred_thousand_mutated_files_give_the_saved_weights_or_the_error(seed: int, tmp_path: Path) -> None:
    counts = fuzz(25_000, tmp_path, seed)
    assert counts["refused, blind"] > 11_000


def test_a_small_file_that_asks_for_much_memory_is_refused_before_it_gets_any(tmp_path: Path) -> None:
    """Entropy-coded zeros take no bytes, however many they are."""
    path = tmp_path / "zeros.safetensors"
    net = nn.Linear(64, 64, bias=False)
    nn.init.zeros_(net.weight)
    save_packed(net, path, entropy_coded=True)
    data = path.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    metadata = json.loads(json.loads(data[8:end])["__metadata__"][_KEY])
    metadata["layers"]["weight"]["shape"] = [1 << 20, 1 << 20]
    tensors = safetensors.torch.load(data)
    metadata["sha256"] = _checksum(metadata, sorted(tensors.items()))
    path.write_bytes(safetensors.torch.save(tensors, {_KEY: json.dumps(metadata)}))
    before = resident("VmRSS")
    with pytest.raises(ArtifactError, match="ask for 4398046511104 bytes of memory"):
        read_packed(path)
    metadata["layers"]["weight"]["shape"] = [1 << 14, 1 << 14]
    metadata["sha256"] = _checksum(metadata, sorted(tensors.items()))
    path.write_bytes(safetensors.torch.save(tensors, {_KEY: json.dumps(metadata)}))
    with pytest.raises(ArtifactError, match="does not fit"):
        load_packed(path, net)
    assert resident("VmRSS") - before < 8 << 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"entropy_coded": True}, {"float_dtype": torch.float16}])
def test_reading_takes_less_than_twice_the_memory_of_the_tensors(
    tmp_path: Path, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    net = nn.Sequential(nn.Linear(2048, 3072), nn.Linear(3072, 1024)).to(dtype)
    for layer in net:
        layer.weight.data.copy_(PowerOfTwoGrid.from_weights(layer.weight.data, 8).quantize(layer.weight.data))
    path = tmp_path / "large.safetensors"
    save_packed(net, path, **options)
    declared = sum(p.numel() * p.element_size() for p in net.parameters())
    read_packed(path)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    artifact = read_packed(path)
    assert resident("VmHWM") - before < 2 * declared + (16 << 20)
    assert same(artifact.state_dict["0.weight"], net[0].weight.data)
