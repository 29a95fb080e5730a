from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from inq_lightning.core.matrices import _LAYERS
from inq_lightning.core.selection import select_parameters

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.*")


def names(module: nn.Module, **options: object) -> list[str]:
    return [s.name for s in select_parameters(module, **options)]


def small_net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


@pytest.mark.parametrize(
    ("layer", "weights"),
    [
        (nn.Linear(2, 3), ["weight"]),
        (nn.Bilinear(2, 3, 4), ["weight"]),
        (nn.Conv1d(2, 3, 3), ["weight"]),
        (nn.Conv2d(2, 4, 3, groups=2), ["weight"]),
        (nn.Conv3d(2, 3, 3), ["weight"]),
        (nn.ConvTranspose1d(2, 3, 3), ["weight"]),
        (nn.ConvTranspose2d(2, 3, 3), ["weight"]),
        (nn.ConvTranspose3d(2, 3, 3), ["weight"]),
        (nn.MultiheadAttention(4, 2), ["in_proj_weight", "out_proj.weight"]),
        (nn.MultiheadAttention(4, 2, add_bias_kv=True), ["in_proj_weight", "out_proj.weight"]),
        (
            nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
            ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"],
        ),
        (nn.RNN(2, 3), ["weight_ih_l0", "weight_hh_l0"]),
        (nn.GRU(2, 3, num_layers=2), ["weight_ih_l0", "weight_hh_l0", "weight_ih_l1", "weight_hh_l1"]),
        (
            nn.GRU(2, 3, bidirectional=True, bias=False),
            ["weight_ih_l0", "weight_hh_l0", "weight_ih_l0_reverse", "weight_hh_l0_reverse"],
        ),
        (nn.LSTM(2, 4, proj_size=3), ["weight_ih_l0", "weight_hh_l0", "weight_hr_l0"]),
        (
            nn.LSTM(2, 4, num_layers=2, proj_size=3, bidirectional=True),
            [
                f"weight_{kind}_l{n}{direction}"
                for n in (0, 1)
                for direction in ("", "_reverse")
                for kind in ("ih", "hh", "hr")
            ],
        ),
        (nn.RNNCell(2, 3), ["weight_ih", "weight_hh"]),
        (nn.LSTMCell(2, 3), ["weight_ih", "weight_hh"]),
        (nn.GRUCell(2, 3), ["weight_ih", "weight_hh"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_every_kind_of_layer_gives_its_weights_and_no_bias(layer: nn.Module, weights: list[str]) -> None:
    assert names(layer) == weights
    net = nn.Sequential(nn.LayerNorm(2), nn.ModuleDict({"block": layer}))
    selected = select_parameters(net, 3)
    assert [s.name for s in selected] == [f"1.block.{weight}" for weight in weights]
    parameters = dict(net.named_parameters())
    for s in selected:
        assert s.parameter is parameters[s.name]
        assert s.bits == 3
        assert s.pruning_mask is None


def test_a_transformer_layer_gives_its_attention_and_both_linear_layers() -> None:
    assert names(nn.TransformerEncoderLayer(4, 2, 8)) == [
        "self_attn.in_proj_weight",
        "self_attn.out_proj.weight",
        "linear1.weight",
        "linear2.weight",
    ]


def test_norms_activations_and_embeddings_are_left_out() -> None:
    net = nn.Sequential(
        nn.Embedding(5, 2),
        nn.EmbeddingBag(5, 2),
        nn.BatchNorm1d(2),
        nn.GroupNorm(1, 2),
        nn.LayerNorm(2),
        nn.PReLU(2),
        nn.Linear(2, 2),
    )
    assert names(net) == ["6.weight"]
    assert names(net, embeddings=True) == ["0.weight", "1.weight", "6.weight"]


def test_weights_that_are_not_trained_are_left_out() -> None:
    net = small_net()
    net[0].weight.requires_grad_(False)
    assert names(net) == ["4.weight"]
    net[4].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"no weight to quantize.*candidates were 0\.weight, 4\.weight"):
        select_parameters(net)
    assert names(net, trainable_only=False) == ["0.weight", "4.weight"]


def test_a_shared_weight_comes_once_under_the_first_layers_name() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    net[2].weight = net[0].weight
    assert names(net) == ["0.weight", "1.weight"]
    shared = nn.Linear(2, 2)
    assert names(nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})) == ["a.weight"]
    language_model = nn.Sequential(nn.Embedding(5, 2), nn.Linear(2, 5, bias=False))
    language_model[1].weight = language_model[0].weight
    assert names(language_model, embeddings=True) == ["0.weight"]


def test_patterns_match_names_of_parameters_and_of_layers() -> None:
    net = nn.ModuleDict({"stem": nn.Conv2d(1, 2, 3), "body": small_net(), "head": nn.Linear(2, 2)})
    everything = ["stem.weight", "body.0.weight", "body.4.weight", "head.weight"]
    assert names(net) == everything
    assert names(net, include=["body.0.weight"]) == ["body.0.weight"]
    assert names(net, include=["body.0"]) == ["body.0.weight"]
    assert names(net, include=["body*"]) == ["body.0.weight", "body.4.weight"]
    assert names(net, include=["*.0", "h??d"]) == ["body.0.weight", "head.weight"]
    assert names(net, include=["head", "stem"]) == ["stem.weight", "head.weight"], "in the module's order"
    assert names(net, exclude=["stem", "head.weight"]) == ["body.0.weight", "body.4.weight"]
    assert names(net, include=("body.*",), exclude=("*.4.*",)) == ["body.0.weight"]
    assert names(net, include=None, exclude=[]) == everything


def test_single_weights_of_a_layer_can_be_picked() -> None:
    lstm = nn.ModuleDict({"rnn": nn.LSTM(2, 3, num_layers=2)})
    assert names(lstm, include=["*weight_hh*"]) == ["rnn.weight_hh_l0", "rnn.weight_hh_l1"]
    assert names(lstm, exclude=["rnn.*_l0"]) == ["rnn.weight_ih_l1", "rnn.weight_hh_l1"]


def test_the_last_matching_bit_width_counts() -> None:
    net = nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))
    widths = {s.name: s.bits for s in select_parameters(net, 5, layer_bits={"*": 4, "1": 3, "2.weight": 2})}
    assert widths == {"0.weight": 4, "1.weight": 3, "2.weight": 2}
    widths = {s.name: s.bits for s in select_parameters(net, 5, layer_bits={"2.weight": 2, "1": 3, "*": 4})}
    assert widths == {"0.weight": 4, "1.weight": 4, "2.weight": 4}
    widths = {s.name: s.bits for s in select_parameters(net, layer_bits={"1": 8})}
    assert widths == {"0.weight": 5, "1.weight": 8, "2.weight": 5}


