"""Every matrix of weights in a module: what it is called, what kind of layer owns it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList

from inq_lightning.core.layer import plain_name

#: What a matrix is to the layer that owns it, the weightiest last: a bias or a norm of PyTorch's; a parameter of a
#: layer that nobody here knows; an embedding table; the weight of a convolution, a linear layer and the like.
Kind = Literal["other", "own", "embedding", "layer"]
_RANK: tuple[Kind, ...] = ("other", "own", "embedding", "layer")

# Layers outside PyTorch that multiply by each parameter of theirs that is called weight and has two dimensions or more,
# by package and class, so that none has to be imported. Those that inherit from PyTorch's need no entry.
_LAYERS = {
    "apex": {"ColumnParallelLinear", "FusedDense", "FusedDenseGeluDense", "MLP", "RowParallelLinear"},
    "detectron2": {"DeformConv", "ModulatedDeformConv"},
    "dgl": {"GraphConv"},
    "fairscale": {"ColumnParallelLinear", "RowParallelLinear"},
    "fairseq2": {"Linear"},
    "megatron": {"ColumnParallelLinear", "RowParallelLinear"},
    "mmcv": {"DeformConv2d", "ModulatedDeformConv2d"},
    "torch_geometric": {"HeteroLinear", "Linear"},
    "torchvision": {"DeformConv2d"},
    "transformer_engine": {"GroupedLinear", "LayerNormLinear", "LayerNormMLP", "Linear"},
    "transformers": {"Conv1D"},
    "xformers": {"FusedLinear"},
}


@dataclass(eq=False)
class Matrix:
    """A floating-point parameter of two or more dimensions.

    Attributes:
        parameter: Itself; None for a weight that its layer computes, from a parametrization for instance.
        names: All its names; the first is the one under which the module lists it. A parameter from which a layer
            computes its weight bears the weight's name, too.
        kind: What it is to its layer.
        layer: The type of the layer.
        computes: Name of the weight that is computed, from this parameter or from others; None for most.
        pruning_mask: What :mod:`torch.nn.utils.prune` multiplies it with; None for most.
        padded: Whether one of its rows is an embedding's padding, which stays zero.
    """

    parameter: nn.Parameter | None
    names: list[str] = field(default_factory=list)
    kind: Kind = "other"
    layer: str = ""
    computes: str | None = None
    pruning_mask: Tensor | None = None
    padded: bool = False

    @property
    def name(self) -> str:
        """The name under which the module lists it."""
        return self.names[0]

    @property
    def counts(self) -> bool:
        """Whether it is one of the network's matrices of weights, and of a known size."""
        return self.kind != "other" and not isinstance(self.parameter, (UninitializedParameter, type(None)))


def find_matrices(module: nn.Module) -> list[Matrix]:
    """All of them in the module's order, each once however many layers share it."""
    found: dict[object, Matrix] = {}
    for path, layer in module.named_modules(remove_duplicate=False):
        weights = _weight_names(layer)
        for name, parameter in _matrices_of(layer, weights):
            key = (id(layer), name) if parameter is None else id(parameter)
            _add(found.setdefault(key, Matrix(parameter)), path, layer, name, weights)
    return list(found.values())


def _matrices_of(layer: nn.Module, weights: Collection[str]) -> Iterator[tuple[str, nn.Parameter | None]]:
    """Those that belong to ``layer`` itself, by name; what it computes comes as None."""
    for name, parameter in layer._parameters.items():
        if isinstance(parameter, UninitializedParameter):  # of a lazy layer
            matrix = name in weights
        else:
            matrix = parameter is not None and parameter.is_floating_point() and parameter.dim() > 1
        if matrix:
            yield name, parameter
    for name in weights:
        # A parametrization is a property of the layer's class; reading it would compute the weight.
        elsewhere = name in layer._buffers or isinstance(vars(layer).get(name), Tensor) or hasattr(type(layer), name)
        if layer._parameters.get(name) is None and elsewhere and f"{name}_orig" not in layer._parameters:
            yield name, None


def _add(matrix: Matrix, path: str, layer: nn.Module, name: str, weights: Collection[str]) -> None:
    """Take in one place where the matrix stands."""
    stem, _, suffix = name.rpartition("_")
    whole = None
    if isinstance(layer, ParametrizationList):
        whole = ".".join([*path.split(".")[:-2], path.rpartition(".")[2]])
    elif suffix in ("orig", "g", "v") and isinstance(vars(layer).get(stem), Tensor):  # pruning, the old norms
        whole = f"{path}.{stem}"
        matrix.pruning_mask = layer._buffers.get(f"{stem}_mask")
    elif matrix.parameter is None:
        whole = f"{path}.{name}"
    if whole is not None:
        matrix.computes = plain_name(whole.lstrip("."))
    names = [plain_name(f"{path}.{name}".lstrip(".")), *([matrix.computes] if matrix.computes else [])]
    matrix.names += [one for one in names if one not in matrix.names]
    matrix.padded = matrix.padded or getattr(layer, "padding_idx", None) is not None
    kind = _kind(layer, {name, stem} if whole is not None else {name}, weights)
    if not matrix.layer or _RANK.index(kind) > _RANK.index(matrix.kind):
        matrix.kind, matrix.layer = kind, type(layer).__name__


def _kind(layer: nn.Module, names: set[str], weights: Collection[str]) -> Kind:
    if not names.isdisjoint(weights):
        return "embedding" if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) else "layer"
    home = type(layer).__module__
    container = home in ("torch.nn.modules.container", "torch.nn.modules.module")
    return "other" if home.startswith("torch.nn.modules.") and not container else "own"


def _weight_names(layer: nn.Module) -> Collection[str]:
    """The attributes of ``layer`` that hold weight matrices or kernels."""
    if isinstance(layer, (_ConvNd, nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag)):
        return ("weight",)
    if isinstance(layer, nn.MultiheadAttention):  # out_proj is a linear layer of its own
        joint = layer.in_proj_weight is not None
        return ("in_proj_weight",) if joint else ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    if isinstance(layer, nn.RNNBase):
        return [name for name in layer._flat_weights_names if name.startswith("weight")]
    if isinstance(layer, nn.RNNCellBase):
        return ("weight_ih", "weight_hh")
    if any(base.__name__ in _LAYERS.get(base.__module__.partition(".")[0], ()) for base in type(layer).__mro__):
        return [name for name in layer._parameters if "weight" in name]
    return ()
