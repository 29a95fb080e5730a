from __future__ import annotations

from datetime import timedelta

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import identical
from processes import launch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from inq_lightning import Options, Quantizer
from inq_lightning.core import sharding
from inq_lightning.core.frozen import FrozenWeight
from inq_lightning.core.partition import scores, select

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def by_sorting(score: Tensor, free: Tensor, count: int) -> Tensor:
    """The highest scores first, the lowest index first among equals."""
    values, allowed = score.double().flatten().tolist(), free.flatten().tolist()
    order = sorted((i for i, ok in enumerate(allowed) if ok), key=lambda i: (-values[i], i))
    chosen = torch.zeros(len(values), dtype=torch.bool)
    chosen[order[:count]] = True
    return chosen.view(free.shape)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    size = draw(st.integers(0, 300))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kind = draw(st.sampled_from(["all different", "few values", "zeros", "narrow", "extremes"]))
    if kind == "all different":
        score = torch.randn(size, generator=generator).abs()
    elif kind == "zeros":
        score = torch.zeros(size)
    elif kind == "narrow":  # equal high digits, told apart by the last bits only
        score = 1 + torch.randint(0, 5, (size,), generator=generator) * torch.finfo(dtype).eps
    else:
        info = torch.finfo(dtype)
        values = [0.0, 0.5, 1.0, 3.0]
        if kind == "extremes":
            values = [0.0, info.smallest_normal * info.eps, info.smallest_normal, info.max, 1.0]
        score = torch.tensor(values, dtype=torch.float64)[torch.randint(0, len(values), (size,), generator=generator)]
    free = torch.rand(size, generator=generator) < draw(st.sampled_from([0.0, 0.1, 0.6, 1.0]))
    return score.to(dtype), free, draw(st.integers(0, int(free.sum())))


@settings(max_examples=300, deadline=None)
@given(problem=problems())
def test_exactly_the_highest_scores_are_chosen_and_ties_go_to_the_lowest_index(
    problem: tuple[Tensor, Tensor, int],
) -> None:
    score, free, count = problem
    before, free_before = score.clone(), free.clone()
    chosen = select(score, free, count)
    assert chosen.dtype == torch.bool
    assert torch.equal(chosen, by_sorting(score, free, count))
    assert identical(score, before)
    assert torch.equal(free, free_before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(7,), (4, 5), (3, 4, 2, 2), (1, 257), (70_001,)])