@pytest.mark.parametrize("bits", [1, 9, True, 4.0, "5"])
def test_impossible_bit_widths_are_refused_by_value(bits: object) -> None:
    for options in ({"bits": bits}, {"layer_bits": {"0": bits}}):
        with pytest.raises(ValueError, match=f"from 2 to 8, got {bits!r}"):
            select_parameters(small_net(), **options)


@pytest.mark.parametrize("option", ["include", "exclude", "layer_bits"])
def test_a_pattern_that_matches_nothing_is_refused_with_near_names(option: str) -> None:
    net = nn.ModuleDict({"backbone": nn.Linear(2, 2), "classifier": nn.Linear(2, 2)})
    patterns = {"clasifier.weight": 4} if option == "layer_bits" else ["backbone", "clasifier.weight"]
    with pytest.raises(ValueError, match=f"{option} pattern 'clasifier.weight' matches no weight") as error:
        select_parameters(net, **{option: patterns})
    assert "classifier.weight" in str(error.value).partition("near names:")[2]


def test_a_pattern_for_a_bias_or_a_norm_matches_nothing() -> None:
    for pattern in ("0.bias", "1", "1.weight"):
        with pytest.raises(ValueError, match=f"include pattern '{pattern}' matches no weight"):
            select_parameters(small_net(), include=[pattern])


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_text_in_place_of_a_list_is_refused_with_the_fix(option: str) -> None:
    with pytest.raises(ValueError, match=rf"{option} must be a list.*write \['head'\]"):
        select_parameters(small_net(), **{option: "head"})


