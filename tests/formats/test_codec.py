from __future__ import annotations

import math
import random
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from inq_lightning.core.size import bytes_at
from inq_lightning.formats.codec import _CHUNK, Layout, layout_of, pack, pack_entropy, unpack, unpack_entropy
from inq_lightning.grid import PowerOfTwoGrid

BITS = range(2, 9)


def oracle(codes: list[int], bits: int, layout: Layout = "paper") -> bytes:
    """The layout of the docstring, bit by bit."""
    stream = []
    for code in codes:
        nonzero, sign, exponent = int(code != 0), int(code < 0), max(abs(code) - 1, 0)
        if layout == "paper":
            text = f"{nonzero}{sign}" + (f"{exponent:0{bits - 2}b}" if bits > 2 else "")
        else:
            text = f"{sign}{abs(code) - (layout == 'dense'):0{bits - 1}b}"
        stream += [int(bit) for bit in reversed(text)]
    stream += [0] * (-len(stream) % 8)
    return bytes(sum(bit << i for i, bit in enumerate(stream[k : k + 8])) for k in range(0, len(stream), 8))


def some_codes(bits: int, numel: int, seed: int = 0, zeros: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    largest = 1 << bits - 2
    codes = torch.randint(-largest, largest + 1, (numel,), generator=generator, dtype=torch.int8)
    return codes.masked_fill_(torch.rand(numel, generator=generator) < zeros, 0)


def entropy(codes: Tensor) -> float:
    """Order-0 entropy of all codes together, in bytes."""
    shares = codes.unique(return_counts=True)[1].double() / codes.numel()
    return float(-(shares * shares.log2()).sum()) * codes.numel() / 8


@st.composite
def codes_and_bits(draw: st.DrawFn) -> tuple[list[int], int]:
    bits = draw(st.integers(2, 8))
    largest = 1 << bits - 2
    return draw(st.lists(st.integers(-largest, largest), max_size=70)), bits


@given(codes_and_bits())
def test_packed_bytes_are_those_of_the_documented_layout_and_come_back(case: tuple[list[int], int]) -> None:
    values, bits = case
    codes = torch.tensor(values, dtype=torch.int8)
    packed = pack(codes, bits)
    assert bytes(packed.tolist()) == oracle(values, bits)
    assert torch.equal(unpack(packed, bits, len(values)), codes)


@settings(deadline=None)
@given(bits=st.integers(2, 7), layout=st.sampled_from(["full", "dense"]), data=st.data())
def test_layouts_that_waste_no_codes_come_back_too(bits: int, layout: Layout, data: st.DataObject) -> None:
    codes = PowerOfTwoGrid(0, bits, family=layout).codes
    values = data.draw(st.lists(st.sampled_from(codes), max_size=70))
    assert layout_of(codes, bits) == ("paper" if (bits, layout) == (2, "full") else layout)
    packed = pack(torch.tensor(values, dtype=torch.int8), bits, layout)
    assert bytes(packed.tolist()) == oracle(values, bits, layout)
    assert unpack(packed, bits, len(values), layout).tolist() == values
    coded = pack_entropy(torch.tensor(values, dtype=torch.int8), bits, layout)
    assert unpack_entropy(coded, bits, len(values), layout).tolist() == values


def test_codes_that_a_layout_lacks_are_refused() -> None:
    with pytest.raises(ValueError, match="from -4 to 4, without 0, others"):
        pack(torch.tensor([1, 0], dtype=torch.int8), 3, "dense")
    for layout, code in (("dense", 5), ("full", -4)):
        with pytest.raises(ValueError, match="others were given"):
            pack(torch.tensor([code], dtype=torch.int8), 3, layout)
    with pytest.raises(ValueError, match="negative zero"):
        unpack(torch.tensor([0b100], dtype=torch.uint8), 3, 1, "full")
    with pytest.raises(ValueError, match="padding"):
        unpack(torch.tensor([0b1000], dtype=torch.uint8), 3, 1, "dense")


@pytest.mark.parametrize("layout", ["full", "dense"])
def test_other_layouts_come_back_across_the_borders_of_chunks(layout: Layout) -> None:
    grid = PowerOfTwoGrid(0, 3, family=layout)
    codes = grid.encode(torch.randn(2 * _CHUNK + 9, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(unpack(pack(codes, 3, layout), 3, codes.numel(), layout), codes)


@pytest.mark.parametrize("bits", BITS)
def test_every_code_of_a_grid_comes_back_across_the_borders_of_chunks(bits: int) -> None:
    for numel in (_CHUNK - 1, _CHUNK, _CHUNK + 1, 2 * _CHUNK + 9):
        codes = some_codes(bits, numel, seed=numel)
        packed = pack(codes, bits)
        assert packed.shape == (math.ceil(numel * bits / 8),)
        assert torch.equal(unpack(packed, bits, numel), codes)
    assert len(codes.unique()) == 2 ** (bits - 1) + 1
    tail = oracle(codes[_CHUNK * 2 - 800 :].tolist(), bits)
    assert bytes(packed[-len(tail) :].tolist()) == tail


def test_the_example_of_the_docstring() -> None:
    assert pack(torch.tensor([3], dtype=torch.int8), 5).tolist() == [0b10010]
    assert pack(torch.tensor([-3], dtype=torch.int8), 5).tolist() == [0b11010]


@pytest.mark.parametrize("entropy_coded", [False, True])
def test_any_shape_and_memory_format_packs_in_the_order_of_indices(entropy_coded: bool) -> None:
    there, back = (pack_entropy, unpack_entropy) if entropy_coded else (pack, unpack)
    codes = some_codes(5, 2 * 3 * 4 * 5).view(2, 3, 4, 5)
    for tensor in (codes, codes.to(memory_format=torch.channels_last), codes.transpose(0, 3), codes[1:, :, 1:]):
        assert torch.equal(back(there(tensor, 5), 5, tensor.numel()).view(tensor.shape), tensor)
    scalar = torch.tensor(-8, dtype=torch.int8)
    assert back(there(scalar, 5), 5, 1).tolist() == [-8]
    empty = torch.empty(3, 0, dtype=torch.int8)
    assert there(empty, 5).shape == (0,)
    assert back(there(empty, 5), 5, 0).shape == (0,)


def test_codes_at_odd_places_of_a_storage_pack_alike() -> None:
    codes = some_codes(4, 1000)
    for start in range(9):
        assert torch.equal(unpack(pack(codes[start:], 4), 4, 1000 - start), codes[start:])
    packed = torch.cat([torch.zeros(3, dtype=torch.uint8), pack(codes, 4)])[3:]
    assert torch.equal(unpack(packed, 4, 1000), codes)


@pytest.mark.parametrize("bits", BITS)
def test_codes_that_the_grid_lacks_are_refused(bits: int) -> None:
    largest = 1 << bits - 2
    for code in (-128, -largest - 1, largest + 1, 127):
        for packer in (pack, pack_entropy):
            with pytest.raises(ValueError, match=f"from {-largest} to {largest}"):
                packer(torch.tensor([0, code], dtype=torch.int8), bits)


@pytest.mark.parametrize("bits", BITS)
def test_bytes_that_hold_no_code_of_the_grid_are_refused(bits: int) -> None:
    allowed = {0, *range(1 << bits - 1, 1 << bits)}
    for code in range(1 << bits):
        for place in (0, 3, 7):
            stream = (code << place * bits).to_bytes(bits, "little")
            packed = torch.tensor(list(stream), dtype=torch.uint8)
            if code in allowed:
                assert bytes(pack(unpack(packed, bits, 8), bits).tolist()) == stream
            else:
                with pytest.raises(ValueError, match="outside the grid"):
                    unpack(packed, bits, 8)


def test_wrong_lengths_types_and_padding_are_refused() -> None:
    packed = pack(some_codes(5, 9), 5)
    for wrong in (packed[:-1], torch.cat([packed, packed[:1]]), packed.view(1, -1), packed.to(torch.int8)):
        with pytest.raises(ValueError, match="take 6 bytes as 1-D uint8"):
            unpack(wrong, 5, 9)
    with pytest.raises(ValueError, match="take 11 bytes"):
        unpack(packed, 5, 17)
    packed[-1] |= 0x80
    with pytest.raises(ValueError, match="padding"):
        unpack(packed, 5, 9)
    with pytest.raises(TypeError, match="int8"):
        pack(torch.zeros(3), 5)
    with pytest.raises(ValueError, match="bits must be"):
        pack(torch.zeros(3, dtype=torch.int8), 9)


def test_packing_takes_no_more_memory_than_its_result_and_a_chunk() -> None:
    codes = some_codes(5, 1 << 24)
    tracemalloc.start()
    words = pack_entropy(codes, 5)
    assert torch.equal(unpack_entropy(words, 5, codes.numel()), codes)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * words.numel() + 32 * _CHUNK  # numpy's arrays, which tracemalloc sees


@settings(max_examples=50)
@given(codes_and_bits())
def test_entropy_coded_codes_come_back(case: tuple[list[int], int]) -> None:
    values, bits = case
    codes = torch.tensor(values, dtype=torch.int8)
    assert torch.equal(unpack_entropy(pack_entropy(codes, bits), bits, len(values)), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("zeros", [0.0, 0.5, 0.9, 0.999, 1.0])
def test_entropy_coding_comes_within_three_percent_of_the_entropy(bits: int, zeros: float) -> None:
    codes = some_codes(bits, 3 * _CHUNK // 2 + 5, zeros=zeros)
    packed = pack_entropy(codes, bits)
    assert torch.equal(unpack_entropy(packed, bits, codes.numel()), codes)
    table = 4 * (2 ** (bits - 1) + 1)
    assert packed.numel() - table <= 1.001 * entropy(codes) + 8
    assert packed.numel() <= 1.03 * entropy(codes) + 1024


@pytest.mark.parametrize("bits", BITS)
def test_a_layer_of_one_value_is_a_table_of_frequencies(bits: int) -> None:
    for code in (0, 1 << bits - 2, -(1 << bits - 2)):
        codes = torch.full((300_000,), code, dtype=torch.int8)
        packed = pack_entropy(codes, bits)
        assert packed.numel() <= 4 * (2 ** (bits - 1) + 1) + 8
        assert torch.equal(unpack_entropy(packed, bits, codes.numel()), codes)


def test_entropy_coded_bytes_stay_what_they_are() -> None:
    """What a release has written, every later one has to read: these bytes never change."""
    packed = pack_entropy(torch.tensor([0, 1, -1, 0, 0, 1], dtype=torch.int8), 2)
    assert bytes(packed.tolist()).hex() == "abaa2a0000008000555555000b008055"
    assert bytes(pack(torch.tensor([0, 1, -1, 0, 0, 1], dtype=torch.int8), 2).tolist()).hex() == "3808"


def test_damaged_entropy_coded_bytes_are_refused_or_decode_to_codes_of_the_grid() -> None:
    chance = random.Random(0)
    codes = some_codes(4, 5000)
    packed = pack_entropy(codes, 4)
    refused = 0
    for _ in range(300):
        damaged = packed.clone()
        for _ in range(chance.randint(1, 4)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        damaged = damaged[: len(damaged) - chance.choice([0, 0, 1, 4, 40, len(damaged)])]
        try:
            decoded = unpack_entropy(damaged, 4, 5000)
        except ValueError:
            refused += 1
        else:
            assert decoded.shape == (5000,)
            assert decoded.abs().max() <= 4
    assert refused > 250


def test_entropy_coded_bytes_of_another_number_of_codes_are_refused() -> None:
    packed = pack_entropy(some_codes(4, 5000), 4)
    with pytest.raises(ValueError, match="more is left after 4999"):
        unpack_entropy(packed, 4, 4999)
    for wrong in (packed[:7], packed.view(1, -1), packed[:8], packed.view(torch.int8), packed[:0]):
        with pytest.raises(ValueError, match="entropy-coded weights"):
            unpack_entropy(wrong, 4, 5000)
    with pytest.raises(ValueError, match="frequencies"):
        unpack_entropy(packed, 4, 0)


def test_sizes() -> None:
    assert [bytes_at(n, 5) for n in (0, 1, 8, 9)] == [0, 1, 5, 6]
