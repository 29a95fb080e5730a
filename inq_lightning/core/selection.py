"""Which parameters of a module are quantized, and at how many bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer

from inq_lightning.core.coverage import Coverage, LeftOut, Reason
from inq_lightning.core.matrices import Matrix, find_matrices
from inq_lightning.core.patterns import Patterns, check_layer_levels, check_patterns, check_widths
from inq_lightning.grid.levels import LevelsOption, check_levels, choose_levels, zero_of
from inq_lightning.grid.power_of_two import check_bits


class Selected(NamedTuple):
    """One selected parameter.

    Attributes:
        name: Its name in ``module.named_parameters()``, without what `torch.compile` adds.
        parameter: Itself.
        bits: Its bit width.
        levels: Its levels, see :func:`~inq_lightning.grid.levels.levels_of`.
        pruning_mask: What :mod:`torch.nn.utils.prune` multiplies it with; None for most.
    """

    name: str
    parameter: nn.Parameter
    bits: int
    levels: LevelsOption = "auto"
    pruning_mask: Tensor | None = None


class Selection(list[Selected]):
    """The selected parameters, in the module's order.

    Attributes:
        left_out: The other parameters of two or more dimensions, and why; without biases and norms of PyTorch's layers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.left_out: list[LeftOut] = []

    @property
    def coverage(self) -> Coverage:
        """How much of the module's matrices that is."""
        return Coverage.of(sum(selected.parameter.numel() for selected in self), self.left_out)


def select_parameters(
    module: nn.Module,
    bits: int = 5,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    layer_bits: Mapping[str, int] | None = None,
    levels: LevelsOption = "auto",
    layer_levels: Mapping[str, LevelsOption] | None = None,
    embeddings: bool = False,
    pruned: bool = False,
    trainable_only: bool = True,
    optimizers: Sequence[Optimizer] = (),
) -> Selection:
    """Select the weights to quantize.

    By default these are the trainable weights of convolutions (transposed ones too), linear layers, multi-head
    attention (its projections), recurrent layers and cells, and of such layers of well-known libraries, as the
    ``Conv1D`` of transformers; never biases or norms. With ``include``, whatever matches is taken instead, if it is a
    floating-point parameter of two or more dimensions: of layers of your own, in a list of parameters, in an embedding.

    A pattern that is the name of a parameter (``net.fc.weight``) or of its layer (``net.fc``) means just that. Any
    other is matched with these names by :mod:`fnmatch`: ``*`` also crosses dots, and ``[`` for itself is written
    ``[[]``. A weight that several layers share comes once, and a pattern finds it by each of its names.

    Args:
        module: The network.
        bits: Code length of a weight, 2 to 8.
        include: Take what matches one of these patterns, and nothing else; None takes the default.
        exclude: Leave out what matches one of these patterns.
        layer_bits: Another bit width for what matches a pattern; the last matching pattern counts.
        levels: Which levels a weight takes, see :class:`~inq_lightning.Options`.
        layer_levels: Other levels for what matches a pattern; the last matching pattern counts.
        embeddings: Whether embedding tables belong to the default too.
        pruned: Whether to take weights under :mod:`torch.nn.utils.prune`, as ``weight_orig`` with their masks.
        trainable_only: Whether to leave out parameters that need no gradient.
        optimizers: Leave out parameters that none of these holds, unless they hold none of the module's at all.

    Returns:
        The selection, which also tells what is left out.

    Raises:
        ValueError: A pattern matches nothing, a bit width is not allowed, levels do not fit it or lack a zero that is
            needed, a selected weight is computed from other parameters, or nothing is selected.
    """
    check_bits(bits)
    check_patterns("include", include)
    check_patterns("exclude", exclude)
    check_widths("layer_bits", layer_bits)
    layer_levels = check_layer_levels("layer_levels", layer_levels)
    patterns, matrices = Patterns(module), find_matrices(module)
    default = [m for m in matrices if m.kind == "layer" or (embeddings and m.kind == "embedding")]
    wanted = default if include is None else [m for m in matrices if patterns.match(m.names, include)]
    for option, given, among in (
        ("include", include or (), matrices),
        ("exclude", exclude, matrices),
        ("layer_bits", layer_bits or {}, [*default, *wanted]),
        ("layer_levels", layer_levels or {}, [*default, *wanted]),
    ):
        patterns.check(option, given, [m.names for m in among])
    rules = _Rules(
        wanted=set(wanted),
        excluded={m for m in matrices if patterns.match(m.names, exclude)},
        by_name=include is not None,
        held=_held(optimizers, matrices),
        trainable_only=trainable_only,
    )
    selection = Selection()
    for m in matrices:
        if rules.takes(m):
            _check_plain(m, pruned)
        reason = rules.against(m)
        if reason is None and m.parameter is not None:
            width = patterns.value(m.names, layer_bits, bits)
            own = _levels(m, patterns.value(m.names, layer_levels, levels), width, pruned)
            selection.append(Selected(m.name, m.parameter, width, own, m.pruning_mask))
        elif reason is not None and m.parameter is not None and m.counts:
            selection.left_out.append(LeftOut(m.name, tuple(m.parameter.shape), reason, m.layer))
    if not selection:
        raise ValueError(
            "no weight to quantize: the module has no trainable convolution, linear, attention or recurrent weight "
            "that include and exclude let through"
            + (f"; candidates were {', '.join(m.name for m in default)}" if default else "")
            + "".join(f"\n  left out: {line}" for line in selection.coverage.lines())
        )
    return selection