def test_selecting_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no weight to quantize"):
        select_parameters(nn.Sequential(nn.BatchNorm1d(2), nn.ReLU()))
    with pytest.raises(ValueError, match=r"no weight to quantize.*candidates were 0\.weight, 4\.weight"):
        select_parameters(small_net(), exclude=["*"])
    with pytest.raises(ValueError, match="no weight to quantize"):
        select_parameters(small_net(), include=[])


def computed_weight(kind: str) -> nn.Module:
    layer = nn.Linear(3, 3)
    if kind == "old weight_norm":
        return nn.utils.weight_norm(layer)
    if kind == "weight_norm":
        return parametrizations.weight_norm(layer)
    if kind == "old spectral_norm":
        return nn.utils.spectral_norm(layer)
    if kind == "spectral_norm":
        return parametrizations.spectral_norm(layer)
    prune.l1_unstructured(layer, "weight", amount=0.5)
    return layer


KINDS = ["old weight_norm", "weight_norm", "old spectral_norm", "spectral_norm", "prune"]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_computed_from_others_are_refused_by_name_unless_left_out(kind: str) -> None:
    net = nn.ModuleDict({"normed": computed_weight(kind), "plain": nn.Linear(3, 3)})
    with pytest.raises(ValueError, match=r"normed\.weight is computed from other parameters.*or exclude it"):
        select_parameters(net)
    assert names(net, exclude=["normed"]) == ["plain.weight"]
    assert names(net, include=["plain"]) == ["plain.weight"]


def test_pruned_weights_can_be_taken_as_they_are_with_their_masks() -> None:
    net = nn.ModuleDict({"pruned": computed_weight("prune"), "plain": nn.Linear(3, 3)})
    pruned, plain = select_parameters(net, pruned=True, layer_bits={"pruned.weight": 3})
    assert (pruned.name, pruned.bits, plain.name, plain.bits) == ("pruned.weight_orig", 3, "plain.weight", 5)
    assert pruned.parameter is net["pruned"].weight_orig
    assert pruned.pruning_mask is net["pruned"].weight_mask
    assert plain.pruning_mask is None
    for kind in KINDS[:-1]:
        with pytest.raises(ValueError, match="weight is computed from other parameters"):
            select_parameters(computed_weight(kind), pruned=True)


def test_weights_are_selected_again_once_pruning_or_a_parametrization_is_removed() -> None:
    pruned, normed = computed_weight("prune"), computed_weight("weight_norm")
    prune.remove(pruned, "weight")
    nn.utils.parametrize.remove_parametrizations(normed, "weight")
    assert names(nn.Sequential(pruned, normed)) == ["0.weight", "1.weight"]


@pytest.mark.parametrize("layer", [nn.LazyLinear(3), nn.LazyConv2d(3, 3)])
def test_a_lazy_layer_is_refused_by_name_until_it_has_a_shape(layer: nn.Module) -> None:
    net = nn.ModuleDict({"stem": layer})
    with pytest.raises(ValueError, match=r"stem\.weight belongs to a lazy layer.*run one batch"):
        select_parameters(net)
    net["head"] = nn.Linear(2, 2)
    assert names(net, exclude=["stem"]) == ["head.weight"]
    del net["head"]
    layer(torch.zeros(2, 4, 5, 5))
    assert names(net) == ["stem.weight"]


def test_compiled_submodules_keep_their_names() -> None:
    net = nn.ModuleDict({"stem": nn.Conv2d(1, 2, 3), "body": small_net()})
    expected = select_parameters(net, include=["body.*"])
    net["body"] = torch.compile(net["body"])
    selected = select_parameters(net, include=["body.*"])
    assert [s.name for s in selected] == [s.name for s in expected] == ["body.0.weight", "body.4.weight"]
    assert all(a.parameter is b.parameter for a, b in zip(selected, expected, strict=True))
    assert names(torch.compile(small_net())) == ["0.weight", "4.weight"]


def test_the_module_is_left_as_it_was() -> None:
    net = small_net()
    before = {name: (p, p.detach().clone()) for name, p in net.named_parameters()}
    select_parameters(net, 3, exclude=["0"])
    after = dict(net.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is p and torch.equal(p, values) for name, (p, values) in before.items())


# ---- layers of other libraries and of one's own ----------------------------------------------------------------------


