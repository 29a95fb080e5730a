from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import fit, fractions, identical, raw, round_all
from torch import Tensor, nn

from inq_lightning.core.frozen import FrozenWeight, pack_mask, unpack_mask
from inq_lightning.core.partition import scores, select
from inq_lightning.grid import PowerOfTwoGrid
from inq_lightning.kernels.reference import _CHUNK

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PORTIONS = (0.3, 0.6, 0.85, 1.0)


def random(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def every_kind_of_float(count: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random bits: normal and subnormal numbers, infinities and nans with payloads, of both signs."""
    integer = raw(torch.zeros(1, dtype=dtype)).dtype
    info = torch.iinfo(integer)
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(info.min, info.max, (count,), generator=generator, dtype=torch.int64).to(integer)
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan], dtype=dtype).view(integer)
    bits[: special.numel()] = special
    bits[special.numel() : special.numel() + 4] = torch.tensor([1, 2, info.min + 1, info.max], dtype=integer)
    return bits.view(dtype)


# Freezing


@pytest.mark.parametrize("underflow", ["nearest", "truncate"])
@pytest.mark.parametrize("partition", ["magnitude", "random"])
@pytest.mark.parametrize("bits", [2, 3, 5, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_freezing_rounds_exactly_the_chosen_weights_and_leaves_the_others(
    dtype: torch.dtype, bits: int, partition: str, underflow: str
) -> None:
    w = random(13, 11, dtype=dtype)
    w[0, :4] = 0
    frozen = FrozenWeight("w", w, bits, underflow, "max", "paper")
    n1 = fit(fractions(w))
    mask = torch.zeros_like(w, dtype=torch.bool)
    assert not frozen.mask.any()
    assert frozen.grid is None
    for portion in PORTIONS:
        before = w.clone()
        count = round(portion * w.numel())
        new = select(scores(before, partition, "w", 7), ~mask, count - int(mask.sum()))
        rounding = frozen.freeze(portion, partition, seed=7)
        mask |= new
        assert torch.equal(frozen.mask, mask)
        assert frozen.frozen == count == int(mask.sum())
        assert fractions(w[new]) == round_all(fractions(before[new]), n1, bits, underflow)
        assert identical(w[~new], before[~new])
        assert frozen.grid == PowerOfTwoGrid(n1, bits, underflow)
        chosen, after = before[new].double(), w[new].double()
        assert rounding.signal == pytest.approx(chosen.square().sum().item(), rel=1e-12)
        assert rounding.noise == pytest.approx((chosen - after).square().sum().item(), rel=1e-12, abs=0)
    assert not (torch.signbit(w) & (w == 0)).any()


@settings(max_examples=60, deadline=None)
@given(
    numel=st.integers(0, 60),
    portions=st.lists(st.floats(0, 1), max_size=6),
    partition=st.sampled_from(["magnitude", "random"]),
)
def test_the_frozen_count_is_the_rounded_portion_and_never_falls(
    numel: int, portions: list[float], partition: str
) -> None:
    w = random(numel)
    frozen = FrozenWeight("w", w)
    reached = 0
    for portion in portions:
        before, mask = w.clone(), frozen.mask
        frozen.freeze(portion, partition)
        reached = max(reached, round(portion * numel))
        assert frozen.frozen == int(frozen.mask.sum()) == reached
        assert (frozen.mask | ~mask).all()
        assert identical(w[mask], before[mask])


def test_a_portion_that_adds_nothing_changes_nothing() -> None:
    w = random(10)
    frozen = FrozenWeight("w", w)
    before = w.clone()
    assert frozen.freeze(0.0) == (0.0, 0.0)
    assert frozen.freeze(0.04) == (0.0, 0.0)
    assert identical(w, before)
    assert frozen.grid is None
    frozen.freeze(0.5)
    before = w.clone()
    for portion in (0.5, 0.3, 0.0):
        assert frozen.freeze(portion) == (0.0, 0.0)
    assert identical(w, before)
    assert frozen.frozen == 5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1e-4, 1.0, 1e4, 1e30])
def test_rounding_sums_are_those_of_double_precision(scale: float, dtype: torch.dtype) -> None:
    w = random(5000, dtype=dtype, scale=scale)
    if not w.abs().max() < 49152 and dtype is torch.float16:
        w.clamp_(-40000, 40000)
    if dtype is torch.float16 and scale == 1e-30:
        w.fill_(2**-14)
    before = w.double().clone()
    rounding = FrozenWeight("w", w, 3).freeze(1.0)
    assert rounding.signal == pytest.approx(before.square().sum().item(), rel=1e-10, abs=0)
    assert rounding.noise == pytest.approx((before - w.double()).square().sum().item(), rel=1e-10, abs=0)
    assert rounding.signal > 0


def test_the_grid_is_fixed_when_the_first_weights_freeze_and_grown_weights_saturate() -> None:
    w = random(100, dtype=torch.float16, scale=0.1)
    frozen = FrozenWeight("w", w, 4)
    frozen.freeze(0.5)
    grid = frozen.grid
    free = (~frozen.mask).nonzero().squeeze(1)
    w[free[0]], w[free[1]], w[free[2]] = 60000.0, -1.51 * 2**grid.n1, 2.0**-24
    frozen.freeze(1.0)  # 60000 by itself would ask for a level that float16 does not have
    assert frozen.grid == grid
    assert w[free[0]] == 2.0**grid.n1
    assert w[free[1]] == -(2.0**grid.n1)
    assert w[free[2]] == 0


def test_the_grid_of_least_error_is_fixed_by_all_weights_and_the_largest_saturate() -> None:
    w = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    best = PowerOfTwoGrid.from_weights(w, 2, exponent="mse")
    layer = FrozenWeight("w", torch.nn.Parameter(w.clone()), 2, exponent="mse", levels="paper")
    layer.freeze(0.2)
    assert layer.grid == best
    assert best.n1 == PowerOfTwoGrid.from_weights(w, 2).n1 - 2
    assert set(layer.parameter[layer.mask].abs().tolist()) == {2.0**best.n1}
    layer.freeze(1.0)
    assert layer.grid == best


def test_the_grid_stays_when_all_weights_that_are_left_have_shrunk() -> None:
    w = torch.full((8,), 1.0, dtype=torch.float16)
    frozen = FrozenWeight("w", w, 6)  # 16 levels; of float16's 40 powers of two
    frozen.freeze(0.5, "random")
    w[~frozen.mask] = 2.0**-16
    mask = frozen.mask
    w[mask] = 2.0**-16  # an optimizer's doing, before restore() repairs it
    frozen.freeze(1.0, "random")
    assert frozen.grid.n1 == 0
    assert (w[mask] == 1).all()
    assert (w[~mask] == 2.0**-15).all()  # a tie
    assert frozen.drifted() == 0


def test_a_tensor_of_zeros_gets_its_grid_once_a_weight_has_grown() -> None:
    for tiny in (1.0, 1e-60):  # the second needs a wider store for the frozen values
        w = torch.zeros(10, dtype=torch.float64)
        frozen = FrozenWeight("w", w)
        assert frozen.freeze(0.5) == (0.0, 0.0)
        assert frozen.grid == PowerOfTwoGrid(None)
        assert frozen.mask.tolist() == [True] * 5 + [False] * 5
        w += tiny
        frozen.restore()
        assert fractions(w) == [0] * 5 + fractions(torch.tensor([tiny] * 5, dtype=torch.float64))
        frozen.freeze(0.8)
        assert frozen.grid == PowerOfTwoGrid.from_weights(torch.tensor([tiny], dtype=torch.float64))
        w -= 5
        frozen.restore()
        assert identical(w[:5], torch.zeros(5, dtype=torch.float64))
        assert (w[5:8] == 2.0**frozen.grid.n1).all()
        assert (w[8:] == tiny - 5).all()
        assert frozen.drifted() == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("already", [0.0, 0.5])
def test_diverged_weights_are_refused_by_name_and_nothing_changes(already: float, bad: float) -> None:
    w = random(20)
    frozen = FrozenWeight("net.conv1.weight", w)
    frozen.freeze(already)
    w[int((~frozen.mask).nonzero()[-1])] = bad
    before, mask, grid = w.clone(), frozen.mask, frozen.grid
    with pytest.raises(ValueError, match=r"net\.conv1\.weight: .*nan or inf"):
        frozen.freeze(0.8)
    assert identical(w, before)
    assert torch.equal(frozen.mask, mask)
    assert (frozen.grid, frozen.frozen) == (grid, round(already * 20))


def test_a_grid_that_the_dtype_cannot_hold_is_refused_by_name_and_nothing_changes() -> None:
    w = torch.full((4,), 2.0**-20, dtype=torch.float16)
    frozen = FrozenWeight("head.weight", w)
    with pytest.raises(ValueError, match=r"head\.weight: torch\.float16 cannot hold"):
        frozen.freeze(0.5)
    assert (w == 2.0**-20).all()
    assert not frozen.mask.any()
    assert (frozen.grid, frozen.frozen) == (None, 0)


def test_impossible_settings_are_refused() -> None:
    w = torch.ones(4)
    with pytest.raises(ValueError, match=r"bits must be .* got 9"):
        FrozenWeight("w", w, 9)
    with pytest.raises(ValueError, match=r"underflow must be .* got 'zero'"):
        FrozenWeight("w", w, 5, "zero")
    with pytest.raises(TypeError, match=r"torch\.int64"):
        FrozenWeight("w", torch.ones(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"partition must be .* got 'largest'"):
        FrozenWeight("w", w).freeze(0.5, "largest")
    for portion in (1.5, -0.1, math.nan):
        with pytest.raises(ValueError, match=f"w: the portion .* got {portion}"):
            FrozenWeight("w", w).freeze(portion)


def test_a_state_whose_count_is_not_its_masks_is_refused() -> None:
    frozen = FrozenWeight("conv.weight", torch.ones(4))
    frozen.freeze(0.5)
    with pytest.raises(ValueError, match=r"conv\.weight: the saved mask has 2 weights, not 4"):
        frozen.load_state_dict(frozen.state_dict() | {"frozen": 4})


def test_freezing_leaves_the_parameter_and_its_module_what_they_were() -> None:
    layer = nn.Linear(5, 4)
    parameter, address = layer.weight, layer.weight.data_ptr()
    frozen = FrozenWeight("weight", layer.weight)
    frozen.freeze(0.5)
    assert layer.weight is parameter
    assert parameter.data_ptr() == address
    assert parameter.requires_grad
    assert parameter.is_leaf
    assert list(layer.state_dict()) == ["weight", "bias"]
    layer(torch.ones(1, 5)).sum().backward()  # writing to it has not disturbed autograd
    assert parameter.grad is not None


# Zeros of pruned networks


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("partition", ["magnitude", "random"])
def test_kept_zeros_stay_zero_and_portions_count_the_other_weights(partition: str, with_mask: bool) -> None:
    w = random(10, 10)
    pruned = random(10, 10, seed=1).abs() < 0.5
    w[0, 0], pruned[0, 0] = -0.0, True
    zeros = int(pruned.sum())
    if not with_mask:
        w[pruned] = 0
    frozen = FrozenWeight("w", w)
    for _ in range(2):  # once more changes nothing
        frozen.keep_zeros((~pruned).float() if with_mask else None)
        assert torch.equal(frozen.mask, pruned)
        assert frozen.frozen == zeros
    for portion in (0.0, 0.25, 0.5, 1.0):
        frozen.freeze(portion, partition)
        assert frozen.frozen == int(frozen.mask.sum()) == zeros + round(portion * (100 - zeros))
        w.add_(1.0)
        frozen.restore()
        assert identical(w[pruned], torch.zeros(zeros))
        resumed = FrozenWeight("w", w.clone())
        resumed.load_state_dict(frozen.state_dict())
        assert torch.equal(resumed.mask, frozen.mask)
        resumed.freeze(1.0, partition)
        assert resumed.frozen == 100


def test_weights_that_rounding_sent_to_zero_are_not_counted_as_kept() -> None:
    w = torch.tensor([1.0, 1e-9, 1e-9, 1.0])
    frozen = FrozenWeight("w", w)
    frozen.freeze(0.75)
    assert w.tolist() == [1, 0, torch.tensor(1e-9).item(), 1]
    frozen.keep_zeros()
    assert frozen.frozen == 3
    frozen.freeze(1.0)
    assert frozen.frozen == 4


# Gradients and restoring: the ranges in which frozen values live

KINDS = {  # dtype, typical weight, bits
    "float16": (torch.float16, 1.0, 5),
    "float16, subnormal levels": (torch.float16, 2.0**-19, 5),
    "bfloat16": (torch.bfloat16, 1.0, 5),
    "bfloat16, subnormal levels": (torch.bfloat16, 2.0**-128, 5),
    "float32": (torch.float32, 1.0, 5),
    "float32, near 1e-38": (torch.float32, 1e-38, 5),
    "float32, subnormal levels": (torch.float32, 2.0**-144, 5),
    "float32, near 1e38": (torch.float32, 3e37, 8),
    "float64": (torch.float64, 1.0, 5),
    "float64, near 1e-60": (torch.float64, 1e-60, 5),
    "float64, near 1e60": (torch.float64, 1e60, 8),
    "float64, near its end": (torch.float64, 2e307, 5),
}


def half_frozen(kind: str, *shape: int) -> FrozenWeight:
    dtype, scale, bits = KINDS[kind]
    w = random(*shape, dtype=dtype).clamp(-3, 3).mul_(scale)
    w.flatten()[::5] = 0
    w.flatten()[1::7] = -0.0
    frozen = FrozenWeight("w", w, bits)
    frozen.freeze(0.5, "random")
    assert (w[frozen.mask] == 0).any(), "the case needs weights that are frozen at zero"
    assert (w[frozen.mask] < 0).any()
    return frozen


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_frozen_weights_become_zero_and_the_others_keep_every_bit(kind: str) -> None:
    frozen = half_frozen(kind, 40, 30)
    parameter = frozen.parameter
    for seed in range(2):
        grad = every_kind_of_float(1200, parameter.dtype, seed)[torch.randperm(1200)].view(40, 30)
        parameter.grad = grad.clone()
        frozen.mask_gradient()
        assert identical(parameter.grad[~frozen.mask], grad[~frozen.mask])
        assert identical(parameter.grad[frozen.mask], torch.zeros(600, dtype=grad.dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_restoring_brings_back_every_frozen_bit_whatever_has_been_written_over_it(kind: str) -> None:
    frozen = half_frozen(kind, 40, 30)
    w, mask = frozen.parameter, frozen.mask
    values = w.clone()
    assert not (torch.signbit(values) & (values == 0))[mask].any()
    assert frozen.drifted() == 0
    for seed in range(2):
        disturbed = every_kind_of_float(1200, w.dtype, seed)[torch.randperm(1200)].view(40, 30)
        w.copy_(disturbed)
        assert frozen.drifted() == int((disturbed != values)[mask].sum()) > 500
        frozen.restore()
        assert frozen.drifted() == 0
        assert identical(w[mask], values[mask])
        free, expected = w[~mask], disturbed[~mask]
        nan = expected.isnan()
        assert torch.equal(free.isnan(), nan)
        assert identical(free[~nan], torch.where(expected == 0, 0.0, expected)[~nan])


@pytest.mark.parametrize("kind", KINDS)
def test_all_phases_stay_on_the_grid_in_every_range_of_every_dtype(kind: str) -> None:
    frozen = half_frozen(kind, 12, 9)
    w, grid = frozen.parameter, frozen.grid
    for portion in (0.7, 1.0):
        kept, mask = w.clone(), frozen.mask
        w.mul_(0.9)
        frozen.restore()
        frozen.freeze(portion)
        assert identical(w[mask], kept[mask])
        assert frozen.grid == grid
    levels = set(grid.levels.tolist())
    assert set(w.double().flatten().tolist()) <= levels
    state = frozen.state_dict()
    resumed = FrozenWeight("w", w.clone(), frozen.bits)
    resumed.load_state_dict(state)
    resumed.parameter.fill_(math.nan)
    resumed.restore()
    assert identical(resumed.parameter, w)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_with_all_weights_frozen_the_gradient_is_exactly_zero(dtype: torch.dtype) -> None:
    parameter = nn.Parameter(random(8, 8, dtype=dtype))
    frozen = FrozenWeight("w", parameter)
    frozen.freeze(1.0)
    parameter.grad = every_kind_of_float(64, dtype).view(8, 8)
    frozen.mask_gradient()
    assert identical(parameter.grad, torch.zeros(8, 8, dtype=dtype))


def test_nothing_happens_without_a_gradient_or_before_the_first_freeze() -> None:
    parameter = nn.Parameter(random(8))
    frozen = FrozenWeight("w", parameter)
    grad = every_kind_of_float(16, torch.float32)[:8]
    parameter.grad = grad.clone()
    before = parameter.detach().clone()
    frozen.mask_gradient()
    frozen.restore()
    assert identical(parameter.grad, grad)
    assert identical(parameter, before)
    parameter.grad = None
    frozen.freeze(0.5)
    frozen.mask_gradient()
    assert parameter.grad is None


def test_drifted_counts_the_frozen_weights_that_differ() -> None:
    w = random(20)
    frozen = FrozenWeight("w", w)
    frozen.freeze(0.5)
    inside, outside = frozen.mask.nonzero().squeeze(1), (~frozen.mask).nonzero().squeeze(1)
    w[outside] += 1
    assert frozen.drifted() == 0
    w[inside[0]] = torch.nextafter(w[inside[0]], torch.tensor(9.0))
    w[inside[1]] = math.nan
    w[inside[2]] *= -1
    assert frozen.drifted() == 3
    frozen.restore()
    assert frozen.drifted() == 0


# Memory formats and sizes

LAYOUTS = {
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "transposed view": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "every second of a larger tensor": lambda t: torch.stack([t, t + 1], -1)[..., 0],
    "first dimension of one": lambda t: t.reshape(1, -1, 3, 5),
    "one dimension": lambda t: t.reshape(-1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_memory_formats_do_not_change_what_freezing_masking_and_restoring_do(dtype: torch.dtype, layout: str) -> None:
    w = LAYOUTS[layout](random(8, 6, 3, 5, dtype=dtype))
    stride = w.stride()
    plain = w.clone(memory_format=torch.contiguous_format)
    one, other = FrozenWeight("w", w), FrozenWeight("w", plain)
    for portion in (0.4, 0.7):
        one.freeze(portion, "random")
        other.freeze(portion, "random")
        assert torch.equal(one.mask, other.mask)
        assert identical(w.contiguous(), plain)
        grad = random(*w.shape, dtype=dtype, seed=3)
        w.grad, plain.grad = LAYOUTS["one dimension"](grad).view(w.shape).contiguous(), grad.clone()
        for frozen in (one, other):
            frozen.mask_gradient()
            frozen.parameter.sub_(frozen.parameter.grad + 0.125)
            frozen.restore()
        assert identical(w.grad.contiguous(), plain.grad)
        assert identical(w.contiguous(), plain)
    assert w.stride() == stride


@pytest.mark.parametrize("shape", [(3, 400_000), (700, 300, 3, 3), (1_100_000,)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_tensors_larger_than_a_chunk_are_treated_like_small_ones(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    w = random(*shape, dtype=dtype)
    assert w.numel() > _CHUNK
    original = w.clone()
    grid = PowerOfTwoGrid.from_weights(w)
    frozen = FrozenWeight("w", w)
    rounding = frozen.freeze(0.6)
    mask = frozen.mask
    assert int(mask.sum()) == frozen.frozen == round(0.6 * w.numel())
    assert original[mask].abs().min() >= original[~mask].abs().max()
    assert identical(w, torch.where(mask, grid.quantize(original), original))
    changed = (original.double() - w.double()).square().sum().item()
    assert rounding.noise == pytest.approx(changed, rel=1e-9)
    values = w.clone()
    w.grad = torch.full_like(w, math.nan)
    frozen.mask_gradient()
    assert torch.equal(w.grad.isnan(), ~mask)
    assert (raw(w.grad)[mask] == 0).all()
    w.add_(1.0)
    moved = w.clone()
    assert frozen.drifted() == int((moved != values)[mask].sum())
    frozen.restore()
    assert identical(w, torch.where(mask, values, moved) + 0.0)
    frozen.freeze(1.0)
    assert identical(w, grid.quantize(torch.where(mask, values, moved)))
    packed = frozen.state_dict()["mask"]
    assert unpack_mask(packed, w.shape).all()


def test_large_channels_last_tensors_are_treated_like_contiguous_ones() -> None:
    plain = random(700, 300, 3, 3)
    w = plain.to(memory_format=torch.channels_last)
    for t in (w, plain):
        FrozenWeight("w", t).freeze(0.5)
    assert w.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(w, plain)


# Optimizers: the promise is bit-exactness under each of them

OPTIMIZERS = {
    "SGD, momentum, decay": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.05}, True),
    "SGD, Nesterov": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}, True),
    "Adam": (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1}, True),
    "Adam, amsgrad": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}, True),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.5}, True),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.005, "momentum": 0.9, "centered": True, "weight_decay": 0.1}, False),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.05, "weight_decay": 0.1}, True),
}
VARIANTS = [
    (name, variant)
    for name, (_, _, has_fused) in OPTIMIZERS.items()
    for variant in ("for-loop", "foreach", *(("fused",) if has_fused else ()))
]


@pytest.mark.parametrize(("name", "variant"), VARIANTS, ids=lambda value: value.replace(" ", ""))
def test_frozen_weights_keep_every_bit_under_every_optimizer_while_the_others_train(name: str, variant: str) -> None:
    make, options, _ = OPTIMIZERS[name]
    switches = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}[variant]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).to(
            memory_format=torch.channels_last
        )
        x, y = torch.randn(12, 1, 4, 4), torch.randint(0, 3, (12,))
    optimizer = make(net.parameters(), **options, **switches)
    weights = [FrozenWeight(f"{i}.weight", net[i].weight, bits) for i, bits in ((0, 5), (3, 3))]
    disturbed = 0
    for portion in (0.0, *PORTIONS):
        for weight in weights:
            weight.freeze(portion)
        masks = [weight.mask for weight in weights]
        at_start = [weight.parameter.detach().clone() for weight in weights]
        for _ in range(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            for weight in weights:
                weight.mask_gradient()
            optimizer.step()
            disturbed += sum(weight.drifted() for weight in weights)
            for weight, mask, start in zip(weights, masks, at_start, strict=True):
                weight.restore()
                assert torch.equal(raw(weight.parameter)[mask], raw(start)[mask])
        for mask, start, weight in zip(masks, at_start, weights, strict=True):
            assert (weight.parameter != start)[~mask].all(), "a free weight has not moved"
            assert weight.drifted() == 0
    assert disturbed > 0, "the optimizer never touched a frozen weight: the test shows nothing"
    for weight in weights:
        levels = set(weight.grid.levels.tolist())
        assert set(weight.parameter.flatten().tolist()) <= levels


def test_embeddings_with_sparse_gradients_stay_exact() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        table = nn.Embedding(30, 4, sparse=True)
        targets = torch.randn(30, 4)
    start = table.weight.detach().clone()
    optimizer = torch.optim.SGD(table.parameters(), lr=0.01)
    frozen = FrozenWeight("weight", table.weight)
    for portion in (0.4, 0.8, 1.0):
        frozen.freeze(portion)
        mask, values = frozen.mask, table.weight.detach().clone()
        for step in range(20):
            rows = torch.tensor([step % 10, step % 7, 3])
            optimizer.zero_grad()
            (table(rows) - targets[rows]).square().sum().backward()
            assert table.weight.grad.is_sparse
            frozen.mask_gradient()
            optimizer.step()
            frozen.restore()
            assert torch.equal(raw(table.weight)[mask], raw(values)[mask])
        assert (table.weight != values)[:10][~mask[:10]].all()
        if portion < 1:
            assert torch.equal(table.weight[10:][~mask[10:]], start[10:][~mask[10:]])
    assert torch.equal(table.weight, frozen.grid.quantize(table.weight))


# Saving and resuming


@settings(max_examples=40, deadline=None)
@given(bits=st.integers(0, 2**40 - 1))
def test_masks_of_every_size_survive_packing(bits: int) -> None:
    for size in range(41):
        mask = torch.tensor([bits >> i & 1 for i in range(size)], dtype=torch.bool)
        packed = pack_mask(mask)
        assert packed.dtype == torch.uint8
        assert packed.shape == (math.ceil(size / 8),)
        assert packed.tolist() == [sum(int(b) << i for i, b in enumerate(mask[k : k + 8])) for k in range(0, size, 8)]
        assert torch.equal(unpack_mask(packed, mask.shape), mask)


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (2, 3, 4), (0, 4)])
def test_masks_of_every_shape_survive_packing(shape: tuple[int, ...]) -> None:
    mask = random(*shape) > 0
    assert torch.equal(unpack_mask(pack_mask(mask), mask.shape), mask)
    assert torch.equal(pack_mask(mask.t().contiguous().t() if mask.dim() == 2 else mask), pack_mask(mask))


@pytest.mark.parametrize("packed", [torch.zeros(1), torch.zeros(3), torch.zeros(2, 1), torch.zeros(0)])
def test_a_packed_mask_of_the_wrong_length_or_type_is_refused(packed: Tensor) -> None:
    shape = torch.Size((3, 5))
    assert unpack_mask(torch.zeros(2, dtype=torch.uint8), shape).shape == shape
    with pytest.raises(ValueError, match=r"shape \(3, 5\) takes 2 bytes"):
        unpack_mask(packed.to(torch.uint8), shape)
    with pytest.raises(ValueError, match="takes 2 bytes"):
        unpack_mask(torch.zeros(2), shape)


@pytest.mark.parametrize("portion", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("start", [0.0, 1e-60, 1.0])
def test_a_saved_state_resumes_where_it_was_left(start: float, portion: float) -> None:
    w = random(9, 7, dtype=torch.float64).clamp_(-3, 3) * start
    original = FrozenWeight("w", w, 4, "truncate")
    original.freeze(portion)
    file = io.BytesIO()
    torch.save(original.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    kept = copy.deepcopy(state)

    resumed = FrozenWeight("w", w.clone(), 4, "truncate")
    resumed.load_state_dict(state)
    assert (resumed.grid, resumed.frozen) == (original.grid, original.frozen)
    assert torch.equal(resumed.mask, original.mask)
    assert resumed.drifted() == 0
    for weight in (original, resumed):  # and they go on alike
        weight.parameter.mul_(1.5).add_(start / 4)
        weight.restore()
        weight.freeze(0.7 if portion < 0.7 else 1.0)
    assert identical(resumed.parameter, original.parameter)
    assert torch.equal(resumed.mask, original.mask)
    assert resumed.grid == original.grid
    assert {k: v for k, v in state.items() if k != "mask"} == {k: v for k, v in kept.items() if k != "mask"}
    assert torch.equal(state["mask"], kept["mask"]), "the state has changed with the weight"


def test_a_loaded_state_replaces_the_one_before() -> None:
    w = random(20)
    frozen = FrozenWeight("w", w)
    nothing = frozen.state_dict()
    frozen.freeze(0.5)
    half, weights = frozen.state_dict(), w.clone()
    frozen.freeze(1.0)
    w.copy_(weights)
    frozen.load_state_dict(half)
    assert frozen.frozen == 10
    assert int(frozen.mask.sum()) == 10
    frozen.load_state_dict(nothing)
    assert (frozen.grid, frozen.frozen, bool(frozen.mask.any())) == (None, 0, False)
    w.fill_(7.0)
    frozen.restore()
    assert (w == 7).all()


def test_a_state_of_another_kind_of_parameter_is_refused_by_name() -> None:
    saved = FrozenWeight("w", random(4, 3))
    saved.freeze(0.5)
    state = saved.state_dict()
    for other, message in (
        (FrozenWeight("fc", random(3, 4)), r"fc: shape is \[3, 4\] here but \[4, 3\] in the saved state"),
        (FrozenWeight("fc", random(4, 3), 4), "fc: bits is 4 here but 5 in the saved state"),
        (FrozenWeight("fc", random(4, 3), 5, "truncate"), "fc: underflow is truncate here but nearest in the saved"),
    ):
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state)
        assert other.frozen == 0
        assert not other.mask.any()


@pytest.mark.parametrize("value", [0.7, 3 * 2.0**20, math.nan, math.inf])
def test_weights_that_are_not_those_of_the_state_are_refused_by_name_and_number(value: float) -> None:
    w = random(20)
    saved = FrozenWeight("w", w)
    saved.freeze(0.5)
    other = FrozenWeight("conv.weight", w.clone())
    other.parameter[saved.mask.nonzero()[:2]] = value
    with pytest.raises(ValueError, match=r"conv\.weight: 2 weights .* do not belong together"):
        other.load_state_dict(saved.state_dict())
    assert (other.grid, other.frozen) == (None, 0)
    assert not other.mask.any()


def test_free_weights_may_differ_from_those_the_state_was_saved_with() -> None:
    w = random(20)
    saved = FrozenWeight("w", w)
    saved.freeze(0.5)
    other = FrozenWeight("w", torch.where(saved.mask, w, 0.123))
    other.load_state_dict(saved.state_dict())
    assert torch.equal(other.mask, saved.mask)
