"""The walk over a network, and what comes of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from inq_lightning.closed_form.norms import Channels, Norm, refit
from inq_lightning.closed_form.solve import Moments, approach, damped, target
from inq_lightning.closed_form.watch import Capture, Enough, Trace, Use
from inq_lightning.core.activations import calibrate, places, quantize_activations
from inq_lightning.core.coverage import Coverage
from inq_lightning.core.feeding import Call, read_batches
from inq_lightning.core.flow import network_of
from inq_lightning.core.frozen import fit_levels
from inq_lightning.core.layer import Layer, computed_tensors, plain_name
from inq_lightning.core.selection import Selection, select_parameters
from inq_lightning.grid import Grid, PowerOfTwoGrid
from inq_lightning.grid.levels import LevelsOption

COLUMNS = 4608  # inputs of a layer that are solved for at once; 170 MB of moments in float64


@dataclass(frozen=True)
class ClosedFormLayer(Layer):
    """One parameter that :func:`quantize` has put on a grid.

    Attributes:
        snr_db: The power of the layer's full-precision outputs over that of what the quantized network's miss, in dB,
            with all that the layers before it have changed; None where only the nearest levels were taken.
        nearest: Why only the nearest levels were taken; empty where they were solved for.
    """

    snr_db: float | None = None
    nearest: str = ""


@dataclass(frozen=True)
class ClosedForm:
    """What :func:`quantize` returns.

    Attributes:
        model: The quantized network.
        layers: One record for each parameter on a grid, in the module's order; for ``layers=`` of the exports.
        refitted: Names of the biases and of the norms' parameters and buffers that have changed.
        coverage: How much of the network's matrices that is, and why the others are as they were.
    """

    model: nn.Module
    layers: list[ClosedFormLayer]
    refitted: list[str]
    coverage: Coverage


def quantize(
    model: nn.Module,
    batches: Iterable[Any],
    bits: int = 3,
    *,
    levels: LevelsOption = "auto",
    layer_levels: Mapping[str, LevelsOption] | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    layer_bits: Mapping[str, int] | None = None,
    embeddings: bool = False,
    activation_bits: int | None = None,
    layer_activation_bits: Mapping[str, int] | None = None,
    input_bits: int = 8,
    progress: Callable[[int, int, str], None] | None = None,
) -> ClosedForm:
    """Quantize a trained network without training it, on some hundred inputs and no labels.

    Goes from the input to the output. Each layer sees what the quantized layers before it make of the inputs, and gets
    the levels with which its outputs come nearest to those of the full-precision network: least squares before any
    rounding (Li et al., GPTAQ, ICML 2025), then GPTQ (Frantar et al., ICLR 2023), then coordinate descent. Biases and
    norms make up for what they can; a batch norm, for the scale of each output too, so that the weights before it are
    free to take the scale at which they round best.

    Solved for are linear layers, convolutions (grouped, dilated, transposed), projections of attention, recurrent
    layers, and whatever else multiplies by a weight with :func:`torch.nn.functional.linear`, ``addmm`` or ``@``; the
    same weight in several places, too. Other selected weights get the nearest levels, and are named in the result.

    Args:
        model: The network, or a LightningModule; left as it is.
        batches: Inputs such as it was trained on, as a list or a DataLoader. A tensor is the argument of ``forward``; a
            tuple or list, its first arguments, as many as have no default, so that the labels of a pair (x, y) do
            not matter; a mapping, its arguments by name, or its argument where no name fits. They are kept in memory.
        bits: Code length of one weight, 2 to 8.
        levels: Which powers of two, see :class:`~inq_lightning.Options`. A weight of nothing but zeros stays zero.
        layer_levels: Levels for what matches a pattern, for instance ``{"net.fc": "full"}``.
        include: Quantize only parameters that match one of these patterns, see
            :func:`~inq_lightning.select_parameters`.
        exclude: Leave out parameters that match one of these patterns.
        layer_bits: Bit widths for what matches a pattern, for instance ``{"net.conv1": 8, "net.fc": 8}``.
        embeddings: Whether to quantize embedding tables too, to the nearest levels.
        activation_bits: Width of activations, which are then calibrated on the same inputs, see
            :func:`~inq_lightning.quantize_activations`; None leaves them as they are.
        layer_activation_bits: Widths for the outputs of layers that match a pattern.
        input_bits: Width of the network's input, where activations are rounded.
        progress: Called with steps done, steps in all, and the name of the step that begins; once more at the end.

    Returns:
        The quantized network, a copy in the same modes on the same device, with its records. The same arguments and
        random state give the same network.

    Raises:
        ValueError: There is no batch; a batch, or an output of a layer, is nan or inf; an option is wrong. The message
            names it.
    """
    selected = select_parameters(
        model,
        bits,
        include=include,
        exclude=exclude,
        layer_bits=layer_bits,
        levels=levels,
        layer_levels=layer_levels,
        embeddings=embeddings,
        trainable_only=False,
    )
    if activation_bits is not None:
        places(*network_of(model))  # refused before the work
    with _undisturbed():
        calls = read_batches(model, batches)
        walk = _Walk(model, selected, calls)
        if activation_bits is not None:  # before the weights, which then make up for them, too
            quantize_activations(walk.copy, activation_bits, input_bits=input_bits, layer_bits=layer_activation_bits)
            calibrate(walk.copy, calls)
        found = walk.run(progress or (lambda *step: None))
        if activation_bits is not None:
            calibrate(found.model, calls)
        return found


@contextmanager
def _undisturbed() -> Iterator[None]:
    """No gradients, no compilation, and random numbers that do not count."""
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(range(torch.cuda.device_count())))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


class _Walk:
    """The full-precision network, and the copy of it that is quantized step by step."""

    def __init__(self, model: nn.Module, selected: Selection, calls: list[Call]) -> None:
        self.model = model
        self.calls = calls
        self.coverage = selected.coverage
        self.bits = {one.name: one.bits for one in selected}
        self.levels = {one.name: one.levels for one in selected}
        # Its own buffers and modules, which a forward pass may change, but the model's parameters.
        self.wanted = copy.deepcopy(model, {id(p): p for p in model.parameters()} | computed_tensors(model)).eval()
        self.copy = copy.deepcopy(model, computed_tensors(model)).eval()
        self.tensors: dict[str, Tensor] = {
            plain_name(name): tensor for name, tensor in [*self.copy.named_parameters(), *self.copy.named_buffers()]
        }
        self.refitted: set[str] = set()
        self.settled: set[str] = set()  # norms that were refitted with the weight before them
        self.trace = Trace(self.wanted, self.bits)

    def run(self, progress: Callable[[int, int, str], None]) -> ClosedForm:
        with self.trace:
            for call in self.calls:
                self.trace.end_pass(_forward(self.wanted, call))
        uses = self.trace.uses
        found: dict[str, ClosedFormLayer] = {}
        for name in self.bits:
            if why := _why_nearest(self.tensors[name], uses.get(name)):
                found[name] = self._nearest(name, why)
        steps = [name for name in uses if name not in found]
        biases = [bias for name in self.bits if name in uses for bias in uses[name].biases]
        for done, name in enumerate(steps):
            progress(done, len(steps), name)
            if name in self.settled:
                continue
            if name in self.bits:
                own = uses[name].biases
                bias = next(iter(own)) if len(own) == 1 else None
                found[name] = self._solve(name, uses[name], bias if biases.count(bias) == 1 else None)
            else:
                self._refit(name, uses[name])
        progress(len(steps), len(steps), "")
        self._restore()
        return ClosedForm(self.copy, [found[name] for name in self.bits], sorted(self.refitted), self.coverage)

    def _solve(self, name: str, use: Use, bias: str | None) -> ClosedFormLayer:
        """Put a weight on the levels with which its outputs come nearest to what is wanted."""
        weight, layout = self.tensors[name], use.layouts[0]
        before = layout.matrix(weight).double()
        matrix = before.clone()
        grid: Grid | None = None
        columns = [slice(start, start + COLUMNS) for start in range(0, matrix.shape[2], COLUMNS)]
        rescale = use.only_normed and len(columns) == 1
        for block in columns:
            moments = self._moments(name, use, matrix, block)
            about = moments.about_means() if bias or use.only_normed else moments
            goal = matrix.clone()
            goal[..., block] = target(matrix[..., block], about.xx, about.xe)
            grid = grid or self._fit(name, goal)
            levels, factor = approach(goal[..., block], damped(about.xx), grid.levels.to(goal.device), rescale)
            change = levels * factor[..., None] - matrix[..., block]
            matrix[..., block] = levels
            weight.copy_(layout.weight(matrix, weight.shape))
        if rescale and len(use.norms) == 1:
            self._refit_after(next(iter(use.norms)), use, moments, before, matrix)
        elif bias and not use.only_normed:
            constant = self.tensors[bias]
            self._change(bias, constant + moments.mean_error(change).reshape(constant.shape))
        return self._record(name, grid, snr_db=about.snr_db(change))

    def _moments(self, name: str, use: Use, matrix: Tensor, block: slice) -> Moments:
        """What the weight is multiplied with, and what its outputs miss."""
        groups, outputs, inputs = matrix[..., block].shape
        moments = Moments(groups, inputs, outputs, matrix.device)
        for (product, actual), wanted in self._calls(name, use):
            goal = wanted[1] if wanted is not None and _comparable(actual, wanted[1]) else actual
            group = slice(None) if product.group is None else slice(product.group, product.group + 1)
            for x, y, aim in product.layout.rows(product.input, actual, goal):
                moments.add(_wide(x[..., block]), _wide(y), _wide(aim), group)
        if not bool(torch.isfinite(moments.xx.sum() + moments.power.sum() + moments.ee.sum())):
            raise ValueError(
                f"inputs or outputs of {name} are nan or inf for these batches; give the network inputs that it was "
                "trained on, or run it in a wider type"
            )
        return moments

    def _refit(self, name: str, use: Use) -> None:
        """Fit a norm to what is wanted of it, if anything before it has changed."""
        seen, changed = Channels(), False
        for (norm, actual), wanted in self._calls(name, use):
            if wanted is None or not _comparable(actual, wanted[1]):
                continue
            changed |= not torch.equal(actual, wanted[1])
            seen.add(_wide(norm.input if norm.mean is not None else actual), _wide(wanted[1]), norm.channel)
        if changed:
            self._apply(norm, seen)

    def _refit_after(self, name: str, use: Use, moments: Moments, before: Tensor, levels: Tensor) -> None:
        """The same of a batch norm right after a weight and after no other, by the weight's moments alone."""
        norm = self.trace.uses[name].norm
        if norm is None or self.trace.uses[name].calls != use.calls:
            return
        own: dict[str, Any] = {
            key: self.tensors[known] for key, tensor in vars(norm).items() if (known := self.trace.name(tensor))
        }
        self._apply(replace(norm, **own), Channels.of(moments, before, levels, norm))
        self.settled.add(name)

    def _apply(self, norm: Norm, seen: Channels) -> None:
        refit(norm, seen)
        own = {id(tensor) for tensor in norm.tensors}
        self.refitted |= {name for name, tensor in self.tensors.items() if id(tensor) in own}

    def _calls(self, name: str, use: Use) -> Iterator[tuple[tuple[Any, Tensor], tuple[Any, Tensor] | None]]:
        """Each call of a weight or norm in the quantized network with the one in the full-precision network."""
        for index, call in enumerate(self.calls):
            if count := use.calls[index]:
                ours, theirs = (_capture(model, name, count, call) for model in (self.copy, self.wanted))
                for place, one in enumerate(ours):
                    yield one, theirs[place] if place < len(theirs) else None

    def _nearest(self, name: str, why: str) -> ClosedFormLayer:
        """Put a weight on its nearest levels."""
        weight = self.tensors[name]
        grid = self._fit(name, weight)
        weight.copy_(grid.quantize(weight))
        return self._record(name, grid, nearest=why)

    def _fit(self, name: str, weight: Tensor) -> Grid:
        """The grid on which weights that are meant for a parameter have the least error."""
        bits, weight = self.bits[name], weight.to(self.tensors[name].dtype)
        if not bool(weight.any()):
            return PowerOfTwoGrid(None, bits)  # of any levels, zero is the only one that stands for it
        family = fit_levels(self.tensors[name], bits, self.levels[name])
        return PowerOfTwoGrid.from_weights(weight, bits, exponent="mse", family=family)

    def _change(self, name: str, value: Tensor) -> None:
        self.tensors[name].copy_(value)
        self.refitted.add(name)

    def _record(self, name: str, grid: Grid | None, **told: Any) -> ClosedFormLayer:
        shape = tuple(self.tensors[name].shape)
        return ClosedFormLayer(name, shape, self.bits[name], grid, self.tensors[name].numel(), **told)

    def _restore(self) -> None:
        """Modes as they were, and buffers that passes have changed."""
        ours = dict(self.copy.named_modules())
        for name, theirs in self.model.named_modules():
            ours[name].training = theirs.training
        for name, buffer in self.model.named_buffers():
            own = self.tensors[plain_name(name)]
            if plain_name(name) not in self.refitted and own.shape == buffer.shape:
                own.copy_(buffer)


