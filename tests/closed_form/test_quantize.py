"""Whole networks, quantized without training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule
from support import assert_same_state
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from inq_lightning import PowerOfTwoGrid, quantize
from inq_lightning.closed_form import quantize as walk


class Cnn(nn.Module):
    """Normal, depthwise and transposed convolutions with batch norms, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8, bias=False, padding_mode="reflect")
        self.norm2 = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu_(self.norm1(self.first(x)))
        x = functional.relu_(self.norm2(self.depthwise(x)))
        return self.head(functional.relu(self.up(x)).mean((2, 3)))  # type: ignore[no-any-return]


class Plain(nn.Module):
    """No norms; one weight in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)
        self.c.weight = self.b.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.b(torch.relu(self.a(x))))
        return self.head(torch.tanh(self.c(x)))  # type: ignore[no-any-return]


class Attentive(nn.Module):
    """A transformer layer and a recurrent one, over inputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.transformer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.recurrent = nn.GRU(16, 12, batch_first=True)
        self.group = nn.GroupNorm(3, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        x = self.transformer(self.embedding(tokens), src_key_padding_mask=padding)
        return self.head(self.group(self.recurrent(x)[0][:, -1]))  # type: ignore[no-any-return]


def images(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(32, 3, 9, 9, generator=generator) + 0.5 for _ in range(count)]


def vectors(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    mixing = torch.randn(12, 12, generator=generator)
    return [torch.randn(64, 12, generator=generator) @ mixing / 3 for _ in range(count)]


def sentences(count: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    padding = torch.arange(6) >= 5
    return [
        {"tokens": torch.randint(20, (32, 6), generator=generator), "padding": padding.expand(32, 6)}
        for _ in range(count)
    ]


def made(kind: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
                nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
    return model.eval()


NETWORKS: list[tuple[Callable[[], nn.Module], Callable[[], list[Any]]]] = [
    (Cnn, images),
    (Plain, vectors),
    (Attentive, sentences),
]


@torch.no_grad()
def call(model: nn.Module, batch: Any) -> Tensor:
    return model(**batch) if isinstance(batch, dict) else model(batch)  # type: ignore[no-any-return]


def miss(model: nn.Module, original: nn.Module, batches: list[Any]) -> float:
    """Mean squared error of the outputs over their variance."""
    ours, theirs = (torch.cat([call(m, batch) for batch in batches]) for m in (model, original))
    return float((ours - theirs).square().mean() / theirs.var())


def rounded(model: nn.Module, layers: list[Any]) -> nn.Module:
    """Every weight at the nearest level of a grid of the same kind."""
    model = copy.deepcopy(model)
    for layer in layers:
        weight = model.get_parameter(layer.name)
        grid = PowerOfTwoGrid.from_weights(weight, layer.bits, exponent="mse", family=layer.grid.family)
        weight.data.copy_(grid.quantize(weight))
    return model


@pytest.mark.parametrize(("kind", "batches"), NETWORKS)
@pytest.mark.parametrize(("bits", "levels"), [(2, "dense"), (3, "paper"), (4, "full")])
def test_every_weight_is_a_level_of_its_grid_and_outputs_are_nearer_than_by_rounding(
    kind: Callable[[], nn.Module], batches: Callable[[], list[Any]], bits: int, levels: Any
) -> None:
    model = made(kind)
    found = quantize(model, batches(), bits, levels=levels)
    for layer in found.layers:
        weight = found.model.get_parameter(layer.name)
        assert layer.grid is not None
        assert layer.grid.bits == layer.bits == bits
        assert layer.frozen == weight.numel()
        assert torch.equal(layer.grid.round(weight), weight), layer.name
        assert layer.nearest == ""
        assert layer.snr_db is not None
        assert layer.snr_db > 3
    fresh = batches()[:1] if kind is Attentive else [batch.flip(0) * 0.9 for batch in batches()]
    assert miss(found.model, model, fresh) < 0.6 * miss(rounded(model, found.layers), model, fresh)


@pytest.mark.parametrize(("kind", "batches"), NETWORKS)
def test_the_model_and_the_random_state_are_left_alone(
    kind: Callable[[], nn.Module], batches: Callable[[], list[Any]]
) -> None:
    model, given = made(kind), batches()
    model.train()
    next(model.children()).eval()
    next(model.parameters()).requires_grad_(False)
    before, kept, random = copy.deepcopy(model), copy.deepcopy(given), torch.get_rng_state()
    found = quantize(model, given, 3)
    assert_same_state(model, before)
    assert torch.equal(torch.get_rng_state(), random)
    for ours in (model, found.model):
        assert [m.training for m in ours.modules()] == [m.training for m in before.modules()]
        assert [p.requires_grad for p in ours.parameters()] == [p.requires_grad for p in before.parameters()]
    for ours, theirs in zip(given, kept, strict=True):
        ours, theirs = (x if isinstance(x, dict) else {"": x} for x in (ours, theirs))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    changed = {layer.name for layer in found.layers} | set(found.refitted)
    for name, tensor in found.model.state_dict().items():
        if name not in changed and name != "c.weight":
            assert torch.equal(tensor, before.state_dict()[name]), name


@pytest.mark.parametrize(("kind", "batches"), NETWORKS)
def test_the_same_again_gives_the_same_bits(kind: Callable[[], nn.Module], batches: Callable[[], list[Any]]) -> None:
    first, second = (quantize(made(kind), batches(), 2).model for _ in range(2))
    assert_same_state(first, second)


def test_a_depthwise_convolution_is_solved_channel_by_channel() -> None:
    torch.manual_seed(0)
    together = nn.Conv2d(4, 4, 3, padding=1, groups=4)
    nn.init.uniform_(together.weight, 0.4, 0.7)  # one power of two suits each channel, as it does all
    alone = nn.ModuleList(nn.Conv2d(1, 1, 3, padding=1) for _ in range(4))
    for k, layer in enumerate(alone):
        layer.load_state_dict({"weight": together.weight[k : k + 1].data, "bias": together.bias[k : k + 1].data})  # type: ignore[index]
    x = [torch.randn(8, 4, 6, 6) for _ in range(3)]
    found = quantize(together, x, 3)
    for k, layer in enumerate(alone):
        own = quantize(layer, [batch[:, k : k + 1] for batch in x], 3)
        assert own.layers[0].grid == found.layers[0].grid
        assert torch.equal(own.model.weight[0], found.model.weight[k])  # type: ignore[index]
        torch.testing.assert_close(own.model.bias[0], found.model.bias[k])  # type: ignore[index]


def test_norms_get_the_statistics_of_a_fresh_pass() -> None:
    found = quantize(made(Cnn), images(), 3).model
    fresh = copy.deepcopy(found)
    for name in ("norm1", "norm2"):
        norm = fresh.get_submodule(name)
        assert isinstance(norm, nn.BatchNorm2d)
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
        with torch.no_grad():
            fresh(torch.cat(images()))
        norm.eval()
        ours = found.get_submodule(name)
        torch.testing.assert_close(ours.running_mean, norm.running_mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.running_var, norm.running_var, rtol=1e-3, atol=1e-5)


def test_what_nothing_before_has_changed_stays_as_it_is() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
    found = quantize(model.eval(), images(), 3)
    assert "0.running_mean" not in found.refitted
    assert {"2.weight", "2.bias", "2.running_mean", "2.running_var", "4.bias"} <= set(found.refitted)


def test_a_shared_weight_is_solved_for_all_its_places_and_stays_shared() -> None:
    model = made(Plain)
    found = quantize(model, vectors(), 3)
    assert [layer.name for layer in found.layers] == ["a.weight", "b.weight", "head.weight"]
    assert found.model.b.weight is found.model.c.weight  # type: ignore[union-attr]
    assert {"b.bias", "c.bias"}.isdisjoint(found.refitted)  # one correction would not suit both


def test_a_weight_that_is_an_embedding_too_is_solved_first_as_all_others_see_it() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(30, 8)
            self.middle = nn.Linear(8, 8)
            self.head = nn.Linear(8, 30, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(torch.tanh(self.middle(self.embedding(tokens))))  # type: ignore[no-any-return]

    seen: list[str] = []
    tokens = [torch.arange(30).view(3, 10) for _ in range(2)]
    found = quantize(made(Tied), tokens, 4, levels="full", progress=lambda done, total, name: seen.append(name))
    assert seen == ["embedding.weight", "middle.weight", ""]
    assert found.model.head.weight is found.model.embedding.weight  # type: ignore[union-attr]


def test_what_cannot_be_solved_for_gets_the_nearest_levels_and_is_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = nn.Bilinear(12, 12, 4)
            self.unused = nn.Linear(12, 3)
            self.both = nn.Linear(12, 12, bias=False)
            self.head = nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.both(x) @ self.both.weight
            return self.pair(x, x) + self.head(x)  # type: ignore[no-any-return]

    model = made(Odd)
    found = quantize(model, vectors(), 3)
    reasons = {layer.name: layer.nearest for layer in found.layers}
    assert reasons == {
        "pair.weight": "what it is used for is no matrix product of it with an input",
        "unused.weight": "no batch reaches it",
        "both.weight": "it is multiplied with in ways that differ",
        "head.weight": "",
    }
    for layer in found.layers[:3]:
        weight = model.get_parameter(layer.name)
        assert layer.snr_db is None
        assert torch.equal(found.model.get_parameter(layer.name), layer.grid.quantize(weight))  # type: ignore[union-attr]


def test_weights_of_nothing_but_zeros_stay_zero() -> None:
    model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 4))
    nn.init.zeros_(model[0].weight)
    found = quantize(model, vectors(), 2)
    assert not found.model[0].weight.any()  # type: ignore[index]
    assert found.layers[0].n1 is None


def test_wide_layers_are_solved_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(Plain)
    whole = quantize(model, vectors(), 3)
    monkeypatch.setattr(walk, "COLUMNS", 5)
    cut = quantize(model, vectors(), 3)
    nearest = miss(rounded(model, whole.layers), model, vectors())
    assert miss(cut.model, model, vectors()) < 0.6 * nearest
    for layer in cut.layers:
        weight = cut.model.get_parameter(layer.name)
        assert torch.equal(layer.grid.round(weight), weight)  # type: ignore[union-attr]


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, torch.zeros(len(x))), lambda x: [x], lambda x: {"x": x}])
def test_batches_may_be_tensors_pairs_with_labels_or_mappings(wrap: Callable[[Tensor], Any]) -> None:
    expected = quantize(made(Plain), vectors(), 3).model
    assert_same_state(quantize(made(Plain), [wrap(x) for x in vectors()], 3).model, expected)


