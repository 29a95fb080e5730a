"""Which weights of a trained network lie on a grid, and on which one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, nn

from inq_lightning.grid import MAX_BITS, MIN_BITS, PowerOfTwoGrid
from inq_lightning.selection import select_parameters


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
        The grid, or None where a weight is neither zero nor a power of two, or where they span too many exponents.
    """
    mantissa, exponent = torch.frexp(weight.detach())
    nonzero = weight != 0
    if not bool(nonzero.any()):
        return PowerOfTwoGrid(None, MIN_BITS) if not bool(weight.isnan().any()) else None
    if not bool((mantissa[nonzero].abs() == 0.5).all()):  # inf and nan have another mantissa
        return None
    exponents = exponent[nonzero]
    n1, n2 = int(exponents.max()) - 1, int(exponents.min()) - 1
    bits = max(MIN_BITS, 2 + (n1 - n2).bit_length())
    return PowerOfTwoGrid(n1, bits) if bits <= MAX_BITS else None


def holds(grid: PowerOfTwoGrid, weight: Tensor) -> bool:
    """Whether every weight is a level of the grid."""
    weight = weight.detach()
    return bool(torch.isfinite(weight).all()) and torch.equal(grid.round(weight), weight)


def find_grids(
    model: nn.Module, layers: Iterable[LayerGrid] | None = None, allow_partial: bool = False
) -> dict[str, PowerOfTwoGrid]:
    """Find the grid of every quantized parameter of a trained network.

    Args:
        model: The network.
        layers: `INQCallback.layers`, the record of what was quantized. Left out, the weights tell by themselves: each
            one that :func:`~inq_lightning.selection.select_parameters` selects gets the grid of fewest bits that holds
            it, embeddings included where they are on one.
        allow_partial: Whether to leave out parameters that are not on a grid, rather than refuse the network.

    Returns:
        Grids by parameter name, in the module's order.

    Raises:
        ValueError: Parameters are not on their grids, or ``layers`` names parameters that the module lacks.
    """
    parameters = {name.replace("_orig_mod.", ""): p for name, p in model.named_parameters(remove_duplicate=False)}
    found: dict[str, PowerOfTwoGrid | None] = {}
    if layers is not None:
        records = {layer.name: layer for layer in layers}
        unknown = [name for name in records if name not in parameters]
        if unknown:
            raise ValueError(
                f"layers names {', '.join(unknown)}, which the module lacks; pass the module that was trained, not a "
                "part of it, or leave out layers"
            )
        for name, record in records.items():
            grid = PowerOfTwoGrid(record.n1, record.bits)
            found[name] = grid if holds(grid, parameters[name]) else None
    else:
        trainable = {name: p.requires_grad for name, p in parameters.items()}
        for p in parameters.values():
            p.requires_grad_(True)  # a frozen backbone is as quantized as the rest
        try:
            selected = {s.name for s in select_parameters(model)}
            optional = {s.name for s in select_parameters(model, embeddings=True)} - selected
        finally:
            for name, p in parameters.items():
                p.requires_grad_(trainable[name])
        for name, parameter in parameters.items():
            fitted = fit_grid(parameter) if name in selected | optional else None
            if name in selected or fitted is not None:
                found[name] = fitted
    off = [name for name, grid in found.items() if grid is None]
    if off and not allow_partial:
        raise ValueError(
            f"the network is not fully quantized: {', '.join(off)} {'is' if len(off) == 1 else 'are'} not on a grid. "
            "Train until the quantized fraction is 1, pass layers=callback.layers where layers were left out on "
            "purpose, or allow_partial=True to keep these as they are"
        )
    return {name: grid for name, grid in found.items() if grid is not None}
