from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import fit, fractions, identical, levels, power, raw, round_all, smallest_exponent
from torch import Tensor

from inq_lightning.grid.power_of_two import PowerOfTwoGrid, exponent_range

BITS = range(2, 9)
UNDERFLOWS = ("nearest", "truncate")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MANTISSA = {torch.float16: 10, torch.bfloat16: 7, torch.float32: 23, torch.float64: 52}
# The smallest and the largest power of two that the package promises to hold in each dtype.
RANGE = {
    torch.float16: (-24, 15),
    torch.bfloat16: (-133, 127),
    torch.float32: (-149, 127),
    torch.float64: (-1022, 1023),
}


def from_bits(patterns: list[int], dtype: torch.dtype) -> Tensor:
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    return torch.tensor(patterns, dtype=integer).view(dtype)


@st.composite
def weights(draw: st.DrawFn, dtype: torch.dtype, max_size: int = 24) -> Tensor:
    """Powers of two, exact ties, their neighbours by one ulp, subnormals, huge values, both zeros and anything else."""
    p = MANTISSA[dtype]
    largest = int(raw(torch.tensor(torch.finfo(dtype).max, dtype=dtype)))
    top = draw(st.integers(0, largest >> p))  # exponent field that most values stay close to
    patterns = []
    for _ in range(draw(st.integers(0, max_size))):
        exponent = draw(st.one_of(st.integers(max(0, top - 9), top), st.integers(0, top)))
        fraction = draw(st.sampled_from([0, 0, 1 << p - 1, 1 << p - 1, 1 << p - 2, draw(st.integers(0, (1 << p) - 1))]))
        size = min(max((exponent << p) + fraction + draw(st.sampled_from([-1, 0, 0, 1])), 0), largest)
        patterns.append(size)
    negative = torch.tensor([draw(st.booleans()) for _ in patterns], dtype=torch.bool)
    w = from_bits(patterns, dtype)
    return torch.where(negative, -w, w)


def expect_exactly(result: Tensor, expected: list[Fraction]) -> None:
    assert fractions(result) == expected
    assert not (torch.signbit(result) & (result == 0)).any(), "-0.0 in the result"


