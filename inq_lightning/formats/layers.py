"""Which weights of a trained network lie on a grid, and on which one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn

from inq_lightning.core.layer import Layer, named_weights, plain_name
from inq_lightning.core.matrices import find_matrices
from inq_lightning.formats.tensors import place
from inq_lightning.grid import MAX_BITS, Grid, PowerOfTwoGrid, fit_grid
from inq_lightning.grid.base import FLOATS
from inq_lightning.grid.recognize import holds


def find_grids(model: nn.Module, layers: Iterable[Layer] | None = None, allow_partial: bool = False) -> dict[str, Grid]:
    """Find the grid of every quantized parameter of a trained network.

    Args:
        model: The network.
        layers: `INQCallback.layers`, the record of what was quantized. Left out, the weights tell by themselves: what
            :func:`~inq_lightning.core.selection.select_parameters` selects by default gets the grid of fewest bits that
            holds it; embeddings and parameters of layers of your own do where they are on one.
        allow_partial: Whether to leave out parameters that are not on a grid, rather than refuse the network.

    Returns:
        Grids by parameter name, in the module's order.

    Raises:
        ValueError: Parameters are not on their grids, or ``layers`` names parameters that the module lacks.
    """
    found = candidate_grids(model, layers)
    check_complete(found, allow_partial)
    return {name: grid for name, grid in found.items() if grid is not None}


def without(
    source: nn.Module | Mapping[str, Tensor], layers: Iterable[Layer] | None, exclude: Sequence[str]
) -> list[Layer]:
    """The records of a network's layers, less those that are to stay in floating point.

    Args:
        source: See :func:`candidate_grids`.
        layers: See :func:`find_grids`.
        exclude: Patterns for names of layers or of their parameters, as :mod:`fnmatch` takes them.

    Raises:
        ValueError: A pattern matches none of the layers.
    """
    tensors = _tensors(source)
    if layers is None:  # what is on no grid is listed, too: those that are not excluded are refused later
        layers = [
            Layer(name, tuple(tensors[name].shape), grid.bits if grid else MAX_BITS, grid)
            for name, grid in candidate_grids(source).items()
        ]
    records = [*layers]
    matched = {p: {x.name for x in records if _matches(x.name, p)} for p in exclude}
    if idle := [pattern for pattern, names in matched.items() if not names]:
        raise ValueError(
            f"exclude pattern {idle[0]!r} matches no quantized layer; there are {', '.join(x.name for x in records)}"
        )
    return [x for x in records if not any(x.name in names for names in matched.values())]


def candidate_grids(
    source: nn.Module | Mapping[str, Tensor], layers: Iterable[Layer] | None = None
) -> dict[str, Grid | None]:
    """Find the grids of all parameters that are, or could have been, quantized.

    Args:
        source: The network, or the tensors of its state_dict.
        layers: See :func:`find_grids`. A state_dict does not tell which layers its tensors belong to: without
            ``layers``, candidates are all floating-point tensors of two and more dimensions that are called
            ``weight``, ``in_proj_weight``, ``weight_ih_l0`` and so on.

    Returns:
        Grids by name, in the order of ``source`` or ``layers``; None where a candidate is not on its grid.

    Raises:
        ValueError: ``layers`` names parameters that ``source`` lacks.
    """
    tensors = _tensors(source)
    if layers is not None:
        records = {layer.name: layer for layer in layers}
        unknown = [name for name in records if name not in tensors]
        if unknown:
            raise ValueError(
                f"layers names {', '.join(unknown)}, which the module lacks; pass the module that was trained, not a "
                "part of it, or leave out layers"
            )
        given = {name: record.grid or PowerOfTwoGrid(None, record.bits) for name, record in records.items()}
        return {name: grid if holds(grid, tensors[name]) else None for name, grid in given.items()}
    if isinstance(source, nn.Module):
        required, optional = _selected(source)
    else:
        required, optional = {name for name in tensors if _looks_like_weights(name, tensors)}, set()
    fitted = {name: fit_grid(tensors[name]) for name in tensors if name in required | optional}
    return {name: grid for name, grid in fitted.items() if name in required or grid is not None}


def _tensors(source: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a network, or of its state_dict, by their plain names."""
    if isinstance(source, nn.Module):
        return dict(named_weights(source))
    return {plain_name(name): tensor for name, tensor in source.items()}


