"""Codes of weights as bytes: exactly b bits a weight, or entropy-coded.

The b-bit code of a weight, as an unsigned number (Zhou et al., ICLR 2017, section 2.1: one bit says zero or not, the
rest are sign and exponent)::

    bit       b-1        b-2     b-3 … 0
           nonzero      sign    exponent

The weight is 0 where the nonzero bit is 0, and then so are all others; else it is ±2^(n2 + exponent), negative where
the sign bit is 1. So of the 2^b codes, 2^(b-1) + 1 are in use. With b=5 and n2=-9, 10010 is 2^-7 and 11010 is -2^-7.

That is the layout ``"paper"``. Two others waste no codes, or one::

    layout    bit b-1    bits b-2 … 0
    full      sign       0 for zero, k for the k-th magnitude from below, 1 to 2^(b-1) - 1
    dense     sign       k - 1, for 2^(b-1) magnitudes; there is no zero

Packed, the codes follow each other without gaps: bit j of code i is bit (i·b + j) mod 8 of byte (i·b + j) div 8, where
bit 0 is the lowest. Eight codes take b bytes. Unused bits of the last byte are 0.

In memory, codes are what :meth:`PowerOfTwoGrid.encode <inq_lightning.grid.PowerOfTwoGrid.encode>` returns: int8, 0 for
zero and ±k for the k-th magnitude.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from inq_lightning._common import import_extra
from inq_lightning.core.size import bytes_at
from inq_lightning.grid.power_of_two import check_bits

Layout = Literal["paper", "full", "dense"]

_CHUNK = 1 << 17  # codes at a time: intermediate results stay in the cache, and torch starts no threads for them
_ONES = 0x0101010101010101  # the lowest bit of each of the eight bytes of a word
_TOTAL = 1 << 24  # what the frequencies of the entropy coder add up to


def layout_of(codes: Sequence[int], bits: int) -> Layout:
    """The layout in which these codes of a grid are packed: the paper's wherever they fit it."""
    if 0 not in codes:
        return "dense"
    return "paper" if codes[-1] <= _largest(bits, "paper") else "full"


def pack(codes: Tensor, bits: int, layout: Layout = "paper") -> Tensor:
    """Pack codes at exactly ``bits`` bits each.

    Args:
        codes: int8 codes of any shape, in the order of their indices whatever the memory format.
        bits: Code length, 2 to 8.
        layout: How a code becomes bits, see the module.

    Returns:
        uint8 of shape (ceil(numel · bits / 8),), on the device of ``codes``.

    Raises:
        TypeError: ``codes`` is not int8.
        ValueError: A code lies outside the grid, or ``bits`` is none.
    """
    flat = _flat(codes, bits)
    packed = flat.new_empty(bytes_at(flat.numel(), bits), dtype=torch.uint8)
    largest = _largest(bits, layout)
    for start, chunk in _chunks(flat):
        # Eight codes to a word, one a byte; no step below carries from one byte into the next.
        filled = pad(chunk, (0, -chunk.numel() % 8), value=int(layout == "dense"))  # with the code of zero bits
        word = filled.view(torch.int64)
        negative = (word >> 7) & _ONES
        magnitude = (word ^ negative * 0xFF) + negative
        nonzero = magnitude + 0x7F * _ONES >> 7 & _ONES
        zeros = layout == "dense" and bool((nonzero != _ONES).any())
        if zeros or bool((magnitude + (0x7F - largest) * _ONES >> 7 & _ONES).any()):
            without = ", without 0" if layout == "dense" else ""
            raise ValueError(f"codes of {bits} bits go from {-largest} to {largest}{without}, others were given")
        if layout == "paper":
            word = magnitude - nonzero + (nonzero << bits - 1) + (negative << bits - 2)
        else:
            word = magnitude - (_ONES if layout == "dense" else 0) + (negative << bits - 1)
        for width, gap in _steps(bits):  # pairs, then quadruples, then all eight move together
            word = word & _mask(width, 2 * gap) | (word >> gap - width) & _mask(width, 2 * gap, width)
        stream = word.view(torch.uint8).view(-1, 8)[:, :bits].reshape(-1)
        begin = start * bits // 8
        packed[begin : begin + stream.numel()] = stream[: packed.numel() - begin]
    return packed