class _Rules(NamedTuple):
    """What speaks for a matrix and against it."""

    wanted: set[Matrix]
    excluded: set[Matrix]
    by_name: bool
    held: set[int] | None
    trainable_only: bool

    def takes(self, matrix: Matrix) -> bool:
        """Whether the user wants it, if only it can be had."""
        return matrix in self.wanted and matrix not in self.excluded

    def against(self, matrix: Matrix) -> Reason | None:
        """Why it is left out; None where it is selected."""
        if matrix in self.excluded:
            return "excluded"
        if self.by_name and matrix not in self.wanted:
            return "not included"
        if self.trainable_only and matrix.parameter is not None and not matrix.parameter.requires_grad:
            return "frozen"
        if self.held is not None and id(matrix.parameter) not in self.held:
            return "not optimized"
        if matrix in self.wanted:
            return None
        if matrix.computes is not None:
            return "computed"
        return "embedding" if matrix.kind == "embedding" else "own layer type"


def _levels(matrix: Matrix, levels: LevelsOption, bits: int, pruned: bool) -> LevelsOption:
    """The levels of one matrix: with a zero where it needs one.

    Raises:
        ValueError: They do not fit its bits, or lack the zero; the message names it.
    """
    levels = check_levels(f"{matrix.name}: levels", levels, bits)
    if not (matrix.padded or pruned):
        return levels
    levels = choose_levels(levels, bits, zero=True)
    if not zero_of(levels):
        what = "the row of its padding_idx stays zero" if matrix.padded else "keep_zeros keeps its zeros"
        raise ValueError(
            f"{matrix.name}: {what}, and levels={levels!r} have no zero; write "
            f'layer_levels={{"{matrix.name}": "full"}}, or exclude it'
        )
    return levels


def _held(optimizers: Sequence[Optimizer], matrices: Sequence[Matrix]) -> set[int] | None:
    """Which parameters the optimizers hold, by id; None where they tell nothing about the module."""
    groups = [group for optimizer in optimizers for group in getattr(optimizer, "param_groups", ())]
    held = {id(parameter) for group in groups for parameter in group["params"]}
    return None if held.isdisjoint(id(m.parameter) for m in matrices) else held


def _check_plain(matrix: Matrix, pruned: bool) -> None:
    """Refuse a weight that rounding would not put on a grid, or that has no shape yet.

    Raises:
        ValueError: It is one; the message names it and says what to do.
    """
    if matrix.computes is not None and not (pruned and matrix.pruning_mask is not None):
        raise ValueError(
            f"{matrix.computes} is computed from other parameters (weight_norm, spectral_norm, pruning or another "
            "parametrization), so rounding them would not put it on a grid; make it a plain parameter first, with "
            "torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm or prune.remove, or exclude "
            "it; pruned weights can be quantized as they are with keep_zeros=True"
        )
    if isinstance(matrix.parameter, UninitializedParameter):
        raise ValueError(
            f"{matrix.name} belongs to a lazy layer and has no shape yet; run one batch through it before training the "
            "module with INQ, or exclude it"
        )
