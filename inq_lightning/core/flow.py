"""How tensors flow through a network, operation by operation: traced by torch.fx, without data.

One vocabulary for what modules, functions and methods of torch do, for those who put activations in place and for
those who turn a network into integers.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn, TypeAlias

from torch import fx, nn

from inq_lightning.core.activation import PowerOfTwoActivation

Kind: TypeAlias = Literal[
    "input", "output", "product", "norm", "relu", "sum", "average", "max", "shape", "concat", "activation", "number"
]

OUTPUT, INPUT = "inq_activation", "inq_input"  # what a module calls the activation behind it, and the one before it

_MODULES: dict[Kind, tuple[type[nn.Module], ...]] = {
    "activation": (PowerOfTwoActivation,),
    "product": (nn.Conv2d, nn.Linear),
    "norm": (nn.BatchNorm1d, nn.BatchNorm2d),
    "relu": (nn.ReLU, nn.ReLU6),
    "average": (nn.AvgPool2d, nn.AdaptiveAvgPool2d),
    "max": (nn.MaxPool2d,),
    "shape": (nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.ZeroPad2d),
}
#: Functions and methods, and what their arguments after the tensor are called.
_FUNCTIONS: dict[str, tuple[Kind, tuple[str, ...]]] = {
    "relu": ("relu", ()),
    "relu_": ("relu", ()),
    "relu6": ("relu", ()),
    "add": ("sum", ()),
    "add_": ("sum", ()),
    "iadd": ("sum", ()),
    "mean": ("average", ("dim", "keepdim")),
    "avg_pool2d": ("average", ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")),
    "adaptive_avg_pool2d": ("average", ("output_size",)),
    "max_pool2d": ("max", ("kernel_size", "stride", "padding", "dilation", "ceil_mode")),
    "cat": ("concat", ("dim",)),
    "concat": ("concat", ("dim",)),
    "flatten": ("shape", ()),
    "view": ("shape", ()),
    "reshape": ("shape", ()),
    "squeeze": ("shape", ()),
    "contiguous": ("shape", ()),
    "dropout": ("shape", ()),
    "dropout2d": ("shape", ()),
    "pad": ("shape", ("pad", "mode", "value")),
    "getitem": ("shape", ("index",)),
}
_NUMBERS = ("size", ".shape", "dim", "numel")  # of a tensor

SUPPORTED = (
    "Conv2d, Linear, BatchNorm1d, BatchNorm2d, ReLU, ReLU6, MaxPool2d, AvgPool2d, AdaptiveAvgPool2d, mean, sums of two "
    "tensors, cat, pad, slices, flatten, view, reshape, Dropout, Identity"
)


@dataclass
class Step:
    """One operation of a traced network.

    Attributes:
        kind: What it does. ``product``: a convolution or a linear layer; ``shape``: what only moves values about,
            drops some, or puts zeros beside them; ``number``: what is no tensor.
        node: The node of torch.fx.
        sources: The tensors that it takes.
        module: The module that it calls; None for functions and methods.
        function: Name of the function or the method; empty for modules.
        options: Arguments of a function besides tensors, by name.
    """

    kind: Kind
    node: fx.Node
    sources: tuple[fx.Node, ...] = ()
    module: nn.Module | None = None
    function: str = ""
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Flow:
    """A traced network.

    Attributes:
        module: It, for torch.fx to run.
        steps: Its operations by their nodes, in the order in which they are computed.
        returned: Names of the modules that return what a node computes, from the innermost outward.
        entered: Names of the modules whose first argument is what a node computes, from the outermost inward.
        calls: How often each module is called.
        owner: Name of the module in whose forward a node was made.
    """

    module: fx.GraphModule
    steps: dict[fx.Node, Step]
    returned: dict[fx.Node, list[str]]
    entered: dict[fx.Node, list[str]]
    calls: Counter[str]
    owner: dict[fx.Node, str]

    def where(self, node: fx.Node) -> str:
        """A node in words: its module, or the function and the module in whose forward it is called."""
        owner = self.owner[node]
        return str(node.target) if node.op == "call_module" else f"{name_of(node)} in {owner or 'forward'}"

    def is_fused(self, norm: Step) -> bool:
        """Whether a normalization is computed on a product that nothing else takes, before anything is rounded."""
        (source,) = norm.sources
        return self.steps[source].kind == "product" and len(source.users) == 1


def network_of(module: nn.Module) -> tuple[nn.Module, str]:
    """The network that a module holds, and what its names begin with.

    It is the module itself if that has a forward of its own; else the one child that has parameters, as in
    LightningModules that call ``self.net`` in their steps.

    Raises:
        ValueError: There is no forward, and not one such child.
    """
    forward = type(module).forward
    given = forward.__module__.split(".")[0] in ("pytorch_lightning", "lightning") or "_forward_unimpl" in str(forward)
    if not given:
        return module, ""
    children = [name for name, child in module.named_children() if any(True for _ in child.parameters())]
    if len(children) == 1:
        network, prefix = network_of(module.get_submodule(children[0]))
        return network, f"{children[0]}.{prefix}"
    raise ValueError(
        f"{type(module).__name__} has no forward, and {', '.join(children) or 'no part of it'} to choose the network "
        "from; give it a forward that calls the network"
    )


def trace(network: nn.Module) -> Flow:
    """Trace a network.

    Raises:
        ValueError: It cannot be traced, or does something that is not in the vocabulary; the message says what.
    """
    tracer = _Tracer()
    parameters = inspect.signature(network.forward).parameters.items()
    defaults = {name: p.default for name, p in parameters if p.default is not p.empty}
    try:
        graph = tracer.trace(network, concrete_args=defaults)
    except Exception as error:  # whatever code of the user's raises on a symbol
        raise ValueError(
            f"torch.fx cannot trace {type(network).__name__}: {error}. Change what in its forward depends on the "
            "values of tensors, or takes other than tensors"
        ) from error
    steps: dict[fx.Node, Step] = {}
    for node in graph.nodes:
        steps[node] = _step(node, steps, network)
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    module = fx.GraphModule(network, graph)
    return Flow(module, steps, tracer.returned, tracer.entered, calls + tracer.calls, tracer.owner)


def name_of(node: fx.Node) -> str:
    """What a function or method is called."""
    if node.op == "call_function" and node.target is getattr:
        return f".{node.args[1]}"
    return getattr(node.target, "__name__", str(node.target))


class _Tracer(fx.Tracer):
    """Notes which module returns which value, and shows activations that hooks call."""

    def __init__(self) -> None:
        super().__init__()
        self.returned: dict[fx.Node, list[str]] = {}
        self.entered: dict[fx.Node, list[str]] = {}
        self.owner: dict[fx.Node, str] = {}
        self.calls: Counter[str] = Counter()
        self._path = [""]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, PowerOfTwoActivation) or super().is_leaf_module(m, module_qualified_name)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        self.owner[node] = self._path[-1]
        return node

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        name = self.path_of_module(m)
        if args and isinstance(args[0], fx.Proxy):
            self.entered.setdefault(args[0].node, []).append(name)
        leaf = self.is_leaf_module(m, name)
        if leaf and hasattr(m, INPUT):  # the hooks of leaves are not run
            args = (super().call_module(getattr(m, INPUT), forward, args[:1], {}), *args[1:])
        if not leaf:
            self.calls[name] += 1
            self._path.append(name)
        result = super().call_module(m, forward, args, kwargs)
        if not leaf:
            self._path.pop()
        if isinstance(result, fx.Proxy):
            self.returned.setdefault(result.node, []).append(name)
        if leaf and hasattr(m, OUTPUT):
            result = super().call_module(getattr(m, OUTPUT), forward, (result,), {})
        return result


def _step(node: fx.Node, steps: Mapping[fx.Node, Step], network: nn.Module) -> Step:
    sources = tuple(n for n in node.all_input_nodes if steps[n].kind != "number")
    if node.op == "placeholder":
        return Step("number" if node.args else "input", node)
    if node.op == "output":
        return Step("output", node, sources)
    if node.op == "get_attr":
        _refuse(network, f"uses {node.target}, a tensor of its own")
    if node.op == "call_module":
        module = network.get_submodule(str(node.target))
        for kind, classes in _MODULES.items():
            if isinstance(module, classes):
                return Step(kind, node, sources, module)
        _refuse(network, f"calls {node.target}, a {type(module).__name__}")
    name = name_of(node)
    if not sources or name in _NUMBERS:
        return Step("number", node)
    if name not in _FUNCTIONS:
        _refuse(network, f"calls {name}")
    kind, names = _FUNCTIONS[name]
    if kind == "sum" and (len(sources) != 2 or node.kwargs.get("alpha", 1) != 1):
        _refuse(network, "adds what is not two different tensors")
    return Step(kind, node, sources, None, name, dict(zip(names, node.args[1:], strict=False)) | dict(node.kwargs))


def _refuse(network: nn.Module, what: str) -> NoReturn:
    raise ValueError(f"{type(network).__name__} {what}, which integers cannot follow. There are: {SUPPORTED}")