def _why_nearest(weight: Tensor, use: Use | None) -> str:
    """Why a weight cannot be solved for; empty where it can."""
    if use is None:
        return "no batch reaches it"
    if not use.layouts:
        return "what it is used for is no matrix product of it with an input"
    first, *others = use.layouts
    place = torch.arange(weight.numel()).view(weight.shape)
    if any(not torch.equal(first.matrix(place), other.matrix(place)) for other in others):
        return "it is multiplied with in ways that differ"
    return ""


def _forward(model: nn.Module, call: Call) -> Any:
    """The same random numbers each time, and a copy of the batch: the model may write into it."""
    torch.manual_seed(0)
    args, kwargs = copy.deepcopy(call)
    return model(*args, **kwargs)


def _capture(model: nn.Module, name: str, count: int, call: Call) -> list[tuple[Any, Tensor]]:
    capture = Capture(model, name, count)
    with capture, suppress(Enough):
        _forward(model, call)
    return capture.found


def _comparable(actual: Tensor, wanted: Tensor) -> bool:
    """Whether two outputs are of the same inputs, which a network's own choice, as of experts, may have changed."""
    if actual.shape != wanted.shape:
        return False
    actual, wanted = _wide(actual), _wide(wanted)
    return not bool((wanted - actual).square().mean() > wanted.var(correction=0))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.itemsize < 4 else tensor