def library_layer(package: str, name: str, **shapes: tuple[int, ...]) -> nn.Module:
    """A layer as a library defines it, without the library."""
    layer = type(name, (nn.Module,), {"__module__": f"{package}.some.module"})()
    for attribute, shape in shapes.items():
        layer.register_parameter(attribute, nn.Parameter(torch.randn(shape)))
    return layer


@pytest.mark.parametrize(
    ("package", "name"), [(package, name) for package in _LAYERS for name in sorted(_LAYERS[package])]
)
def test_layers_of_well_known_libraries_are_selected_without_importing_them(package: str, name: str) -> None:
    layer = library_layer(package, name, weight=(3, 4), bias=(4,))
    heir = type("Heir", (type(layer),), {"__module__": "my.package"})()
    heir.weight = nn.Parameter(torch.zeros(2, 2))
    net = nn.ModuleDict({"first": layer, "heir": heir, "head": nn.Linear(2, 2)})
    assert names(net) == ["first.weight", "heir.weight", "head.weight"]
    assert package not in sys.modules or package == "torchvision"
    stranger = library_layer("my.package", name, weight=(3, 4))
    assert names(nn.ModuleDict({"first": stranger, "head": nn.Linear(2, 2)})) == ["head.weight"]


def test_every_matrix_of_a_layer_with_several_is_selected_and_no_norm() -> None:
    shapes = {"layer_norm_weight": (4,), "fc1_weight": (8, 4), "fc1_bias": (8,), "fc2_weight": (4, 8)}
    assert names(library_layer("transformer_engine", "LayerNormMLP", **shapes)) == ["fc1_weight", "fc2_weight"]


class Own(nn.Module):
    """Parameters of every kind of one's own: by themselves, in containers, of three dimensions, no matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.listed = nn.ParameterList([torch.randn(4, 4), torch.randn(4, 4)])
        self.named = nn.ParameterDict({"q": torch.randn(4, 4)})
        self.experts = nn.Module()
        self.experts.gate_up = nn.Parameter(torch.randn(3, 4, 8))
        self.embed = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm([2, 4])
        self.head = nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.ones(4))
        self.codes = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)


OWN = ["weight", "listed.0", "listed.1", "named.q", "experts.gate_up", "embed.weight"]


@pytest.mark.parametrize("name", OWN)
def test_a_pattern_takes_whatever_has_two_dimensions_or_more(name: str) -> None:
    assert names(Own(), include=[name]) == [name]


def test_patterns_take_layers_lists_and_everything() -> None:
    assert names(Own(), include=["listed", "experts*"]) == ["listed.0", "listed.1", "experts.gate_up"]
    everything = [*OWN, "norm.weight", "norm.bias", "head.weight"]
    assert names(Own(), include=["*"]) == everything
    assert names(Own(), include=["*"], exclude=["norm", "*embed*"]) == [*OWN[:-1], "head.weight"]
    widths = {s.name: s.bits for s in select_parameters(Own(), include=["*"], layer_bits={"experts": 3})}
    assert widths["experts.gate_up"] == 3
    for pattern in ("scale", "codes"):
        with pytest.raises(ValueError, match=f"include pattern '{pattern}' matches no weight"):
            names(Own(), include=[pattern])


def test_what_is_left_out_is_told_with_the_reason() -> None:
    net = nn.ModuleDict({"own": Own(), "frozen": nn.Linear(2, 2), "out": nn.Linear(2, 2), "copy": nn.Linear(2, 2)})
    net["frozen"].requires_grad_(False)
    optimizer = torch.optim.SGD([p for name, p in net.named_parameters() if not name.startswith("copy")])
    selection = select_parameters(net, exclude=["out"], optimizers=[optimizer])
    assert [s.name for s in selection] == ["own.head.weight"]
    reasons = {one.name: one.reason for one in selection.left_out}
    assert reasons == {
        **dict.fromkeys([f"own.{name}" for name in OWN[:-1]], "own layer type"),
        "own.embed.weight": "embedding",
        "frozen.weight": "frozen",
        "out.weight": "excluded",
        "copy.weight": "not optimized",
    }
    assert {one.layer for one in selection.left_out if one.name == "own.weight"} == {"Own"}
    assert selection.coverage.total == sum(p.numel() for n, p in net.named_parameters() if n in reasons) + 8
    reasons = {one.name: one.reason for one in select_parameters(net, include=["own.head"]).left_out}
    assert set(reasons.values()) == {"not included"}


def test_a_network_of_layers_that_nobody_knows_is_refused_with_what_to_write() -> None:
    net = Own()
    del net.head
    with pytest.raises(ValueError, match=r"no weight to quantize(.|\n)*include=\[\"\*\"\]"):
        select_parameters(net)


# ---- what is trained -------------------------------------------------------------------------------------------------


def test_copies_that_no_optimizer_holds_are_left_alone() -> None:
    net = nn.ModuleDict({"online": nn.Linear(2, 2)})
    net["average"] = copy.deepcopy(net["online"])
    one, other = (torch.optim.SGD(net[part].parameters()) for part in ("online", "average"))
    assert names(net, optimizers=[one]) == ["online.weight"]
    assert names(net, include=["*"], optimizers=[one]) == ["online.weight"]
    assert names(net, optimizers=[one, other]) == ["online.weight", "average.weight"]


def test_optimizers_of_something_else_say_nothing() -> None:
    elsewhere = torch.optim.SGD([nn.Parameter(torch.zeros(1))])  # as Lightning makes where there is none
    assert names(small_net(), optimizers=[elsewhere]) == ["0.weight", "4.weight"]


def test_frozen_weights_are_selected_where_asked_for() -> None:
    net = small_net().requires_grad_(False)
    assert names(net, trainable_only=False) == ["0.weight", "4.weight"]
    assert not any(p.requires_grad for p in net.parameters())


# ---- every name of a tied weight -------------------------------------------------------------------------------------


class TiedHead(nn.Module):
    """Multiplies by a parameter that belongs to another layer."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.matrix = weight