def unpack(packed: Tensor, bits: int, numel: int, layout: Layout = "paper") -> Tensor:
    """The inverse of :func:`pack`.

    Args:
        packed: uint8, 1-D.
        bits: Code length, 2 to 8.
        numel: Number of codes.
        layout: As the codes were packed.

    Returns:
        int8 codes of shape (numel,), on the device of ``packed``.

    Raises:
        ValueError: ``packed`` has another length or dtype than ``numel`` codes take, holds a code that no weight has,
            or has padding bits that are not 0.
    """
    check_bits(bits)
    if packed.dtype != torch.uint8 or packed.shape != (bytes_at(numel, bits),):
        raise ValueError(
            f"{numel} codes of {bits} bits take {bytes_at(numel, bits)} bytes as 1-D uint8, got {packed.dtype} of "
            f"shape {tuple(packed.shape)}"
        )
    if numel * bits % 8 and int(packed[-1]) >> numel * bits % 8:
        raise ValueError("padding bits after the last code are not 0")
    codes = packed.new_empty(numel, dtype=torch.int8)
    for start, chunk in _chunks(codes):
        begin = start * bits // 8
        stream = packed[begin : begin + bytes_at(chunk.numel(), bits)]
        stream = pad(stream, (0, -stream.numel() % bits)).view(-1, bits)
        wide = stream.new_zeros(stream.shape[0], 8)
        wide[:, :bits] = stream
        word = wide.view(torch.int64).view(-1)
        for width, gap in reversed(_steps(bits)):
            word = word & _mask(width, 2 * gap) | (word & _mask(width, 2 * gap, width)) << gap - width
        first, rest = (word >> bits - 1) & _ONES, word & _ONES * ((1 << bits - 1) - 1)
        if layout == "paper":
            if bool((rest & (first ^ _ONES) * 0xFF).any()):
                raise ValueError(f"a code of {bits} bits lies outside the grid: its nonzero bit is 0, others are not")
            negative = (word >> bits - 2) & _ONES & first
            magnitude = (word & _ONES * ((1 << bits - 2) - 1)) + first
        else:
            negative, magnitude = first, rest + (_ONES if layout == "dense" else 0)
            if bool((negative & ~(magnitude + 0x7F * _ONES >> 7)).any()):
                raise ValueError(f"a code of {bits} bits lies outside the grid: it is a negative zero")
        word = (magnitude ^ negative * 0xFF) + negative
        chunk.copy_(word.view(torch.int8)[: chunk.numel()])
    return codes


def pack_entropy(codes: Tensor, bits: int, layout: Layout = "paper") -> Tensor:
    """Compress codes to nearly their order-0 entropy, with an ANS coder.

    The result begins with how often each code occurs, from the most negative one up: little-endian uint32, each at
    least 1, scaled to a sum of 2^24; zero has its place in every layout. Then come the coder's little-endian uint32
    words, for the codes as symbols 0, 1, … in ascending order. No codes take no bytes.

    Args:
        codes: int8 codes of any shape.
        bits: Code length, 2 to 8.
        layout: What codes there may be, see the module.

    Returns:
        uint8, 1-D, on the CPU.

    Raises:
        TypeError: ``codes`` is not int8.
        ValueError: A code lies outside the grid, or ``bits`` is none.
        ImportError: constriction is not installed (extra ``export``).
    """
    flat, largest = _flat(codes, bits).cpu(), _largest(bits, layout)
    if not flat.numel():
        return torch.empty(0, dtype=torch.uint8)
    occurrences = np.zeros(256, np.int64)
    for _, chunk in _chunks(flat):
        occurrences += np.bincount(chunk.numpy().astype(np.int64) + 128, minlength=256)
    counts = occurrences[128 - largest : 128 + largest + 1]
    if counts.sum() != flat.numel():
        raise ValueError(f"codes of {bits} bits go from {-largest} to {largest}, others were given")
    frequencies = 1 + counts * (_TOTAL - len(counts)) // flat.numel()
    frequencies[counts.argmax()] += _TOTAL - frequencies.sum()
    coder, model = _stream().stack.AnsCoder(), _model(frequencies)
    for _, chunk in reversed(list(_chunks(flat))):  # last in, first out
        coder.encode_reverse(chunk.numpy().astype(np.int32) + np.int32(largest), model)
    words = np.concatenate([frequencies.astype("<u4"), coder.get_compressed().astype("<u4")])
    return torch.from_numpy(words.view(np.uint8))


