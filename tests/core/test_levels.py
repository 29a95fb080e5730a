"""Other levels than the paper's on the way of a weight: options, selection, freezing, a run."""

from __future__ import annotations

import bisect
import warnings
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import SCHEDULE, TinyModule, assert_quantized, assert_same_state, same_bits, trainer
from torch import nn

from inq_lightning import (
    FrozenWeight,
    INQCallback,
    Levels,
    Options,
    Quantizer,
    export_onnx,
    inspect_file,
    load_packed,
    read_onnx,
    save_packed,
    select_parameters,
    to_packed,
)
from inq_lightning.core.frozen import fit_levels
from inq_lightning.core.schedule import Length
from inq_lightning.grid import PowerOfTwoGrid
from inq_lightning.grid.levels import levels_of

KINDS: list[tuple[Any, int]] = [
    ("paper", 2),
    ("paper", 4),
    ("full", 3),
    ("full", 4),
    ("dense", 2),
    ("dense", 3),
    ("dense", 4),
    (Levels(False, (0, 3)), 2),
    (Levels(True, (0, 2, 3)), 3),
]


def nearest(x: float, grid: PowerOfTwoGrid) -> float:
    """By exact comparison with every level: ties go away from zero, a zero of either sign is taken for +0."""
    levels = [Fraction(v) for v in grid.levels.tolist() if v > 0 or (v == 0 and grid.has_zero)]
    size = abs(Fraction(x))
    place = bisect.bisect_left(levels, size)
    around = levels[max(place - 1, 0) : place + 1]
    best = min(around, key=lambda level: (abs(level - size), -level))
    if grid.has_zero and len(levels) > 1 and size < levels[1]:  # below the smallest level half of it decides
        best = levels[1] if size >= levels[1] / 2 else levels[0]
    return float(-best if x < 0 else best)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    values=st.lists(st.floats(-8, 8, width=16), min_size=1, max_size=40),
    portions=st.lists(st.floats(0, 1), max_size=4).map(sorted),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_freezing_rounds_exactly_what_it_chooses_and_restores_it_bit_for_bit(
    kind: tuple[Any, int], values: list[float], portions: list[float], dtype: torch.dtype
) -> None:
    levels, bits = kind
    w = torch.tensor([v if abs(v) > 1e-3 else 0.5 for v in values]).to(dtype)
    frozen = FrozenWeight("w", w, bits, levels=levels)
    for portion in [*portions, 1.0]:
        before, mask = w.clone(), frozen.mask
        frozen.freeze(portion)
        new = frozen.mask & ~mask
        assert frozen.frozen == int(frozen.mask.sum()) >= round(portion * w.numel())
        assert same_bits(w[~new], before[~new])
        if frozen.grid is None:
            continue
        assert isinstance(frozen.grid, PowerOfTwoGrid)
        assert w[new].tolist() == [nearest(x, frozen.grid) for x in before[new].tolist()]
        kept = w.clone()
        w.add_(torch.ones_like(w))
        frozen.restore()
        assert same_bits(w[frozen.mask], kept[frozen.mask])
        w.copy_(kept)
    again = FrozenWeight("w", w.clone(), bits, levels=levels)
    again.load_state_dict(frozen.state_dict())
    assert again.grid == frozen.grid
    assert again.drifted() == 0