@pytest.mark.parametrize("underflow", UNDERFLOWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_fitting_and_rounding_follow_the_papers_equations_exactly(
    dtype: torch.dtype, underflow: str, data: st.DataObject
) -> None:
    bits = data.draw(st.sampled_from(BITS))
    w = data.draw(weights(dtype))
    exact = fractions(w)
    n1 = fit(exact)
    lowest, highest = RANGE[dtype]
    if n1 is not None and (n1 > highest or smallest_exponent(n1, bits) < lowest):
        with pytest.raises(ValueError, match=f"{dtype} cannot hold the {bits}-bit grid"):
            PowerOfTwoGrid.from_weights(w, bits, underflow)
        return
    before = w.clone()
    grid = PowerOfTwoGrid.from_weights(w, bits, underflow)
    assert (grid.n1, grid.bits, grid.underflow) == (n1, bits, underflow)
    assert grid.n2 == (None if n1 is None else smallest_exponent(n1, bits))
    expected = round_all(exact, n1, bits, underflow)
    rounded = grid.quantize(w)
    assert rounded.dtype == dtype
    assert rounded.shape == w.shape
    expect_exactly(rounded, expected)
    assert identical(grid.quantize(rounded), rounded), "rounding twice differs from rounding once"

    codes = grid.encode(w)
    assert codes.dtype == torch.int8
    expect_exactly(grid.decode(codes, torch.float64), expected)
    assert identical(grid.decode(codes, dtype), rounded)
    assert torch.equal(grid.encode(rounded), codes)
    assert codes.tolist() == [
        0 if q == 0 else (1 if q > 0 else -1) * next(k for k in range(1, 65) if abs(q) == power(grid.n2 + k - 1))
        for q in expected
    ]
    assert identical(w, before), "the input has changed"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_weights_that_left_their_grid_behind_saturate_or_vanish_as_the_equations_say(
    dtype: torch.dtype, data: st.DataObject
) -> None:
    bits = data.draw(st.sampled_from([b for b in BITS if 2 ** (b - 2) <= 32]))
    underflow = data.draw(st.sampled_from(UNDERFLOWS))
    lowest, highest = RANGE[dtype]
    n1 = data.draw(st.integers(lowest + 2 ** (bits - 2) - 1, highest))
    w = data.draw(weights(dtype))
    grid = PowerOfTwoGrid(n1, bits, underflow)
    expected = round_all(fractions(w), n1, bits, underflow)
    expect_exactly(grid.quantize(w), expected)
    expect_exactly(grid.decode(grid.encode(w), dtype), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_every_tie_of_a_grid_goes_up_and_one_ulp_below_it_goes_down(bits: int, dtype: torch.dtype) -> None:
    grid = PowerOfTwoGrid(3, bits)
    beta = torch.tensor([2.0**k for k in range(grid.n2, 4)], dtype=dtype)
    alpha = torch.cat([torch.zeros(1, dtype=dtype), beta[:-1]])
    tie = (alpha + beta) / 2
    below = torch.nextafter(tie, torch.zeros_like(tie))
    for sign in (1, -1):
        assert torch.equal(grid.quantize(sign * tie), sign * beta)
        assert torch.equal(grid.quantize(sign * below), sign * alpha)
        assert torch.equal(grid.quantize(sign * beta), sign * beta)
    truncating = PowerOfTwoGrid(3, bits, "truncate")
    just_under = torch.nextafter(beta[:1], torch.zeros(1, dtype=dtype))
    assert truncating.quantize(just_under).item() == 0
    assert truncating.quantize(beta[:1]).item() == beta[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_largest_exponent_steps_up_exactly_at_three_quarters_of_the_next_power(dtype: torch.dtype) -> None:
    for k in (-20, -1, 0, 1, 20):
        threshold = torch.tensor([0.75 * 2.0**k], dtype=dtype)
        assert PowerOfTwoGrid.from_weights(threshold).n1 == k
        assert PowerOfTwoGrid.from_weights(-threshold).n1 == k
        assert PowerOfTwoGrid.from_weights(torch.nextafter(threshold, torch.zeros_like(threshold))).n1 == k - 1


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n1", [-5, 0, 3, 60])
def test_levels_are_zero_and_all_powers_of_two_between_the_exponents(n1: int, bits: int) -> None:
    grid = PowerOfTwoGrid(n1, bits)
    assert grid.levels.dtype == torch.float64
    assert fractions(grid.levels) == levels(n1, bits)
    assert grid.magnitudes == 2 ** (bits - 2)
    assert torch.equal(grid.quantize(grid.levels), grid.levels)


def test_the_papers_example_of_five_bits_has_eight_magnitudes() -> None:
    grid = PowerOfTwoGrid.from_weights(torch.tensor([0.1, -1.2, 0.01]))
    assert (grid.n1, grid.n2, grid.bits) == (0, -7, 5)
    assert grid.quantize(torch.tensor([1.2, -0.75, 0.7, 2.0**-8, 0.0038, -9.0])).tolist() == [
        1,
        -1,
        0.5,
        2**-7,
        0,
        -1,
    ]


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2), (1,), (2, 3)])
def test_empty_and_all_zero_tensors_have_a_grid_of_zero_only(shape: tuple[int, ...]) -> None:
    grid = PowerOfTwoGrid.from_weights(-torch.zeros(shape), 4)
    assert (grid.n1, grid.n2) == (None, None)
    assert grid.levels.tolist() == [0.0]
    assert identical(grid.quantize(-torch.zeros(shape)), torch.zeros(shape))
    assert identical(grid.quantize(torch.full(shape, 7.0)), torch.zeros(shape))
    codes = grid.encode(torch.full(shape, -7.0))
    assert torch.equal(codes, torch.zeros(shape, dtype=torch.int8))
    assert identical(grid.decode(codes, torch.bfloat16), torch.zeros(shape, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_scalar_tensor_is_rounded_too(dtype: torch.dtype) -> None:
    w = torch.tensor(-0.8, dtype=dtype)
    grid = PowerOfTwoGrid.from_weights(w)
    assert identical(grid.quantize(w), torch.tensor(-1.0, dtype=dtype))
    assert grid.encode(w).shape == ()


LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 1),
    "permuted": lambda t: t.permute(3, 1, 0, 2),
    "every second": lambda t: t[:, ::2, :, 1:],
    "expanded": lambda t: t[:1].expand(4, -1, -1, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_formats_are_kept_and_do_not_change_the_values(dtype: torch.dtype, layout: str) -> None:
    w = LAYOUTS[layout](torch.randn(4, 6, 3, 5, generator=torch.Generator().manual_seed(0)).to(dtype))
    grid = PowerOfTwoGrid.from_weights(w)
    plain = w.contiguous().clone()
    assert PowerOfTwoGrid.from_weights(plain) == grid
    rounded, codes = grid.quantize(w), grid.encode(w)
    decoded = grid.decode(codes, dtype)
    for result in (rounded, codes, decoded):
        assert result.shape == w.shape
        if layout in ("contiguous", "channels_last", "transposed", "permuted"):
            assert result.stride() == w.stride()
    assert identical(rounded.contiguous(), grid.quantize(plain))
    assert torch.equal(codes, grid.encode(plain))
    assert identical(decoded.contiguous(), grid.quantize(plain))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_are_refused(bad: float, dtype: torch.dtype) -> None:
    w = torch.tensor([0.5, bad, 1.0], dtype=dtype)
    grid = PowerOfTwoGrid(0)
    for call in (PowerOfTwoGrid.from_weights, grid.quantize, grid.encode, PowerOfTwoGrid(None).quantize):
        with pytest.raises(ValueError, match="nan or inf"):
            call(w)
    with pytest.raises(ValueError, match="nan or inf"):
        PowerOfTwoGrid.from_max(bad, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_a_dtype_is_refused_by_name_exactly_when_a_level_does_not_fit(bits: int, dtype: torch.dtype) -> None:
    lowest, highest = RANGE[dtype]
    assert exponent_range(dtype) == (lowest, highest)
    count = 2 ** (bits - 2)
    w = torch.ones(3, dtype=dtype)
    for n1 in (lowest + count - 2, highest + 1):
        grid = PowerOfTwoGrid(n1, bits)
        for call in (grid.quantize, grid.encode, lambda _, grid=grid: grid.decode(torch.zeros(1).char(), dtype)):
            with pytest.raises(ValueError, match=rf"{dtype} cannot hold the {bits}-bit grid .*fewer bits or .*wider"):
                call(w)
    if lowest + count - 1 <= highest:
        for n1 in (lowest + count - 1, highest):
            grid = PowerOfTwoGrid(n1, bits)
            codes = torch.arange(-count, count + 1).char()
            assert fractions(grid.decode(codes, dtype)) == levels(n1, bits)
            assert torch.equal(grid.encode(grid.decode(codes, dtype)), codes)


def test_weights_just_too_large_for_their_dtype_are_refused() -> None:
    w = torch.tensor([49152.0], dtype=torch.float16)
    with pytest.raises(ValueError, match=r"torch\.float16 cannot hold"):
        PowerOfTwoGrid.from_weights(w)
    assert PowerOfTwoGrid.from_weights(w - 32).n1 == 15  # one ulp less
    assert PowerOfTwoGrid.from_weights(w.float()).n1 == 16


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.bool, torch.complex64], ids=str)
def test_other_dtypes_are_refused_by_name(dtype: torch.dtype) -> None:
    w = torch.ones(2, dtype=dtype)
    for call in (PowerOfTwoGrid.from_weights, PowerOfTwoGrid(0).quantize, PowerOfTwoGrid(0).encode):
        with pytest.raises(TypeError, match=str(dtype)):
            call(w)


@pytest.mark.parametrize("bits", [True, False, 1, 9, 0, -3, 4.0, "4", None])
def test_bit_widths_without_a_grid_are_refused(bits: object) -> None:
    for build in (lambda: PowerOfTwoGrid(0, bits), lambda: PowerOfTwoGrid.from_weights(torch.ones(1), bits)):
        with pytest.raises(ValueError, match="bits must be an integer from 2 to 8") as error:
            build()
        assert repr(bits) in str(error.value)


@pytest.mark.parametrize("underflow", ["floor", "", None, "Nearest"])
def test_unknown_underflow_rules_are_refused(underflow: object) -> None:
    with pytest.raises(ValueError, match="underflow must be one of nearest, truncate") as error:
        PowerOfTwoGrid(0, 5, underflow)
    assert repr(underflow) in str(error.value)


@pytest.mark.parametrize("bits", BITS)
def test_codes_outside_the_grid_are_refused(bits: int) -> None:
    grid, count = PowerOfTwoGrid(0, bits), 2 ** (bits - 2)
    for code in (count + 1, -count - 1, 127, -128):
        with pytest.raises(ValueError, match=f"from {-count} to {count}"):
            grid.decode(torch.tensor([0, code], dtype=torch.int8))
    with pytest.raises(ValueError, match="from 0 to 0"):
        PowerOfTwoGrid(None, bits).decode(torch.tensor([1]))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_codes_of_any_signed_integer_type_are_decoded(dtype: torch.dtype) -> None:
    assert PowerOfTwoGrid(1, 3).decode(torch.tensor([[-2, -1, 0], [1, 2, 2]], dtype=dtype)).tolist() == [
        [-2, -1, 0],
        [1, 2, 2],
    ]


# ---- n1 by the least squared error -----------------------------------------------------------------------------------


@pytest.mark.parametrize("underflow", UNDERFLOWS)
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_the_exponent_of_least_error_is_the_best_of_the_largest_and_those_below_it(
    underflow: str, data: st.DataObject
) -> None:
    w = data.draw(weights(torch.float32))
    bits = data.draw(st.sampled_from(BITS))
    try:
        largest = PowerOfTwoGrid.from_weights(w, bits, underflow)
    except ValueError:
        return
    grid = PowerOfTwoGrid.from_weights(w, bits, underflow, exponent="mse")
    if largest.n1 is None:
        assert grid == largest
        return

    def error(n1: int) -> Fraction:
        pairs = zip(fractions(w), round_all(fractions(w), n1, bits, underflow), strict=True)
        return sum(((a - b) ** 2 for a, b in pairs), Fraction(0))

    held = [n1 for n1 in range(largest.n1 - 7, largest.n1 + 1) if smallest_exponent(n1, bits) >= -149]
    assert grid.n1 in held
    assert (grid.bits, grid.underflow) == (bits, underflow)
    best = min(error(n1) for n1 in held)
    assert error(grid.n1) <= best * (1 + Fraction(1, 10**6)), "to what float32 differences can tell"


def test_one_outlier_does_not_move_the_exponent_of_least_error() -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(10_000, generator=generator)
    with_outlier = torch.cat([w, torch.tensor([30.0])])
    assert PowerOfTwoGrid.from_weights(with_outlier, 3).n1 == PowerOfTwoGrid.from_weights(w, 3).n1 + 3  # 4.0 and 32.0
    n1 = PowerOfTwoGrid.from_weights(w, 3, exponent="mse").n1
    assert PowerOfTwoGrid.from_weights(with_outlier, 3, exponent="mse").n1 == n1 == 1


@pytest.mark.parametrize("exponent", ["least", "MAX", None, 1])
def test_unknown_rules_for_the_exponent_are_refused(exponent: object) -> None:
    with pytest.raises(ValueError, match="exponent must be one of auto, max, mse, got"):
        PowerOfTwoGrid.from_weights(torch.ones(3), exponent=exponent)  # type: ignore[arg-type]