def tied(kind: str) -> tuple[nn.Module, str, str]:
    """A network in which a weight has two names, both of them."""
    embed = nn.Embedding(5, 4)
    if kind == "a linear head":
        head = nn.Linear(4, 5, bias=False)
        head.weight = embed.weight
        return nn.ModuleDict({"token_embed": embed, "body": nn.Linear(4, 4), "head": head}), "token_embed", "head"
    if kind == "an own head":
        net = {"token_embed": embed, "body": nn.Linear(4, 4), "head": TiedHead(embed.weight)}
        return nn.ModuleDict(net), "token_embed", "head"
    shared = nn.Linear(4, 4)
    return nn.ModuleDict({"first": shared, "body": nn.Linear(4, 4), "second": nn.Sequential(shared)}), "first", "second"


@pytest.mark.parametrize("kind", ["a linear head", "an own head", "a shared layer"])
def test_patterns_find_a_tied_weight_by_each_of_its_names(kind: str) -> None:
    net, one, other = tied(kind)
    name = next(iter(dict(net.named_parameters())))
    assert names(net, embeddings=True) == [name, "body.weight"], "under the name that the module lists"
    for pattern in (f"{one}*", f"*{other[1:]}*", f"{one}.weight"):
        assert names(net, embeddings=True, exclude=[pattern]) == ["body.weight"]
        assert names(net, include=[pattern]) == [name]
        widths = {s.name: s.bits for s in select_parameters(net, embeddings=True, layer_bits={pattern: 8})}
        assert widths == {name: 8, "body.weight": 5}


def test_a_tied_weight_is_selected_where_one_of_its_layers_is() -> None:
    assert names(tied("a linear head")[0]) == ["token_embed.weight", "body.weight"]
    assert names(tied("an own head")[0]) == ["body.weight"]


# ---- names with special characters -----------------------------------------------------------------------------------


def test_names_with_the_characters_of_patterns_mean_themselves() -> None:
    net = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("b[0]", "b0", "x*", "xy", "what?", "[")})
    for name in net:
        for pattern in (name, f"{name}.weight"):
            assert names(net, include=[pattern]) == [f"{name}.weight"]
            assert names(net, exclude=[pattern]) == [f"{other}.weight" for other in net if other != name]
            widths = {s.name: s.bits for s in select_parameters(net, layer_bits={pattern: 3})}
            assert [n for n, bits in widths.items() if bits == 3] == [f"{name}.weight"]
    assert names(net, include=["b[[]*"]) == ["b[0].weight"]
    assert names(net, include=["b[0].*"]) == ["b0.weight"]