@pytest.mark.parametrize(("levels", "bits"), KINDS)
def test_a_run_ends_on_them_resumes_bit_identical_and_leaves_as_a_file(levels: Any, bits: int, tmp_path: Path) -> None:
    class Save(INQCallback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    module, callback = TinyModule(), Save(bits, SCHEDULE, levels=levels)
    trainer(callback).fit(module)
    assert_quantized(module, callback)
    want = levels_of(levels, bits)
    for layer in callback.layers:
        assert layer.grid is not None
        assert (layer.grid.levels / 2.0**layer.grid.step).abs().unique().tolist() == [
            *([0.0] if want.zero else []),
            *(2.0**k for k in want.exponents),
        ]
    resumed, after = TinyModule(), INQCallback(bits, SCHEDULE, levels=levels)
    trainer(after).fit(resumed, ckpt_path=tmp_path / "half.ckpt")
    assert_same_state(resumed, module)
    save_packed(module.net, tmp_path / "net.safetensors")
    assert_same_state(load_packed(tmp_path / "net.safetensors", TinyModule(seed=1).net), module.net)
    with pytest.raises(ValueError, match="levels"):
        trainer(INQCallback(bits, SCHEDULE, levels=Levels(True, (0,)))).fit(
            TinyModule(), ckpt_path=tmp_path / "half.ckpt"
        )


def test_two_bits_by_default_are_one_and_four_on_every_way_out(tmp_path: Path) -> None:
    module, callback = TinyModule(), INQCallback(2, SCHEDULE)
    trainer(callback).fit(module)
    assert all(layer.grid == PowerOfTwoGrid(layer.n1, 2, family="dense") for layer in callback.layers)
    for packed in (to_packed(module, layers=callback.layers), to_packed(module)):
        assert same_bits(packed.get_submodule("net.0").weight, module.net[0].weight)  # type: ignore[arg-type]
    save_packed(module, tmp_path / "net.safetensors", layers=callback.layers)
    assert [layer.bits for layer in inspect_file(tmp_path / "net.safetensors").layers] == [2] * len(callback.layers)
    assert_same_state(load_packed(tmp_path / "net.safetensors", TinyModule(seed=1)), module)
    net, names = module.net, {layer.name: layer.name.removeprefix("net.") for layer in callback.layers}
    layers = [replace(layer, name=names[layer.name]) for layer in callback.layers]
    export_onnx(net, tmp_path / "net.onnx", torch.randn(2, 8), layers=layers)
    contents = read_onnx(tmp_path / "net.onnx")
    assert [layer.grid for layer in contents.layers or ()] == [layer.grid for layer in layers]
    for layer in layers:
        assert same_bits(contents.state_dict[layer.name], net.state_dict()[layer.name])


@pytest.mark.parametrize(
    ("bits", "without", "with_zero"),
    [(2, "dense", "full"), (3, "dense", "full"), (4, "full", "full"), (5, "paper", "paper")],
)
def test_auto_has_a_zero_only_where_one_is_needed(bits: int, without: str, with_zero: str) -> None:
    w = torch.linspace(-1, 1, 400)
    assert fit_levels(w, bits, "auto") == without
    assert fit_levels(w, bits, "auto", zero=True) == with_zero
    some = w.clone()
    some[:4] = 0  # a hundredth
    assert fit_levels(some, bits, "auto") == without
    some[:5] = 0
    assert fit_levels(some, bits, "auto") == with_zero
    assert fit_levels(some, bits, "dense") == "dense"


def padded() -> nn.Module:
    return nn.Sequential(nn.Embedding(6, 4, padding_idx=0), nn.Linear(4, 4))


def test_a_zero_is_kept_for_padding_and_for_pruned_weights() -> None:
    chosen = select_parameters(padded(), 2, embeddings=True)
    assert [one.levels for one in chosen] == ["full", "auto"]
    assert [one.levels for one in select_parameters(padded(), 2, pruned=True)] == ["full"]
    module = TinyModule()
    with torch.no_grad():
        module.net[0].weight[:, ::2] = 0.0
    zeros = module.net[0].weight == 0
    callback = INQCallback(2, SCHEDULE, keep_zeros=True)
    trainer(callback).fit(module)
    assert not module.net[0].weight[zeros].any()
    assert_quantized(module, callback)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": "dense", "keep_zeros": True}, "keep_zeros=True needs a zero"),
        ({"layer_levels": {"a": "dense"}, "keep_zeros": True}, "keep_zeros=True needs a zero"),
        ({"levels": "dense", "underflow": "truncate"}, "underflow='truncate' needs a zero"),
        ({"levels": "all"}, "levels: must be one of 'auto', 'paper', 'full', 'dense'"),
        ({"levels": Levels(False, (0, 1, 2, 3))}, "takes 3 bits, more than the 2"),
        ({"layer_levels": {"a": 3}}, r"layer_levels\['a'\]"),
        ({"layer_levels": ["a"]}, "layer_levels must be a mapping"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(2, **options)


def test_levels_that_a_layer_cannot_have_are_refused_by_its_name() -> None:
    with pytest.raises(ValueError, match=r"0\.weight: the row of its padding_idx .*layer_levels"):
        select_parameters(padded(), 2, embeddings=True, levels="dense")
    with pytest.raises(ValueError, match=r"1\.weight: levels: .*takes 3 bits"):
        select_parameters(padded(), 3, layer_bits={"1": 2}, levels=Levels(False, (0, 1, 2, 3)))
    with pytest.raises(ValueError, match="layer_levels pattern 'none'"):
        select_parameters(padded(), 3, layer_levels={"none": "full"})
    with pytest.raises(ValueError, match=r"w: .*needs a zero"):
        FrozenWeight("w", torch.zeros(3), 2, levels="dense").freeze(1.0)
    with pytest.raises(ValueError, match=r"w: levels='dense' have no zero to keep"):
        FrozenWeight("w", torch.zeros(3), 2, levels="dense").keep_zeros()


def test_the_last_matching_pattern_decides() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    chosen = select_parameters(net, 3, levels="paper", layer_levels={"*": "full", "1": "dense"})
    assert [one.levels for one in chosen] == ["full", "dense"]


def freeze(net: nn.Module, **options: Any) -> None:
    quantizer = Quantizer(Options(2, SCHEDULE, **options))
    quantizer.attach(net)
    length = Length(epochs=4)
    quantizer.begin(net, length, lambda unit: 0)
    quantizer.advance(net, 0)


def test_zeros_that_named_levels_do_away_with_are_warned_of(recwarn: pytest.WarningsRecorder) -> None:
    def net() -> nn.Module:
        linear = nn.Linear(10, 10)
        nn.init.zeros_(linear.weight[0])
        return nn.Sequential(linear)

    freeze(net())
    assert not len(recwarn)
    with pytest.warns(UserWarning, match=r"exactly zero[\s\S]*0\.weight: 10\.0%[\s\S]*levels=\"auto\""):
        freeze(net(), levels="dense")


def test_a_checkpoint_of_before_there_were_levels_keeps_its_grids(tmp_path: Path) -> None:
    class Save(INQCallback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "old.ckpt")

    module, callback = TinyModule(), Save(3, SCHEDULE, levels="paper")
    trainer(callback).fit(module)
    saved = torch.load(tmp_path / "old.ckpt", weights_only=False)
    state = saved["callbacks"]["INQCallback"]
    for name in ("levels", "layer_levels"):
        del state["options"][name]
    torch.save(saved, tmp_path / "old.ckpt")
    resumed, after = TinyModule(), INQCallback(3, SCHEDULE)
    trainer(after).fit(resumed, ckpt_path=tmp_path / "old.ckpt")
    assert_same_state(resumed, module)


def test_a_layer_that_is_trained_only_after_a_resume_has_the_levels_asked_for() -> None:
    def begin(trained: bool, state: dict[str, Any] | None = None) -> tuple[nn.Module, Quantizer]:
        net = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9)).requires_grad_(trained)
        net[1].requires_grad_(True)
        quantizer = Quantizer(Options(3, {2: 1.0}, layer_levels={"0": "paper"}))
        if state is not None:
            quantizer.load_state_dict(state)
        quantizer.attach(net)
        quantizer.begin(net, Length(epochs=4), lambda unit: 0)
        return net, quantizer

    _, before = begin(trained=True)
    net, resumed = begin(trained=False, state=before.state_dict())
    net.requires_grad_(True)
    resumed.attach(net)
    resumed.advance(net, 2)
    assert {layer.name: layer.grid.family for layer in resumed.layers} == {  # type: ignore[union-attr]
        "0.weight": "paper",
        "1.weight": "dense",
    }


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["full", "dense", "full"]),
        ({"levels": "paper", "layer_levels": {"2": Levels(False, (0, 3))}}, ["paper", "paper", Levels(False, (0, 3))]),
        ({"underflow": "truncate"}, ["full", "full", "full"]),
        ({"keep_zeros": True}, ["full", "full", "full"]),
    ],
    ids=str,
)
def test_the_plan_tells_the_levels_that_freezing_takes(options: dict[str, Any], expected: list[Any]) -> None:
    net = nn.Sequential(nn.Embedding(6, 4, padding_idx=0), nn.Linear(4, 5), nn.Linear(5, 4))
    with torch.no_grad():
        net[2].weight[0] = 0.0
    quantizer = Quantizer(Options(3, {0: 1.0}, embeddings=True, **options))
    plan = quantizer.plan(net)
    assert [layer.levels for layer in plan.layers] == expected
    quantizer.attach(net)
    quantizer.begin(net, Length(epochs=4), lambda unit: 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the zeros that levels of one's own do away with
        quantizer.advance(net, 0)
    assert [layer.grid.family for layer in quantizer.layers] == expected  # type: ignore[union-attr]


def test_a_network_without_memory_can_be_planned() -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(4, 4))
    assert [layer.levels for layer in Quantizer(Options(2)).plan(net).layers] == ["dense"]


def test_options_are_plain_values_that_make_the_same_options() -> None:
    options = Options(3, levels=Levels(False, (0, 2, 3, 4)), layer_levels={"a": "full"})
    values = options.as_dict()
    assert values["levels"] == {"zero": False, "exponents": [0, 2, 3, 4]}
    assert Options(3, levels=values["levels"], layer_levels=values["layer_levels"]) == options
    assert options.differences(values) == []
    assert Options(3).differences({**Options(3).as_dict(), "levels": "dense"}) == []  # what auto stands for
    assert Options(3, layer_levels={}).differences(Options(3).as_dict()) == []  # what Hydra gives for none
    assert "levels" in Options(3).differences({**Options(3).as_dict(), "levels": "paper"})[0]