def test_a_dataloader_and_a_lightning_module_need_nothing_more() -> None:
    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = made(Plain)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)  # type: ignore[no-any-return]

    x = torch.cat(vectors())
    loader = DataLoader(TensorDataset(x, torch.zeros(len(x))), batch_size=64)
    found = quantize(Module(), loader, 3)
    assert_same_state(found.model.net, quantize(made(Plain), vectors(), 3).model)  # type: ignore[arg-type]


def test_several_inputs_and_a_mapping_as_the_input() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(12, 4), nn.Linear(12, 4)

        def forward(self, x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
            return (self.a(x) + self.b(y)) * scale  # type: ignore[no-any-return]

    class Whole(Two):
        def forward(self, batch: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
            return super().forward(batch["first"], batch["second"])

    pairs = list(zip(vectors(), reversed(vectors()), strict=True))
    expected = quantize(made(Two), [(*pair, "a label") for pair in pairs], 3).model
    named = [{"y": y, "x": x, "label": 0} for x, y in pairs]
    assert_same_state(quantize(made(Two), named, 3).model, expected)
    whole = [{"first": x, "second": y} for x, y in pairs]
    assert_same_state(quantize(made(Whole), whole, 3).model, expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_are_refused_by_name(bad: float) -> None:
    batches = vectors()
    batches[2][5, 3] = bad
    with pytest.raises(ValueError, match=r"batch 2 contains nan or inf, in argument 0"):
        quantize(made(Plain), batches)
    with pytest.raises(ValueError, match=r"batch 2 contains nan or inf, in argument 'x'"):
        quantize(made(Plain), [{"x": x} for x in batches])

    class Overflow(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.c(self.a(x) / 0))  # type: ignore[no-any-return]

    with pytest.raises(ValueError, match=r"inputs or outputs of b\.weight are nan or inf"):
        quantize(made(Overflow), vectors())


def test_no_batch_and_a_bare_tensor_are_refused() -> None:
    with pytest.raises(ValueError, match="batches is empty"):
        quantize(made(Plain), [])
    with pytest.raises(ValueError, match="a list or a DataLoader of batches, got one Tensor"):
        quantize(made(Plain), vectors()[0])


def test_options_select_as_they_do_in_training() -> None:
    found = quantize(made(Cnn), images(), 3, exclude=["first"], layer_bits={"head": 5})
    assert [layer.name for layer in found.layers] == ["depthwise.weight", "up.weight", "head.weight"]
    assert [layer.bits for layer in found.layers] == [3, 3, 5]
    assert torch.equal(found.model.first.weight, made(Cnn).first.weight)  # type: ignore[union-attr, arg-type]
    with pytest.raises(ValueError, match="matches no weight"):
        quantize(made(Cnn), images(), include=["nothing"])
    with pytest.raises(ValueError, match="bits must be"):
        quantize(made(Cnn), images(), 9)
    with pytest.raises(ValueError, match="levels: must be one of"):
        quantize(made(Cnn), images(), levels="none")  # type: ignore[arg-type]


def test_a_frozen_network_is_quantized_too() -> None:
    model = made(Plain).requires_grad_(False)
    assert len(quantize(model, vectors(), 3).layers) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_of_weights(dtype: torch.dtype) -> None:
    model = made(Plain).to(dtype)
    found = quantize(model, [x.to(dtype) for x in vectors()], 3)
    for layer in found.layers:
        weight = found.model.get_parameter(layer.name)
        assert weight.dtype is dtype
        assert torch.equal(layer.grid.round(weight), weight)  # type: ignore[union-attr]


def test_a_compiled_network_keeps_its_names() -> None:
    model = made(Plain)
    found = quantize(torch.compile(model), vectors(), 3)  # type: ignore[arg-type]
    expected = quantize(model, vectors(), 3)
    assert [layer.name for layer in found.layers] == [layer.name for layer in expected.layers]
    assert_same_state(found.model._orig_mod, expected.model)  # type: ignore[arg-type, union-attr]


def test_forward_passes_that_draw_or_write_do_not_leak() -> None:
    class Restless(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("passes", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.passes += 1  # type: ignore[operator]
            x.mul_(2)
            return super().forward(functional.dropout(x, 0.1, training=True))

    batches = vectors()
    first, second = (quantize(made(Restless), batches, 3) for _ in range(2))
    assert_same_state(first.model, second.model)
    assert first.model.passes == 0
    assert torch.equal(batches[0], vectors()[0])


@pytest.mark.parametrize("by_threshold", [True, False])
def test_where_the_networks_part_ways_each_layer_keeps_to_its_own_outputs(by_threshold: bool) -> None:
    class Expert(nn.Module):
        """Which rows the second layer sees depends on what the first one says."""

        def __init__(self) -> None:
            super().__init__()
            self.gate, self.expert = nn.Linear(12, 12), nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            gate = self.gate(x)
            chosen = gate[:, 0] > 0 if by_threshold else gate[:, 0].argsort()
            return self.expert(x[chosen])  # type: ignore[no-any-return]

    found = quantize(made(Expert), vectors(), 2)
    assert all(layer.snr_db is not None and layer.snr_db > 3 for layer in found.layers)  # other rows: about 0


def test_the_result_is_saved_with_its_records(tmp_path: Path) -> None:
    from inq_lightning import load_packed, save_packed

    found = quantize(made(Cnn), images(), 3, levels="paper")
    save_packed(found.model, tmp_path / "net.safetensors", layers=found.layers)
    loaded = Cnn()
    load_packed(tmp_path / "net.safetensors", loaded)
    assert_same_state(loaded, found.model)