def test_every_count_and_shape_agrees_with_sorting(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    score = torch.randint(0, 9, shape, generator=generator).to(dtype)
    free = torch.rand(shape, generator=generator) < 0.7
    candidates = int(free.sum())
    counts = range(candidates + 1) if candidates < 200 else (0, 1, candidates // 3, candidates - 1, candidates)
    for count in counts:
        assert torch.equal(select(score, free, count), by_sorting(score, free, count))


def test_a_choice_shared_with_the_candidates_does_not_change_them() -> None:
    free = torch.tensor([True, False, True])
    chosen = select(torch.ones(3), free, 2)
    chosen.zero_()
    assert free.tolist() == [True, False, True]


@pytest.mark.parametrize("count", [-1, 3, 100])
def test_more_weights_than_there_are_free_cannot_be_chosen(count: int) -> None:
    with pytest.raises(ValueError, match=f"cannot choose {count} of 2 free weights"):
        select(torch.ones(4), torch.tensor([True, False, True, False]), count)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_choosing_portion_by_portion_ends_where_choosing_at_once_does(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 200))
    score = torch.tensor(data.draw(st.lists(st.sampled_from([0.0, 1.0, 2.0, 5.5]), min_size=size, max_size=size)))
    steps = sorted(data.draw(st.lists(st.integers(0, size), min_size=1, max_size=6)))
    frozen = torch.zeros(size, dtype=torch.bool)
    for total in steps:
        chosen = select(score, ~frozen, total - int(frozen.sum()))
        assert not (chosen & frozen).any()
        frozen |= chosen
        assert torch.equal(frozen, by_sorting(score, torch.ones(size, dtype=torch.bool), total))


def test_magnitude_scores_are_absolute_values() -> None:
    w = torch.tensor([[-2.0, 0.5], [-0.0, 1.0]])
    assert identical(scores(w, "magnitude"), torch.tensor([[2.0, 0.5], [0.0, 1.0]]))
    assert not scores(w.requires_grad_(), "magnitude").requires_grad


def test_the_random_order_depends_on_the_seed_and_the_name_only() -> None:
    w = torch.randn(40, 25)
    order = scores(w, "random", "net.weight", seed=3)
    assert order.shape == w.shape
    assert order.min() >= 0
    assert order.unique().numel() > 990
    torch.rand(5)  # the global generator's state plays no part
    assert torch.equal(scores(torch.zeros(40, 25), "random", "net.weight", seed=3), order)
    for name, seed in (("net.weight", 4), ("net.weight", 3 + 2**32), ("net.weight", -3), ("net2.weight", 3), ("", 3)):
        assert not torch.equal(scores(w, "random", name, seed), order), (name, seed)


def test_a_random_order_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    scores(torch.zeros(100), "random", "a")
    assert torch.equal(torch.get_rng_state(), state)


def test_the_random_partition_is_spread_evenly_over_the_tensor() -> None:
    w = torch.arange(10_000.0)
    chosen = select(scores(w, "random", "a"), torch.ones_like(w, dtype=torch.bool), 5000)
    assert 2300 < chosen[:5000].sum() < 2700  # 4 standard deviations are 100


@pytest.mark.parametrize("partition", ["magnitude", "random"])
@pytest.mark.parametrize(
    "layout",
    [
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        lambda t: t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    ],
    ids=["channels_last", "transposed", "permuted"],
)
def test_memory_formats_do_not_change_which_weights_freeze(partition: str, layout: object) -> None:
    w = torch.randint(-6, 7, (8, 6, 3, 5), generator=torch.Generator().manual_seed(2)).float()
    other = layout(w)
    assert not other.is_contiguous()
    masks = []
    for t in (w, other):
        order = scores(t, partition, "w", 1)
        masks.append(select(order, torch.ones_like(order, dtype=torch.bool), 321))
    assert torch.equal(*masks)
    assert masks[0].sum() == 321


@pytest.mark.parametrize("partition", ["largest", "", None])
def test_an_unknown_partition_is_refused_by_name(partition: object) -> None:
    with pytest.raises(ValueError, match="magnitude, random") as error:
        scores(torch.ones(1), partition)
    assert repr(partition) in str(error.value)


# Sharded tensors: real processes, compared with one process that has the whole tensor.

WORLD = 4
SHAPES = ((7, 3), (2, 5, 3))  # 7 rows are uneven on 2 and 3 ranks; of 3 ranks, one gets none of 2 rows
PORTIONS = (0.3, 0.8, 1.0)


def whole_tensors(dtype: torch.dtype) -> list[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    tensors = [("zero", torch.zeros(SHAPES[0], dtype=dtype))]
    for shape in SHAPES:
        tensors.append((f"different {shape}", torch.randn(shape, generator=generator).to(dtype)))
        tensors.append((f"tied {shape}", torch.randint(-2, 3, shape, generator=generator).to(dtype)))
    return tensors


def check_on_mesh(
    mesh: DeviceMesh,
    placements: tuple[object, ...],
    partition: str = "magnitude",
    dtype: torch.dtype = torch.float32,
    bits: int = 4,
) -> None:
    for name, whole in whole_tensors(dtype):
        plain = FrozenWeight(name, whole.clone(), bits)
        spread = FrozenWeight(name, distribute_tensor(whole.clone(), mesh, placements, src_data_rank=None), bits)
        for portion in PORTIONS:
            where = (name, placements, partition, dtype, portion)
            rounding, single = spread.freeze(portion, partition, 1), plain.freeze(portion, partition, 1)
            assert tuple(rounding) == pytest.approx(tuple(single), rel=1e-12), where
            assert spread.frozen == plain.frozen == round(portion * whole.numel()), where
            assert spread.grid == plain.grid, where
            assert torch.equal(spread.mask, sharding.local_part(plain.mask, spread.parameter)), where

            # Re-train a little: only what is free moves, here as there.
            for weight in (plain, spread):
                moved = torch.linspace(-0.5, 0.5, whole.numel()).view(whole.shape).to(dtype)
                sharding.local(weight.parameter).add_(sharding.local_part(moved, weight.parameter))
                weight.restore()
            assert spread.drifted() == 0, where
            assert identical(
                sharding.local(spread.parameter), sharding.local_part(plain.parameter, spread.parameter)
            ), where
            if portion != 0.8:
                continue

            # The saved state does not tell how many processes wrote it.
            state, expected_state = spread.state_dict(), plain.state_dict()
            assert torch.equal(state.pop("mask"), expected_state["mask"]), where
            assert state == {k: v for k, v in expected_state.items() if k != "mask"}, where
            again = distribute_tensor(plain.parameter.clone(), mesh, placements, src_data_rank=None)
            reloaded = FrozenWeight(name, again, bits)
            reloaded.load_state_dict(expected_state)
            assert (reloaded.grid, reloaded.frozen) == (plain.grid, plain.frozen), where
            sharding.local(again).fill_(9.0)
            reloaded.restore()
            expected = torch.where(plain.mask, plain.parameter, 9.0)
            assert identical(sharding.local(again), sharding.local_part(expected, again)), where


def check_gradients_and_errors(mesh: DeviceMesh) -> None:
    whole = torch.randn(7, 3, generator=torch.Generator().manual_seed(6))
    parameter = distribute_tensor(whole.clone(), mesh, (Shard(0),), src_data_rank=None).requires_grad_()
    frozen = FrozenWeight("w", parameter)
    frozen.freeze(0.5)
    parameter.grad = distribute_tensor(torch.full((7, 3), torch.inf), mesh, (Shard(0),), src_data_rank=None)
    frozen.mask_gradient()
    mask = sharding.full(frozen.mask, parameter)
    assert identical(parameter.grad.full_tensor(), torch.where(mask, 0.0, torch.inf))

    # One bad weight in one process is an error in all of them, or the others would wait for ever.
    bad = whole.clone()
    bad[6, 2] = torch.nan
    diverged = FrozenWeight("conv.weight", distribute_tensor(bad, mesh, (Shard(0),), src_data_rank=None))
    with pytest.raises(ValueError, match=r"conv\.weight: .*nan or inf"):
        diverged.freeze(0.5)
    assert diverged.frozen == 0
    assert not diverged.mask.any()
    free = torch.zeros(7, 3, dtype=torch.bool)
    free[4, 1] = True
    chosen = select(sharding.local(parameter).abs(), sharding.local_part(free, parameter), 1, like=parameter)
    assert torch.equal(sharding.full(chosen, parameter), free)
    with pytest.raises(ValueError, match="cannot choose 2 of 1 free weights"):
        select(sharding.local(parameter).abs(), sharding.local_part(free, parameter), 2, like=parameter)


def check_plan(mesh: DeviceMesh) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 7), torch.nn.Linear(7, 3))
    for layer, zeros in zip(net, (0, 1), strict=True):
        whole = layer.weight.detach().clone()
        whole[:zeros] = 0
        layer.weight = torch.nn.Parameter(distribute_tensor(whole, mesh, (Shard(0),), src_data_rank=None))
    assert [layer.levels for layer in Quantizer(Options(3)).plan(net).layers] == ["dense", "full"]