def unpack_entropy(packed: Tensor, bits: int, numel: int, layout: Layout = "paper") -> Tensor:
    """The inverse of :func:`pack_entropy`; takes no more memory than its result and a chunk, whatever the bytes.

    Args:
        packed: uint8, 1-D, on the CPU.
        bits: Code length, 2 to 8.
        numel: Number of codes. Few bytes can stand for very many codes, so check a number that came from elsewhere.
        layout: As the codes were packed.

    Returns:
        int8 codes of shape (numel,).

    Raises:
        ValueError: ``packed`` is not what :func:`pack_entropy` makes of ``numel`` codes.
        ImportError: constriction is not installed (extra ``export``).
    """
    check_bits(bits)
    largest = _largest(bits, layout)
    symbols = 2 * largest + 1
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() % 4:
        raise ValueError(
            f"entropy-coded weights are 1-D uint8 of a multiple of 4 bytes, got {packed.dtype} of shape "
            f"{tuple(packed.shape)}"
        )
    if not numel and not packed.numel():
        return torch.empty(0, dtype=torch.int8)
    words = np.frombuffer(packed.numpy().tobytes(), "<u4")
    frequencies = words[:symbols].astype(np.int64)
    if not numel or len(frequencies) < symbols or not frequencies.all() or frequencies.sum() != _TOTAL:
        raise ValueError(f"entropy-coded weights of {bits} bits do not begin with the {symbols} frequencies of codes")
    try:
        coder, model = _stream().stack.AnsCoder(words[symbols:].astype(np.uint32)), _model(frequencies)
    except ValueError as error:
        raise ValueError(f"entropy-coded weights are damaged: {error}") from error
    codes = torch.empty(numel, dtype=torch.int8)
    for _, chunk in _chunks(codes):
        chunk.copy_(torch.from_numpy(coder.decode(model, chunk.numel()) - np.int32(largest)))
    if not coder.is_empty():
        raise ValueError(f"entropy-coded weights are damaged: more is left after {numel} codes")
    return codes


def _largest(bits: int, layout: Layout) -> int:
    """The largest code of a layout."""
    return {"paper": 1 << bits - 2, "full": (1 << bits - 1) - 1, "dense": 1 << bits - 1}[layout]


def _flat(codes: Tensor, bits: int) -> Tensor:
    """The codes in one row."""
    check_bits(bits)
    if codes.dtype != torch.int8:
        raise TypeError(f"codes must be int8, as PowerOfTwoGrid.encode returns them, got {codes.dtype}")
    return codes.reshape(-1)


def _chunks(flat: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Views of cache size, and where they start."""
    return ((start, flat[start : start + _CHUNK]) for start in range(0, flat.numel(), _CHUNK))


def _steps(bits: int) -> list[tuple[int, int]]:
    """Widths of what is joined, 1, 2 and 4 codes, and the distances at which they lie."""
    return [(bits << k, 8 << k) for k in range(3)] if bits < 8 else []


def _mask(width: int, distance: int, start: int = 0) -> int:
    """A word of 64 bits in which ``width`` bits are set from ``start`` on, and again at every ``distance``."""
    return sum(((1 << width) - 1) << begin for begin in range(start, 64, distance))


def _stream() -> Any:
    return import_extra("constriction", "export").stream


def _model(frequencies: np.ndarray[Any, Any]) -> Any:
    """The coder's model in which each symbol has exactly the given frequency, in units of 2^-24.

    It gives each symbol one unit, and what remains in proportion to the weights. The weights here add up to just what
    remains, so no number is rounded on the way, on any machine.
    """
    return _stream().model.Categorical((frequencies - 1).astype(np.float64), perfect=False)
