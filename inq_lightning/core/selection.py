"""Which parameters of a module are quantized, and at how many bits."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedParameter

from inq_lightning.core.layer import plain_name
from inq_lightning.grid.power_of_two import check_bits


class Selected(NamedTuple):
    """One selected parameter.

    Attributes:
        name: Its name in ``module.named_parameters()``, without what `torch.compile` adds.
        parameter: Itself.
        bits: Its bit width.
        pruning_mask: What :mod:`torch.nn.utils.prune` multiplies it with; None for most.
    """

    name: str
    parameter: nn.Parameter
    bits: int
    pruning_mask: Tensor | None = None


def select_parameters(
    module: nn.Module,
    bits: int = 5,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    layer_bits: Mapping[str, int] | None = None,
    embeddings: bool = False,
    pruned: bool = False,
    trainable_only: bool = True,
) -> list[Selected]:
    """Select the weights to quantize, in the module's order.

    Candidates are the trainable weights of convolutions (transposed ones too), linear layers, multi-head attention
    (its projections) and recurrent layers and cells; never biases or norms. A weight that several layers share comes
    once, also where one of them is an embedding.

    A pattern is matched by :mod:`fnmatch` (``*`` also crosses dots) against the parameter's name (``net.fc.weight``)
    and the layer's (``net.fc``).

    Args:
        module: The network.
        bits: Code length of a weight, 2 to 8.
        include: Take only candidates that match one of these patterns; None takes all.
        exclude: Leave out candidates that match one of these patterns.
        layer_bits: Another bit width for what matches a pattern; the last matching pattern counts.
        embeddings: Whether embedding tables are candidates too.
        pruned: Whether to take weights under :mod:`torch.nn.utils.prune`, as ``weight_orig`` with their masks.
        trainable_only: Whether to leave out weights that are not trained, as of a frozen backbone.

    Raises:
        ValueError: A pattern matches nothing, a bit width is not allowed, a selected weight is computed from other
            parameters, or nothing is selected.
    """
    check_bits(bits)
    for option, patterns in (("include", include), ("exclude", exclude), ("layer_bits", layer_bits)):
        check_patterns(option, patterns)
    widths = dict(layer_bits or {})
    candidates = dict(_candidates(module, embeddings))
    for option, given in (("include", include or ()), ("exclude", exclude), ("layer_bits", widths)):
        _check_matches(option, given, candidates)

    # A weight that is tied to another layer's bears the name that the module lists it under.
    own_names = {id(p): plain_name(name) for name, p in module.named_parameters()}
    selected = []
    for candidate, layer in candidates.items():
        if (include is not None and not _matches(candidate, include)) or _matches(candidate, exclude):
            continue
        name = candidate
        weight, mask = name.rpartition(".")[2], None
        parameter = layer._parameters.get(weight)
        if parameter is None and pruned and f"{weight}_mask" in layer._buffers:
            name, parameter, mask = (
                f"{name}_orig",
                layer._parameters[f"{weight}_orig"],
                layer._buffers[f"{weight}_mask"],
            )
        if parameter is None:
            raise ValueError(
                f"{name} is computed from other parameters (weight_norm, spectral_norm, pruning or another "
                "parametrization), so rounding them would not put it on a grid; make it a plain parameter first, with "
                "torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm or prune.remove, or exclude "
                "it; pruned weights can be quantized as they are with keep_zeros=True"
            )
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(
                f"{name} belongs to a lazy layer and has no shape yet; run one batch through it before training the "
                "module with INQ, or exclude it"
            )
        if trainable_only and not parameter.requires_grad:
            continue
        width = next((b for pattern, b in reversed(widths.items()) if _matches(candidate, [pattern])), bits)
        selected.append(Selected(own_names.get(id(parameter), name), parameter, width, mask))
    if not selected:
        raise ValueError(
            "no weight to quantize: the module has no trainable convolution, linear, attention or recurrent weight "
            "that include and exclude let through"
            + (f"; candidates were {', '.join(candidates)}" if candidates else "")
        )
    return selected


def _candidates(module: nn.Module, embeddings: bool) -> Iterator[tuple[str, nn.Module]]:
    """Names of the weights and the layers that own them; a shared weight comes once."""
    seen: set[int] = set()
    for path, layer in module.named_modules():
        for weight in _weight_names(layer, embeddings):
            parameter = layer._parameters.get(weight)
            if parameter is None and not hasattr(layer, weight):
                continue
            if parameter is not None and id(parameter) in seen:
                continue
            seen.add(id(parameter))
            yield plain_name(f"{path}.{weight}".lstrip(".")), layer


def _weight_names(layer: nn.Module, embeddings: bool) -> Iterable[str]:
    """The attributes of ``layer`` that hold weight matrices or kernels."""
    if isinstance(layer, (_ConvNd, nn.Linear, nn.Bilinear)):
        return ("weight",)
    if isinstance(layer, nn.MultiheadAttention):  # out_proj is a linear layer of its own
        joint = layer.in_proj_weight is not None
        return ("in_proj_weight",) if joint else ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    if isinstance(layer, nn.RNNBase):
        return [name for name in layer._flat_weights_names if name.startswith("weight")]
    if isinstance(layer, nn.RNNCellBase):
        return ("weight_ih", "weight_hh")
    if embeddings and isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
        return ("weight",)
    return ()


def check_patterns(argument: str, patterns: object) -> None:
    """Refuse what is no list of patterns; for ``layer_bits``, no mapping from patterns to bit widths.

    Raises:
        ValueError: ``patterns`` is none; the message names the argument.
    """
    if patterns is None:
        return
    mapping = argument == "layer_bits"
    fits = isinstance(patterns, Mapping if mapping else Sequence) and not isinstance(patterns, (str, bytes))
    if not fits or not all(isinstance(pattern, str) for pattern in patterns):  # type: ignore[attr-defined]
        hint = f"; write [{patterns!r}]" if isinstance(patterns, str) and not mapping else ""
        kind = "a mapping pattern → bits, such as {'net.conv1': 8}" if mapping else "a list of patterns as text"
        raise ValueError(f"{argument} must be {kind}, got {patterns!r}{hint}")
    if isinstance(patterns, Mapping):
        for pattern, bits in patterns.items():
            try:
                check_bits(bits)
            except ValueError as error:
                raise ValueError(f"layer_bits[{pattern!r}]: {error}") from error


def _matches(name: str, patterns: Iterable[str]) -> bool:
    layer = name.rpartition(".")[0]
    return any(fnmatchcase(name, pattern) or fnmatchcase(layer, pattern) for pattern in patterns)


def _check_matches(option: str, patterns: Iterable[str], names: Iterable[str]) -> None:
    names = list(names)
    for pattern in patterns:
        if any(_matches(name, [pattern]) for name in names):
            continue
        known = [*names, *(name.rpartition(".")[0] for name in names)]
        near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.3) or names[:5]
        raise ValueError(
            f"{option} pattern {pattern!r} matches no weight that can be quantized"
            + (f"; near names: {', '.join(near)}" if near else "")
        )
