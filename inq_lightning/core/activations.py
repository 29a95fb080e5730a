"""Where in a network activations are rounded, and how they are put there and calibrated."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils.hooks import RemovableHandle

from inq_lightning.core.activation import PowerOfTwoActivation, check_activation_bits
from inq_lightning.core.feeding import Call, device_of, evaluating, read_batches
from inq_lightning.core.flow import INPUT, OUTPUT, Flow, Step, name_of, network_of, trace
from inq_lightning.core.patterns import Patterns

_TERM_BITS = 8


class Place(NamedTuple):
    """Where an activation belongs.

    Attributes:
        module: Name of the module whose output it rounds.
        signed: Whether what it rounds may be negative.
        before: Whether it rounds the module's input instead.
        term: Whether only sums take it, so that nothing multiplies it.
    """

    module: str
    signed: bool
    before: bool = False
    term: bool = False

    @property
    def attribute(self) -> str:
        """What the module calls it."""
        return INPUT if self.before else OUTPUT


def quantize_activations(
    model: nn.Module, bits: int = 8, *, input_bits: int = 8, layer_bits: Mapping[str, int] | None = None
) -> dict[str, PowerOfTwoActivation]:
    """Put a :class:`PowerOfTwoActivation` wherever a layer, an addition or an average takes a tensor.

    Each becomes a submodule, called by a hook, of the layer whose output or input it rounds, so names and forward of
    the network stay; where there are such already, they stay, too. The first batch of training calibrates them;
    without training, :func:`calibrate_activations` does.

    Args:
        model: The network, or a module that holds it, see :func:`inq_lightning.core.flow.network_of`.
        bits: Code length of one value, 2 to 8; what only sums take has 8 bits, since nothing multiplies it.
        input_bits: That of the network's input.
        layer_bits: Widths for layers that match a pattern, for instance ``{"net.layer3.*": 4}``; names are those of the
            layers behind which activations stand.

    Returns:
        The activations by their names as modules, in the order in which the network computes them.

    Raises:
        ValueError: The network cannot be traced, holds an operation that integers cannot do, or computes something
            behind which no activation can stand; the message says what to change. Or it has activations of other
            bits. Nothing has changed then.
    """
    layer_bits = layer_bits or {}
    for option, value in (("bits", bits), ("input_bits", input_bits), *layer_bits.items()):
        check_activation_bits(option, value)
    network, prefix = network_of(model)
    found = places(network, prefix)
    patterns, names = Patterns(model), [[prefix + place.module] for place in found]
    patterns.check("layer_activation_bits", layer_bits, names)
    widths = [
        patterns.value(name, layer_bits, input_bits if place.before else _TERM_BITS if place.term else bits)
        for name, place in zip(names, found, strict=True)
    ]
    for place, width in zip(found, widths, strict=True):
        there = getattr(network.get_submodule(place.module), place.attribute, None)
        if there is not None and there.bits != width:
            raise ValueError(
                f"{prefix}{place.module} has activations of {there.bits} bits already, {width} are asked for; begin "
                "with a network without them"
            )
    for place, width in zip(found, widths, strict=True):
        module = network.get_submodule(place.module)
        if not hasattr(module, place.attribute):
            _attach(module, place.attribute, width, place.signed, prefix + place.module, device_of(network))
    ordered = [getattr(network.get_submodule(place.module), place.attribute) for place in found]
    paths = {activation: path for path, activation in activations_of(model).items()}
    return {paths[activation]: activation for activation in ordered}


def activations_of(model: nn.Module) -> dict[str, PowerOfTwoActivation]:
    """The activations in a network, by their names as modules."""
    return {name: m for name, m in model.named_modules() if isinstance(m, PowerOfTwoActivation)}


def is_saved_activation(name: str) -> bool:
    """Whether this is what a state_dict calls the grid of an activation."""
    return any(name == f"{attribute}.grid" or name.endswith(f".{attribute}.grid") for attribute in (INPUT, OUTPUT))


@contextmanager
def saved_activations(model: nn.Module, state: Mapping[str, Any]) -> Iterator[None]:
    """Put activations where a state_dict has them, so that it can be loaded; they go again where that fails.

    Args:
        model: The network.
        state: Tensors by name, as the network's own state_dict would have them; others than grids are left alone.
    """
    modules, attached = dict(model.named_modules()), []
    for name, tensor in state.items():
        holder, _, attribute = name.removesuffix(".grid").rpartition(".")
        if is_saved_activation(name) and holder in modules and not hasattr(modules[holder], attribute):
            saved = PowerOfTwoActivation.of(tensor, holder)
            handle = _attach(modules[holder], attribute, saved.bits, saved.signed, holder, device_of(model))
            attached.append((modules[holder], attribute, handle))
    try:
        yield
    except BaseException:
        for module, attribute, handle in attached:
            handle.remove()
            delattr(module, attribute)
        raise


def calibrate_activations(model: nn.Module, batches: Iterable[Any]) -> None:
    """Calibrate all activations of a network on batches, without training: each for the least squared error over all.

    Args:
        model: The network, after :func:`quantize_activations`; its mode and its buffers stay.
        batches: Inputs such as it was trained on: a list or a DataLoader, as for :func:`~inq_lightning.quantize`.

    Raises:
        ValueError: It has no activations, there is no batch, one holds nan, or an activation has seen none.
    """
    if not activations_of(model):
        raise ValueError("the network has no activations to calibrate; call quantize_activations before")
    calibrate(model, read_batches(model, batches))


@torch.no_grad()
def calibrate(model: nn.Module, calls: Iterable[Call]) -> None:
    """The same with the arguments of each forward pass.

    Raises:
        ValueError: An activation has seen none.
    """
    found = activations_of(model)
    seen: set[nn.Module] = set()

    def observe(module: nn.Module, args: Any) -> None:
        assert isinstance(module, PowerOfTwoActivation)
        module.calibrate(args[0], more=module in seen)
        seen.add(module)

    handles = [activation.register_forward_pre_hook(observe) for activation in found.values()]
    try:
        with evaluating(model):
            for args, kwargs in calls:
                model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name, activation in found.items() if activation not in seen]
    if missing:
        raise ValueError(f"no batch has reached {', '.join(missing)}, so there is nothing to calibrate them by")
    for activation in found.values():
        activation.pending = False


def _attach(
    module: nn.Module, attribute: str, bits: int, signed: bool, name: str, device: torch.device
) -> RemovableHandle:
    activation = PowerOfTwoActivation(bits, signed, name)
    activation.to("cpu" if device.type == "meta" else device)
    activation.train(module.training)
    setattr(module, attribute, activation)
    if attribute == INPUT:
        return module.register_forward_pre_hook(_before)
    return module.register_forward_hook(_behind)


def _before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (getattr(module, INPUT)(args[0]), *args[1:])


def _behind(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    rounded: Tensor = getattr(module, OUTPUT)(output)
    return rounded


# ---- where they belong -----------------------------------------------------------------------------------------------


def places(network: nn.Module, prefix: str = "") -> list[Place]:
    """Where activations belong, so that every product, sum and average takes rounded ones; in the order of computation.

    Args:
        network: The network.
        prefix: What names begin with in messages.

    Raises:
        ValueError: It cannot be traced, does something that integers cannot, or computes a tensor behind which no
            activation can stand.
    """
    flow = trace(network)
    takers: dict[fx.Node, set[str]] = defaultdict(set)
    for step in flow.steps.values():
        for source in _taken_rounded(step, flow):
            takers[_origin(source, flow)].add(step.kind)
    inputs = (node for node, step in flow.steps.items() if step.kind == "input")
    wanted = {*takers, *(node for node in inputs if _entrance(node, flow) not in takers)}
    found, lines = [], []
    for node in flow.steps:
        if node not in wanted:
            continue
        place = _place(node, flow, network)
        if place is None:
            lines.append(_remedy(node, flow, prefix))
        else:
            found.append(place._replace(term=takers[node] == {"sum"}))
    if lines:
        raise ValueError("activations cannot be rounded everywhere:\n  " + "\n  ".join(lines))
    return found


def _taken_rounded(step: Step, flow: Flow) -> tuple[fx.Node, ...]:
    """The sources of a step that have to be whole numbers."""
    whole = step.kind in ("product", "sum", "average", "concat") or (step.kind == "norm" and not flow.is_fused(step))
    return step.sources if whole else ()


def _origin(node: fx.Node, flow: Flow) -> fx.Node:
    """Where values come from that are only moved about on their way; the largest one is rounded as all are."""
    step = flow.steps[node]
    return _origin(step.sources[0], flow) if step.kind in ("shape", "max") else node


def _place(node: fx.Node, flow: Flow, network: nn.Module) -> Place | None:
    step, signed = flow.steps[node], not _is_positive(node, flow)

    def holds(name: str) -> bool:  # a container would call one child more
        return not isinstance(network.get_submodule(name), (nn.Sequential, nn.ModuleList, nn.ModuleDict))

    if step.kind == "activation":  # in place already: its name says where
        holder, _, attribute = str(node.target).rpartition(".")
        return Place(holder, signed, attribute == INPUT)
    if step.kind == "input":
        taken = _taken_as(node, flow)
        entered = [name for name in flow.entered.get(taken, []) if flow.calls[name] == 1 and holds(name)]
        takers = [flow.owner[user] + "." for user in _takers(taken, flow)]
        whole = [name for name in entered if all(owner.startswith(f"{name}.") for owner in takers)]
        if len(takers) == 1 and entered:
            return Place(entered[-1], signed, before=True)
        if whole or holds(""):
            return Place(whole[-1] if whole else "", signed, before=True)
        return None
    for name in flow.returned.get(node, []):
        if flow.calls[name] == 1 and holds(name):
            return Place(name, signed)
    users = _takers(node, flow)
    passes = len(users) == 1 and isinstance(flow.steps[users[0]].module, (nn.Identity, nn.Dropout, nn.Dropout2d))
    return _place(users[0], flow, network) if passes else None


def _entrance(node: fx.Node, flow: Flow) -> fx.Node:
    """Where an input is rounded already, on its only way to the first operation; itself otherwise."""
    users = _takers(_taken_as(node, flow), flow)
    return users[0] if len(users) == 1 and flow.steps[users[0]].kind == "activation" else node


def _takers(node: fx.Node, flow: Flow) -> list[fx.Node]:
    return [user for user in node.users if flow.steps[user].kind != "number"]


def _taken_as(node: fx.Node, flow: Flow) -> fx.Node:
    """What becomes of an input on its only way to the first operation that computes."""
    takers = _takers(node, flow)
    return _taken_as(takers[0], flow) if len(takers) == 1 and flow.steps[takers[0]].kind == "shape" else node


def _is_positive(node: fx.Node, flow: Flow) -> bool:
    step = flow.steps[node]
    if isinstance(step.module, PowerOfTwoActivation):
        return not step.module.signed
    moves = step.kind in ("shape", "max", "average", "sum", "concat")
    return step.kind == "relu" or (moves and all(_is_positive(source, flow) for source in step.sources))


def _remedy(node: fx.Node, flow: Flow, prefix: str) -> str:
    if flow.steps[node].kind == "input":
        return "the input goes to several layers of an nn.Sequential; put these into one module, whose input it then is"
    if node.op == "call_module":
        calls = flow.calls[str(node.target)]
        return (
            f"{prefix}{node.target} is called {calls} times; give each call a module of its own, to have its own scale"
        )
    module = {"relu": "nn.ReLU()", "average": "nn.AdaptiveAvgPool2d(1)"}.get(flow.steps[node].kind, "one")
    owner = (prefix + flow.owner[node]).rstrip(".")
    return (
        f"{name_of(node)} in the forward of {owner or 'the network'} is no module, so nothing can stand behind it; "
        f"make it {module}"
    )