def check_on_meshes() -> None:
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = distributed.get_rank()
    two, three = DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [0, 1, 2])  # every process must build all meshes
    square = DeviceMesh("cpu", [[0, 1], [2, 3]])
    if rank < 2:
        check_on_mesh(two, (Shard(0),))
    if rank < 3:
        check_on_mesh(three, (Shard(0),))
        check_on_mesh(three, (Shard(0),), "random")
        check_on_mesh(three, (Shard(0),), dtype=torch.bfloat16)
        check_on_mesh(three, (Shard(0),), bits=2)  # without a zero, unless there are zeros in some piece
        check_on_mesh(three, (Shard(1),))
        check_on_mesh(three, (Shard(1),), "random")
        check_on_mesh(three, (Replicate(),))
        check_gradients_and_errors(three)
        check_plan(three)
    check_on_mesh(square, (Replicate(), Shard(0)))
    check_on_mesh(square, (Shard(0), Shard(1)))
    distributed.barrier()


def test_sharded_tensors_freeze_exactly_as_whole_ones_do() -> None:
    launch(WORLD, check_on_meshes)


def test_plain_tensors_pass_through_the_sharding_helpers() -> None:
    w = torch.randn(3, 4).requires_grad_()
    assert not isinstance(w, DTensor)
    assert sharding.local(w).data_ptr() == w.data_ptr()
    assert not sharding.local(w).requires_grad
    flat = torch.tensor([0, 5, 11])
    assert torch.equal(sharding.global_index(flat, w), flat)
    assert torch.equal(sharding.local_part(flat, w), flat)
    assert torch.equal(sharding.full(flat, w), flat)
    assert torch.equal(sharding.sum_over_shards(flat.clone(), w), flat)
    assert torch.equal(sharding.max_over_shards(flat.clone(), w), flat)
