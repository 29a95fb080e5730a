"""From a quantized network to whole numbers. Only here something may be lost, and how much is counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from inq_lightning.core.activation import PowerOfTwoActivation
from inq_lightning.core.feeding import device_of, evaluating
from inq_lightning.core.flow import INPUT, Flow, Step, network_of, trace
from inq_lightning.core.layer import Layer, named_weights
from inq_lightning.formats.layers import find_grids
from inq_lightning.grid import Grid
from inq_lightning.integer.network import IntegerNetwork
from inq_lightning.integer.operations import (
    Average,
    Concat,
    Max,
    Operation,
    Pad,
    Product,
    Reshape,
    Scale,
    Slice,
    Sum,
)
from inq_lightning.integer.record import whole
from inq_lightning.integer.scaling import fit_scaling

MOST_TERMS = 4
_TRIED = 3  # the size of a batch by which shapes are found
_STAYS = 1e-3  # share of predictions that fewer terms may change more than the most do


def lower(
    model: nn.Module, images: Tensor, *, terms: int | None = None, layers: Iterable[Layer] | None = None
) -> IntegerNetwork:
    """Turn a quantized network into one of whole numbers.

    Weights and rounded activations are whole numbers already, and stay. A normalization's factor becomes a sum of up to
    ``terms`` signed powers of two in each channel, and biases become whole numbers.

    Args:
        model: The network, whose weights and activations are quantized, see
            :func:`~inq_lightning.quantize_activations`; or a module that holds it.
        images: Inputs, of shape (batch, ...), by which predictions are compared.
        terms: Powers of two a factor has at most; left out, the fewest of 1 to 4 that keep the predictions.
        layers: `INQCallback.layers`; left out, the weights tell by themselves.

    Returns:
        The network; its ``changed`` tells of how many ``images`` the prediction is another one.

    Raises:
        ValueError: Weights are not on a grid, activations are not rounded or not calibrated, there is an operation that
            whole numbers cannot follow, or an accumulator needs more than 32 bits; the message names the layer.
    """
    if terms is not None and not 1 <= terms <= MOST_TERMS:
        raise ValueError(f"terms must be 1 to {MOST_TERMS}, or None, got {terms}")
    if bool(images.isnan().any()):
        raise ValueError("images hold nan; look for it in the data")
    network, prefix = network_of(model)
    images = images.to(device_of(network))
    grids = find_grids(model, layers)
    owners = {id(p): grids[name] for name, p in named_weights(model) if name in grids}
    with evaluating(network), torch.no_grad():
        flow = trace(network)
        ShapeProp(flow.module).propagate(images[:1].expand(_TRIED, *images.shape[1:]))
        found = [
            _Lowering(flow, network, prefix, owners, count).network()
            for count in ([terms] if terms is not None else range(1, MOST_TERMS + 1))
        ]
        predicted = _decisions(network, images)
        compared = []
        for one in found:
            changed = int((_decisions(one.to_torch(torch.float32), images.cpu()) != predicted).sum())
            compared.append(replace(one, images=len(images), changed=changed))
    allowed = min(one.changed for one in compared) + _STAYS * len(images)
    return next(one for one in compared if one.changed <= allowed)


def _decisions(network: nn.Module, images: Tensor) -> Tensor:
    logits = torch.cat([network(part).flatten(1).cpu() for part in torch.split(images, 128)])
    return logits.argmax(1) if logits.shape[1] > 1 else logits[:, 0] > 0


@dataclass
class _Value:
    """A tensor of whole numbers: which one, and what it stands for."""

    place: int
    exponent: int
    low: int
    high: int
    shape: tuple[int, ...]


@dataclass
class _Pending:
    """Sums that are not rounded yet: factor · (accumulator + before) + after, clamped.

    Attributes:
        make: Makes the operation of a scaling and its exponent, once the scaling is known.
        name: The layer.
        shape: Their shape, without the batch.
        exponent: That of the accumulator's step.
        peaks: Largest magnitudes of the accumulators, int64 of shape (channels,).
        factor: float64 of the same shape.
        before: Likewise.
        after: Likewise.
        low: Least result, in real units.
        high: Largest result, in real units.
        moves: What comes behind the rounding, since it makes no difference where: it only moves values about, or takes
            the largest.
    """

    make: Callable[..., Operation]
    name: str
    shape: tuple[int, ...]
    exponent: int
    peaks: Tensor
    factor: Tensor
    before: Tensor
    after: Tensor
    low: float = -torch.inf
    high: float = torch.inf
    moves: tuple[Callable[[_Value], _Value], ...] = ()


class _Lowering:
    """One walk through the network, with so many powers of two a factor."""

    def __init__(self, flow: Flow, network: nn.Module, prefix: str, grids: dict[int, Grid], terms: int) -> None:
        self.flow, self.root, self.prefix, self.grids, self.terms = flow, network, prefix, grids, terms
        self.operations: list[Operation] = []
        self.values: dict[fx.Node, _Value | _Pending] = {}
        self.input: _Value | None = None

    def network(self) -> IntegerNetwork:
        """The operations of all steps."""
        for node, step in self.flow.steps.items():
            if step.kind == "output":
                self._finish(step)
            elif step.kind != "number":
                self.values[node] = getattr(self, f"_{step.kind}")(step)
        assert self.input is not None
        entry = self.input
        return IntegerNetwork(entry.shape, entry.exponent, entry.low, entry.high, tuple(self.operations))

    # ---- what has come before ----------------------------------------------------------------------------------------

    def _name(self, step: Step) -> str:
        return self.prefix + self.flow.where(step.node)

    def _whole(self, step: Step, source: fx.Node) -> _Value:
        value = self.values[source]
        if isinstance(value, _Value):
            return value
        raise self._not_rounded(step)

    def _not_rounded(self, step: Step) -> ValueError:
        source = next(s for s in step.sources if isinstance(self.values[s], _Pending))
        return ValueError(
            f"{self._name(step)} takes what {self.prefix}{self.flow.where(source)} returns, which is not rounded; let "
            "quantize_activations put activations in place, and train or calibrate them"
        )

    def _result(self, step: Step) -> tuple[int, ...]:
        """Shape of what a step computes, without the batch."""
        return tuple(step.node.meta["tensor_meta"].shape[1:])

    def _append(self, operation: Operation) -> _Value:
        if operation.peak >= 1 << 31:
            bits = operation.peak.bit_length() + 1
            raise ValueError(
                f"{operation.name}: its accumulator would need {bits} bits, 32 are there; give it fewer bits of "
                "weights or activations"
            )
        self.operations.append(operation)
        shape, exponent = operation.shape, operation.exponent
        return _Value(len(self.operations), exponent, operation.low, operation.high, shape)

    def _pending(self, step: Step, make: Callable[..., Operation], exponent: int, peaks: Tensor) -> _Pending:
        ones = torch.ones(len(peaks), dtype=torch.float64)
        name, shape = self._name(step), self._result(step)
        make = partial(make, name=name)
        return _Pending(make, name, shape, exponent, peaks, ones, 0 * ones, 0 * ones)

    def _as_pending(self, step: Step, value: _Value | _Pending) -> _Pending:
        """Something to scale: what is pending, or the value itself."""
        if isinstance(value, _Pending):
            return value
        channels = value.shape[0] if step.kind == "norm" else 1
        peaks = torch.full((channels,), max(-value.low, value.high), dtype=torch.int64)
        return self._pending(step, partial(Scale, sources=(value.place,)), value.exponent, peaks)

    # ---- kind by kind ------------------------------------------------------------------------------------------------

    def _input(self, step: Step) -> _Value:
        if self.input is not None:
            raise ValueError(f"{self._name(step)} is a second input; a network of whole numbers has one")
        activation = self._activation_of(step.node)
        if activation is None:
            raise ValueError("the input is not rounded; let quantize_activations put activations in place")
        exponent = self._exponent(activation, "the input")
        self.input = _Value(0, exponent, activation.low, activation.high, self._result(step))
        return self.input

    def _activation_of(self, node: fx.Node) -> PowerOfTwoActivation | None:
        """What rounds the input, be it only after it has been moved about."""
        there = getattr(self.root, INPUT, None)
        users = [self.flow.steps[user] for user in node.users]
        for step in users:
            if isinstance(step.module, PowerOfTwoActivation):
                there = step.module
            elif step.kind == "shape" and len(users) == 1:
                there = self._activation_of(step.node)
        return there

    def _exponent(self, activation: PowerOfTwoActivation, name: str) -> int:
        if activation.exponent is None:
            raise ValueError(
                f"{activation.name or name}: its activations are not calibrated; train with them, or call "
                "calibrate_activations"
            )
        return activation.exponent

    def _activation(self, step: Step) -> _Value:
        activation, value = step.module, self.values[step.sources[0]]
        assert isinstance(activation, PowerOfTwoActivation)
        exponent = self._exponent(activation, self._name(step))
        if isinstance(value, _Value):
            same = value.exponent == exponent and activation.low <= value.low and value.high <= activation.high
            if same:
                return value
            value = self._as_pending(step, value)
        low = max(activation.low, _steps(value.low, exponent))
        high = min(activation.high, _steps(value.high, exponent))
        return self._scaled(value, exponent, low, high)

    def _scaled(self, value: _Pending, exponent: int | None, low: int | None, high: int | None) -> _Value:
        scaling, exponent = fit_scaling(
            value.name,
            value.factor,
            value.before,
            value.after,
            value.peaks,
            value.exponent,
            exponent,
            self.terms,
            low,
            high,
            in_sums=cast("partial[Operation]", value.make).func is Product,
        )
        peak = max(scaling.peak(value.peaks), int(value.peaks.max()))
        least, largest = max(scaling.low, -peak), min(scaling.high, peak)
        result = self._append(
            value.make(
                shape=value.shape,
                scaling=scaling,
                sums=int(value.peaks.max()),
                exponent=exponent,
                low=least,
                high=largest,
                peak=peak,
            )
        )
        for move in value.moves:
            result = move(result)
        return result

    def _product(self, step: Step) -> _Pending:
        value, module = self._whole(step, step.sources[0]), step.module
        assert isinstance(module, (nn.Conv2d, nn.Linear))
        grid = self.grids.get(id(module.weight))
        if grid is None:
            raise ValueError(f"{self._name(step)}: its weight is not on a grid; quantize it")
        if isinstance(module, nn.Linear) and len(value.shape) != 1:
            raise ValueError(
                f"{self._name(step)} takes inputs of shape {value.shape}; a linear layer takes one dimension here, so "
                "flatten them"
            )
        try:
            weight, unit = whole(grid, module.weight)
        except ValueError as error:
            raise ValueError(f"{self._name(step)}: {error}") from error
        rows = weight.flatten(1)
        peaks = torch.maximum(
            rows.clamp(min=0).sum(1) * value.high - rows.clamp(max=0).sum(1) * -value.low,
            -(rows.clamp(min=0).sum(1) * value.low + rows.clamp(max=0).sum(1) * value.high),
        )
        make: Any = partial(Product, sources=(value.place,), weight=weight.to(torch.int32), unit=unit, bits=grid.bits)
        if isinstance(module, nn.Conv2d):
            make = partial(make, **_geometry(self._name(step), module))
        pending = self._pending(step, make, value.exponent + unit, peaks)
        if module.bias is not None:
            pending.before = module.bias.double().cpu()
        return pending

    def _norm(self, step: Step) -> _Pending:
        pending, module = self._as_pending(step, self.values[step.sources[0]]), step.module
        if pending.moves:
            raise self._not_rounded(step)
        assert isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))
        if module.running_mean is None or module.running_var is None:
            raise ValueError(f"{self._name(step)} keeps no running statistics; train it with track_running_stats=True")
        if module.num_features != len(pending.peaks):
            raise ValueError(f"{self._name(step)} normalizes another dimension than that of the layer before it")
        mean, variance = module.running_mean.double().cpu(), module.running_var.double().cpu()
        gain = torch.ones_like(mean) if module.weight is None else module.weight.double().cpu()
        offset = torch.zeros_like(mean) if module.bias is None else module.bias.double().cpu()
        gain = gain / (variance + module.eps).sqrt()
        for what in (gain, mean, offset):
            if not bool(what.isfinite().all()):
                raise ValueError(f"{self._name(step)} holds infinite values or nan; train it again")
        if bool((pending.factor == 1).all()) and bool((pending.after == 0).all()):
            return replace(pending, factor=gain, before=pending.before - mean, after=offset)
        after = gain * (pending.after - mean) + offset
        return replace(pending, factor=gain * pending.factor, after=after)

    def _relu(self, step: Step) -> _Value | _Pending:
        value = self.values[step.sources[0]]
        high = 6.0 if isinstance(step.module, nn.ReLU6) or step.function == "relu6" else torch.inf
        if isinstance(value, _Value):
            if value.low >= 0 and value.high * 2.0**value.exponent <= high:
                return value
            pending = self._as_pending(step, value)
            whole = min(value.high, _steps(high, value.exponent))
            return self._scaled(pending, value.exponent, max(value.low, 0), whole)
        return replace(value, low=max(value.low, 0.0), high=min(value.high, high))

    def _sum(self, step: Step) -> _Pending:
        a, b = (self._whole(step, source) for source in step.sources)
        if a.shape != b.shape:
            raise ValueError(f"{self._name(step)} adds shapes {a.shape} and {b.shape}; only equal ones can be added")
        exponent = min(a.exponent, b.exponent)
        lefts = (a.exponent - exponent, b.exponent - exponent)
        peak = sum(max(-one.low, one.high) << left for one, left in zip((a, b), lefts, strict=True))
        make = partial(Sum, sources=(a.place, b.place), lefts=lefts)
        return self._pending(step, make, exponent, torch.tensor([peak]))

    def _average(self, step: Step) -> _Pending:
        value, (kernel, stride, padding) = self._whole(step, step.sources[0]), self._window(step)
        area = kernel[0] * kernel[1]
        make = partial(Average, sources=(value.place,), kernel=kernel, stride=stride, padding=padding)
        pending = self._pending(step, make, value.exponent, torch.tensor([area * max(-value.low, value.high)]))
        pending.factor = pending.factor / area
        if len(pending.shape) == 3:
            return pending
        flat = partial(self._moved, Reshape, step)  # a mean may drop the pixels
        return replace(pending, shape=(*pending.shape, 1, 1), moves=(flat,))

    def _window(self, step: Step) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """Kernel, stride and padding of an average."""
        options = vars(step.module) if step.module is not None else step.options
        size = self._whole(step, step.sources[0]).shape
        if len(size) != 3:
            raise ValueError(f"{self._name(step)} averages over shape {size}; it must be channels, height and width")
        height, width = size[1:]
        if step.function == "mean":
            dims: Any = options.get("dim")
            if not isinstance(dims, (tuple, list)) or sorted(d % 4 for d in dims) != [2, 3]:
                raise ValueError(f"{self._name(step)} takes the mean over {dims}; only (2, 3), the pixels, is possible")
            return (height, width), (height, width), (0, 0)
        if "output_size" in options:
            rows, columns = self._result(step)[1:]
            if height % rows or width % columns:
                raise ValueError(f"{self._name(step)} averages {height}x{width} to {rows}x{columns} in unequal windows")
            kernel = (height // rows, width // columns)
            return kernel, kernel, (0, 0)
        kernel = _pair(options["kernel_size"])
        stride, padding = _pair(options.get("stride") or kernel), _pair(options.get("padding", 0))
        uneven = options.get("ceil_mode", False) or options.get("divisor_override") is not None
        if uneven or (padding != (0, 0) and not options.get("count_include_pad", True)):
            raise ValueError(
                f"{self._name(step)}: ceil_mode, divisor_override and count_include_pad=False are not supported"
            )
        return kernel, stride, padding

    def _max(self, step: Step) -> _Value | _Pending:
        value = self.values[step.sources[0]]
        return self._later(value, partial(self._largest, step))

    def _later(self, value: _Value | _Pending, move: Callable[[_Value], _Value]) -> _Value | _Pending:
        """Move a value, now or once it is rounded."""
        return move(value) if isinstance(value, _Value) else replace(value, moves=(*value.moves, move))

    def _largest(self, step: Step, value: _Value) -> _Value:
        options = vars(step.module) if step.module is not None else step.options
        if options.get("ceil_mode", False) or len(value.shape) != 3:
            raise ValueError(f"{self._name(step)}: only two dimensions without ceil_mode are supported")
        kernel = _pair(options["kernel_size"])
        return self._moved(
            Max,
            step,
            value,
            kernel=kernel,
            stride=_pair(options.get("stride") or kernel),
            padding=_pair(options.get("padding", 0)),
            dilation=_pair(options.get("dilation", 1)),
        )

    def _moved(self, kind: Callable[..., Operation], step: Step, value: _Value, **options: Any) -> _Value:
        peak = max(-value.low, value.high)
        options = {"shape": self._result(step)} | options
        return self._append(
            kind(
                name=self._name(step),
                sources=(value.place,),
                exponent=value.exponent,
                low=value.low,
                high=value.high,
                peak=peak,
                **options,
            )
        )

    def _concat(self, step: Step) -> _Value:
        values = [self._whole(step, source) for source in step.sources]
        axis = int(step.options.get("dim") or 0) % (len(values[0].shape) + 1)
        if axis == 0:
            raise ValueError(f"{self._name(step)} joins inputs of a batch; join dimension 1")
        exponent = min(value.exponent for value in values)
        lefts = tuple(value.exponent - exponent for value in values)
        low = min(value.low << left for value, left in zip(values, lefts, strict=True))
        high = max(value.high << left for value, left in zip(values, lefts, strict=True))
        return self._append(
            Concat(
                name=self._name(step),
                sources=tuple(value.place for value in values),
                shape=self._result(step),
                exponent=exponent,
                low=low,
                high=high,
                peak=max(-low, high),
                lefts=lefts,
                axis=axis,
            )
        )

    def _shape(self, step: Step) -> _Value | _Pending:
        if step.node.meta["tensor_meta"].shape[0] != _TRIED:
            raise ValueError(f"{self._name(step)} changes the first dimension, which is the batch")
        return self._later(self.values[step.sources[0]], partial(self._move, step))

    def _move(self, step: Step, value: _Value) -> _Value:
        if step.function == "pad" or isinstance(step.module, nn.ZeroPad2d):
            return self._pad(step, value)
        if step.function == "getitem":
            return self._slice(step, value)
        return value if self._result(step) == value.shape else self._moved(Reshape, step, value)

    def _pad(self, step: Step, value: _Value) -> _Value:
        amounts: Any = step.options["pad"] if step.module is None else step.module.padding
        if step.options.get("mode", "constant") != "constant" or step.options.get("value") not in (None, 0, 0.0):
            raise ValueError(f"{self._name(step)} pads with other than zeros")
        if len(amounts) > 2 * len(value.shape):
            raise ValueError(f"{self._name(step)} pads the batch")
        return self._moved(Pad, step, value, amounts=tuple(amounts))

    def _slice(self, step: Step, value: _Value) -> _Value:
        index = step.options["index"]
        index = index if isinstance(index, tuple) else (index,)
        dims = len(value.shape) + 1
        if Ellipsis in index:
            at = index.index(Ellipsis)
            index = (*index[:at], *[slice(None)] * (dims - len(index) + 1), *index[at + 1 :])
        index = (*index, *[slice(None)] * (dims - len(index)))
        plain = all(isinstance(one, slice) for one in index)
        if not plain or index[0] != slice(None) or any(isinstance(x, fx.Node) for x in step.node.all_input_nodes[1:]):
            raise ValueError(f"{self._name(step)} takes other than slices of fixed numbers")
        slices = tuple(one.indices(size) for one, size in zip(index[1:], value.shape, strict=True))
        return self._moved(Slice, step, value, slices=slices)

    # ---- the end -----------------------------------------------------------------------------------------------------

    def _finish(self, step: Step) -> None:
        if len(step.sources) != 1 or step.node.args[0] is not step.sources[0]:
            raise ValueError("the network returns other than one tensor; whole numbers make one")
        value = self.values[step.sources[0]]
        if isinstance(value, _Pending):
            bounds = (value.low, value.high) != (-torch.inf, torch.inf)
            value = self._scaled(value, None, None, None)
            if bounds:
                raise ValueError("the network returns what an activation has clamped; let it return logits")
        elif value.place != len(self.operations):
            self._moved(Reshape, step, value)


def _geometry(name: str, module: nn.Conv2d) -> dict[str, Any]:
    """Stride, padding, dilation and groups of a convolution."""
    if module.padding_mode != "zeros":
        raise ValueError(f"{name} pads by padding_mode={module.padding_mode!r}; only zeros are possible")
    left_right_top_bottom = tuple(module._reversed_padding_repeated_twice)  # "same" may pad one side more
    return {
        "stride": _pair(module.stride),
        "padding": left_right_top_bottom,
        "dilation": _pair(module.dilation),
        "groups": module.groups,
    }


def _steps(value: float, exponent: int) -> int:
    """A bound in steps of 2^exponent; infinite ones are beyond any code."""
    if value in (torch.inf, -torch.inf):
        return 1 << 40 if value > 0 else -(1 << 40)
    return round(value * 2.0**-exponent)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[-1]))
