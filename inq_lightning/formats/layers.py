"""Which weights of a trained network lie on a grid, and on which one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from inq_lightning.core.selection import select_parameters
from inq_lightning.grid import MAX_BITS, MIN_BITS, PowerOfTwoGrid, exponent_range

_PART = 1 << 16  # weights at a time: intermediate results stay in the cache


class LayerGrid(Protocol):
    """What is read of a record of `INQCallback.layers`."""

    @property
    def name(self) -> str:
        """Name of the parameter."""

    @property
    def bits(self) -> int:
        """Code length of one weight."""

    @property
    def n1(self) -> int | None:
        """Exponent of the largest level."""


def fit_grid(weight: Tensor) -> PowerOfTwoGrid | None:
    """Find the grid of fewest bits that holds every weight exactly.

    Args:
        weight: Floating-point weights of any shape.

    Returns:
        The grid, or None where a weight is neither zero nor a power of two, or where they span too many exponents, for
        8 bits or for a grid that their dtype holds.
    """
    mantissa, exponent = torch.frexp(weight.detach())
    nonzero = weight != 0
    if not bool(nonzero.any()):
        return PowerOfTwoGrid(None, MIN_BITS)
    if not bool((mantissa[nonzero].abs() == 0.5).all()):  # inf and nan have another mantissa
        return None
    exponents = exponent[nonzero]
    n1, n2 = int(exponents.max()) - 1, int(exponents.min()) - 1
    bits = max(MIN_BITS, 2 + (n1 - n2).bit_length())
    lowest, highest = exponent_range(weight.dtype)
    n1 = max(n1, lowest - 1 + (1 << bits - 2))  # no level below what the dtype holds
    return PowerOfTwoGrid(n1, bits) if bits <= MAX_BITS and lowest <= n2 and n1 <= highest else None


def holds(grid: PowerOfTwoGrid, weight: Tensor) -> bool:
    """Whether every weight is a level of the grid."""
    return all(bool(torch.isfinite(part).all()) and torch.equal(grid.round(part), part) for part in _parts(weight))


def encode(grid: PowerOfTwoGrid, weight: Tensor) -> Tensor:
    """Contiguous codes of a large weight, as `PowerOfTwoGrid.encode` returns them, in little memory."""
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for target, part in zip(_parts(codes), _parts(weight), strict=True):
        target.copy_(grid.encode(part))
    return codes


def _parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """A tensor's elements in the order of their indices, by the cacheful."""
    return torch.split(tensor.detach().reshape(-1), _PART)


def find_grids(
    model: nn.Module, layers: Iterable[LayerGrid] | None = None, allow_partial: bool = False
) -> dict[str, PowerOfTwoGrid]:
    """Find the grid of every quantized parameter of a trained network.

    Args:
        model: The network.
        layers: `INQCallback.layers`, the record of what was quantized. Left out, the weights tell by themselves: what
            :func:`~inq_lightning.core.selection.select_parameters` selects gets the grid of fewest bits that holds it,
            embeddings included where they are on one.
        allow_partial: Whether to leave out parameters that are not on a grid, rather than refuse the network.

    Returns:
        Grids by parameter name, in the module's order.

    Raises:
        ValueError: Parameters are not on their grids, or ``layers`` names parameters that the module lacks.
    """
    found = candidate_grids(model, layers)
    check_complete(found, allow_partial)
    return {name: grid for name, grid in found.items() if grid is not None}


def candidate_grids(
    source: nn.Module | Mapping[str, Tensor], layers: Iterable[LayerGrid] | None = None
) -> dict[str, PowerOfTwoGrid | None]:
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
    named = source.named_parameters(remove_duplicate=False) if isinstance(source, nn.Module) else source.items()
    tensors: dict[str, Tensor] = {name.replace("_orig_mod.", ""): tensor for name, tensor in named}
    if layers is not None:
        records = {layer.name: layer for layer in layers}
        unknown = [name for name in records if name not in tensors]
        if unknown:
            raise ValueError(
                f"layers names {', '.join(unknown)}, which the module lacks; pass the module that was trained, not a "
                "part of it, or leave out layers"
            )
        given = {name: PowerOfTwoGrid(record.n1, record.bits) for name, record in records.items()}
        return {name: grid if holds(grid, tensors[name]) else None for name, grid in given.items()}
    if isinstance(source, nn.Module):
        required, optional = _selected(source)
    else:
        required, optional = {name for name, tensor in tensors.items() if _looks_like_weights(name, tensor)}, set()
    fitted = {name: fit_grid(tensors[name]) for name in tensors if name in required | optional}
    return {name: grid for name, grid in fitted.items() if name in required or grid is not None}


def check_complete(grids: Mapping[str, PowerOfTwoGrid | None], allow_partial: bool = False) -> None:
    """Refuse a network that is not fully quantized, unless ``allow_partial``.

    Raises:
        ValueError: A parameter has no grid; the message names it.
    """
    off = [name for name, grid in grids.items() if grid is None]
    if off and not allow_partial:
        raise ValueError(
            f"the network is not fully quantized: {', '.join(off)} {'is' if len(off) == 1 else 'are'} not on a grid. "
            "Train until the quantized fraction is 1, pass layers=callback.layers where layers were left out on "
            "purpose, or allow_partial=True to keep these as they are"
        )


def _selected(model: nn.Module) -> tuple[set[str], set[str]]:
    """Names of the weights that INQ quantizes by default, and of those that it does when asked."""
    parameters = list(model.parameters())
    trainable = [p.requires_grad for p in parameters]
    for p in parameters:
        p.requires_grad_(True)  # a frozen backbone is as quantized as the rest
    try:
        required = {s.name for s in select_parameters(model)}
        return required, {s.name for s in select_parameters(model, embeddings=True)} - required
    finally:
        for p, was in zip(parameters, trainable, strict=True):
            p.requires_grad_(was)


def _looks_like_weights(name: str, tensor: Tensor) -> bool:
    name = name.rpartition(".")[2]
    floating = tensor.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return floating and tensor.dim() > 1 and (name.startswith("weight") or name.endswith("weight"))