def _matches(name: str, pattern: str) -> bool:
    return any(pattern == one or fnmatchcase(one, pattern) for one in (name, name.rpartition(".")[0]))


def grids_in_state(
    model: nn.Module, state: Mapping[str, Tensor], grids: Mapping[str, Grid | None]
) -> dict[str, Grid | None]:
    """Grids of a network's parameters under the names that its state_dict gives to them, which may be other ones.

    Args:
        model: The network.
        state: Its state_dict under plain names.
        grids: What :func:`candidate_grids` returns of it.

    Raises:
        ValueError: The state_dict holds neither a parameter that is on a grid nor a copy of it under its own name.
    """
    parameters = dict(named_weights(model))
    names = {place("", tensor): name for name, tensor in reversed([*state.items()]) if tensor.numel()}
    found = {}
    for name, grid in grids.items():
        same = names.get(place("", parameters[name]), name)
        kept = name if name in state and place("", state[name]) == place("", parameters[name]) else same
        if grid is not None and (kept not in state or not holds(grid, state[kept])):
            raise ValueError(
                f"the network's state_dict() does not hold {name}, which is on a grid: it renames a copy of it, or "
                "puts something else in its place. Let it return the parameters themselves, under whatever names, or "
                "pass torch.nn.Module.state_dict(network) instead of the network"
            )
        found[kept] = grid
    return found


def check_complete(grids: Mapping[str, Grid | None], allow_partial: bool = False) -> None:
    """Refuse a network that is not fully quantized, unless ``allow_partial``.

    Raises:
        ValueError: A parameter has no grid; the message names it. Or there is none at all.
    """
    if not grids:
        raise ValueError("no weight to quantize: the network has no matrix of weights that is on a grid")
    off = [name for name, grid in grids.items() if grid is None]
    if off and not allow_partial:
        raise ValueError(
            f"the network is not fully quantized: {', '.join(off)} {'is' if len(off) == 1 else 'are'} not on a grid. "
            "Train until the quantized fraction is 1, pass layers=callback.layers where layers were left out on "
            "purpose, or allow_partial=True to keep these as they are"
        )


def off_grid(source: nn.Module | Mapping[str, Tensor], grids: Mapping[str, Grid | None]) -> list[str]:
    """Names of the network's matrices of weights that are on no grid; of a tied one, the first.

    Args:
        source: The network, or the tensors of its state_dict under plain names: there, all of two dimensions or more.
        grids: What :func:`candidate_grids` returns.
    """
    if isinstance(source, nn.Module):
        return [m.name for m in find_matrices(source) if m.counts and not any(grids.get(name) for name in m.names)]
    seen = {place(name, source[name]) for name, grid in grids.items() if grid is not None and name in source}
    names = []
    for name, tensor in source.items():
        if tensor.dtype in FLOATS and tensor.dim() > 1 and (where := place(name, tensor)) not in seen:
            seen.add(where)
            names.append(name)
    return names


def _selected(model: nn.Module) -> tuple[set[str], set[str]]:
    """Names of the weights that INQ quantizes by default, trained or not, and of those that it does when asked."""
    matrices = [m for m in find_matrices(model) if m.counts and (m.computes is None or m.pruning_mask is not None)]
    required = {m.name for m in matrices if m.kind == "layer"}
    return required, {m.name for m in matrices} - required


def _looks_like_weights(path: str, tensors: Mapping[str, Tensor]) -> bool:
    layer, dot, name = path.rpartition(".")
    tensor = tensors[path]
    if tensor.dtype not in FLOATS or tensor.dim() < 2 or not (name.startswith("weight") or name.endswith("weight")):
        return False
    # What weight_norm and spectral_norm compute a weight from, by the names beside it.
    stem, _, suffix = name.rpartition("_")
    beside = {"g": "v", "v": "g", "orig": "u"}.get(suffix)
    return beside is None or f"{layer}{dot}{stem}_{beside}" not in tensors
