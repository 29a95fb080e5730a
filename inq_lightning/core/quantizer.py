"""The engine: incremental network quantization of one module, in whatever loop trains it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from inq_lightning.core import sharding, state
from inq_lightning.core.frozen import FrozenWeight, Rounding
from inq_lightning.core.layer import Layer, named_weights, plain_name
from inq_lightning.core.options import Options
from inq_lightning.core.plan import Plan
from inq_lightning.core.restart import LearningRateRestart
from inq_lightning.core.schedule import Length, Schedule, Unit
from inq_lightning.core.selection import Selected, select_parameters

_NAMED = 8  # parameters that a message names at most


class Quantizer:
    """Rounds and freezes the weights of one module, phase by phase (Zhou et al., ICLR 2017, algorithm 1).

    A front end calls, in this order: :meth:`configure` with fresh optimizers, :meth:`load_state_dict` where a run
    resumes, :meth:`attach` once the weights are in place, :meth:`begin`; then :meth:`advance` wherever a phase may
    begin, :meth:`mask_gradients` after each backward pass and :meth:`restore` after each optimizer step, which
    :meth:`hold` sees to; at the end :meth:`release` and :meth:`verify`.

    With sharded parameters, attach, begin, advance, moved, frozen_mask and state_dict are collective calls.

    Attributes:
        options: What the user asked for.
        timetable: The schedule; with starts once :meth:`begin` has fitted it to the run.
        origin: Epoch or step at which INQ began, from which the timetable counts.
        phase: How many portions have begun: 0 before the first one.
        sqnr_db: Signal-to-quantization-noise ratio of the group frozen last, in dB; None where nothing was changed.
        weights: The selected parameters by name, in the module's order.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.timetable: Schedule = options.phases
        self.origin = 0
        self.phase = 0
        self.sqnr_db: float | None = None
        self.weights: dict[str, FrozenWeight] = {}
        self._loaded: dict[str, Any] | None = None  # a checkpoint's state, until begin
        self._optimizers: Sequence[Optimizer] = ()
        self._restart: LearningRateRestart | None = None
        self._hooks: StepHooks | None = None

    # ---- what users ask ----------------------------------------------------------------------------------------------

    @property
    def quantized_fraction(self) -> float:
        """Share of the selected weights that are frozen, all layers together: 0 to 1."""
        total = sum(weight.numel for weight in self.weights.values())
        return sum(weight.frozen for weight in self.weights.values()) / total if total else 0.0

    @property
    def layers(self) -> list[Layer]:
        """One record for each selected parameter, in the module's order; empty before training starts."""
        return [weight.layer for weight in self.weights.values()]

    @property
    def complete(self) -> bool:
        """Whether the last phase has begun."""
        return self.phase == len(self.timetable.portions)

    @property
    def loaded(self) -> bool:
        """Whether a checkpoint's state waits for :meth:`begin`."""
        return self._loaded is not None

    @property
    def sharded(self) -> bool:
        """Whether processes share a parameter's weights among them."""
        return any(sharding.is_sharded(weight.parameter) for weight in self.weights.values())

    def describes(self, module: nn.Module) -> bool:
        """Whether its parameters are those of ``module``, with all frozen weights at their values."""
        parameters = dict(named_weights(module))
        same = all(parameters.get(name) is weight.parameter for name, weight in self.weights.items())
        return same and not self.moved()

    def frozen_mask(self, name: str) -> Tensor:
        """Which weights of a parameter are frozen: bool in its shape, see :meth:`INQCallback.frozen_mask`."""
        if name not in self.weights:
            near = difflib.get_close_matches(name, self.weights, n=3, cutoff=0.3)
            raise KeyError(
                f"{name!r} is not a quantized parameter" + (f"; near names: {', '.join(near)}" if near else "")
            )
        weight = self.weights[name]
        return sharding.full(weight.mask, weight.parameter)

    def select(self, module: nn.Module) -> list[Selected]:
        """The parameters of ``module`` that would be quantized, and at how many bits."""
        options = self.options
        return select_parameters(
            module,
            options.bits,
            include=options.include,
            exclude=options.exclude,
            layer_bits=options.layer_bits,
            embeddings=options.embeddings,
            pruned=options.keep_zeros,
        )

    def plan(self, module: nn.Module, length: Length | None = None) -> Plan:
        """What would happen to ``module`` in a run of this length; nothing changes.

        Raises:
            ValueError: The run is too short, or nothing can be selected.
        """
        schedule = self.options.phases if length is None else self.options.phases.fit(length)
        return Plan.of(module, self.select(module), schedule, self.options.keep_zeros)

    # ---- a run -------------------------------------------------------------------------------------------------------

    def configure(self, optimizers: Sequence[Optimizer], schedulers: Sequence[Any] = ()) -> None:
        """Remember optimizers and schedulers as they were configured, before a checkpoint changes them."""
        self._optimizers = optimizers
        self._restart = LearningRateRestart(optimizers, schedulers) if self.options.restart_lr else None

    def attach(self, module: nn.Module) -> None:
        """Take in all selected weights, those included that have become trainable since the last call."""
        sharding.reshard(module)
        for name, parameter, bits, pruning_mask in self.select(module):
            if name in self.weights:
                continue
            weight = self.weights[name] = self._frozen_weight(name, parameter, bits)
            if self._loaded is None:
                if self.options.keep_zeros:
                    weight.keep_zeros(pruning_mask)
                if self.phase:
                    self._freeze(weight)

    def begin(self, module: nn.Module, length: Length, position: Callable[[Unit], int]) -> None:
        """Fit the schedule to the run, then go on from a loaded state or begin where the run stands.

        Args:
            module: The module, after :meth:`attach`.
            length: How long the run is, from its very start.
            position: The epoch or step at which it stands.

        Raises:
            ValueError: The run is too short, or the state does not fit it; the message says what differs.
        """
        schedule = self.options.phases.counted_for(length)
        if self._loaded is None:
            self.origin = position(schedule.unit)
            self.timetable = schedule.fit(length, self.origin)
            self.timetable.check_certain(length, self.origin)
            return
        loaded = state.check(self._loaded)
        saved = Schedule(**loaded["schedule"])
        # An open schedule was spread over the run that began.
        self.timetable = saved if schedule.starts is None and schedule.portions == saved.portions else schedule
        parameters = dict(named_weights(module))
        for name, layer in loaded["layers"].items():  # a finetuning callback has not made it trainable again yet
            if name not in self.weights and name in parameters and not parameters[name].requires_grad:
                self.weights[name] = self._frozen_weight(name, parameters[name], layer["bits"])
        state.check_fits(loaded, self.options, self.timetable, self.weights)
        self.timetable.fit(length, loaded["origin"])
        self.timetable.check_certain(length, loaded["origin"])
        state.load(loaded, self.weights)
        self.phase, self.origin, self._loaded = loaded["phase"], loaded["origin"], None

    def advance(self, module: nn.Module, now: int) -> bool:
        """Begin the phase that the timetable asks for at epoch or step ``now``, unless it has begun: in all layers.

        Returns:
            Whether a phase has begun.

        Raises:
            ValueError: Weights cannot be rounded, because training has diverged for instance; then nothing has
                changed, in no layer.
        """
        phase = self.timetable.phase_at(now - self.origin)
        if phase <= self.phase:
            return False
        sharding.reshard(module)
        for weight in self.weights.values():
            weight.check()  # all of them, so that an error leaves none frozen ahead of the others
        self.phase = phase
        roundings = [self._freeze(weight) for weight in self.weights.values()]
        if self._restart is not None:
            self._restart()
        if self.options.reset_optimizer:
            for optimizer in self._optimizers:
                optimizer.state.clear()
        signal, noise = (sum(sums) for sums in zip(*roundings, strict=True))
        if signal and noise:  # otherwise rounding has changed nothing, which no logger can draw
            self.sqnr_db = 10 * math.log10(signal / noise)
        return True

    def mask_gradients(self) -> None:
        """Zero the gradients of frozen weights."""
        for weight in self.weights.values():
            weight.mask_gradient()

    def restore(self) -> None:
        """Put frozen weights back to their values, bit for bit."""
        for weight in self.weights.values():
            weight.restore()

    def hold(self) -> bool:
        """Restore after every step of the configured optimizers from now on, by hooks of theirs.

        Returns:
            Whether every optimizer takes a hook; where not, :meth:`restore` has to be called.
        """
        self._hooks = StepHooks(self._optimizers, self.restore)
        return self._hooks.complete

    def held(self) -> bool:
        """Whether weights were restored by a hook since this was asked last."""
        return self._hooks is not None and self._hooks.ran()

    def release(self) -> None:
        """Remove the hooks, and let go of optimizers and schedulers: not every one can be pickled."""
        if self._hooks is not None:
            self._hooks.remove()
        self._hooks = self._restart = None
        self._optimizers = ()

    def moved(self, saved: Mapping[str, Tensor] | None = None) -> dict[str, int]:
        """How many frozen weights are not at their values, by parameter; parameters without such are left out.

        Args:
            saved: Look at these tensors, where it has them, and not at the parameters: a ``state_dict``.
        """
        copies = {plain_name(name): tensor for name, tensor in (saved or {}).items() if isinstance(tensor, Tensor)}
        moved = {}
        for name, weight in self.weights.items():
            parameter, copy = weight.parameter, copies.get(name)
            if copy is not None and (copy.shape != parameter.shape or sharding.is_sharded(parameter)):
                copy = None
            if count := sharding.total(weight.drifted(copy), parameter):
                moved[name] = count
        return moved

    def verify(self) -> None:
        """Make sure that every frozen weight is where it was frozen.

        Raises:
            RuntimeError: Some are not; the message names their parameters.
        """
        moved = {name: count for name, weight in self.weights.items() if (count := weight.drifted())}
        if moved:
            raise RuntimeError(
                f"{self.listing(moved)} are not at their values any more: something other than an optimizer has "
                "changed them since they were put back last"
            )

    def listing(self, moved: Mapping[str, int]) -> str:
        """What :meth:`moved` has found, in words."""
        named = [f"{name}: {count} of {self.weights[name].frozen} frozen weights" for name, count in moved.items()]
        return ", ".join(named[:_NAMED]) + (f" and {len(named) - _NAMED} more parameters" if named[_NAMED:] else "")

    # ---- what a checkpoint keeps -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as plain values and one packed mask for each parameter (1 bit a weight)."""
        if self._loaded is not None or not self.weights:
            return self._loaded or {}  # written before training started, by a tuner or after a refusal
        return {
            "version": state.VERSION,
            "options": self.options.as_dict(),
            "phase": self.phase,
            "origin": self.origin,
            "quantized_fraction": self.quantized_fraction,
            "schedule": {
                "portions": list(self.timetable.portions),
                "starts": list(self.timetable.starts or ()),
                "unit": self.timetable.unit,
            },
            "layers": {name: weight.state_dict() for name, weight in self.weights.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until :meth:`begin`; only then are the weights known to be in place."""
        self._loaded = state_dict or None

    def _frozen_weight(self, name: str, parameter: nn.Parameter, bits: int) -> FrozenWeight:
        return FrozenWeight(name, parameter, bits, self.options.underflow, self.options.exponent)

    def _freeze(self, weight: FrozenWeight) -> Rounding:
        return weight.freeze(self.timetable.portions[self.phase - 1], self.options.partition, self.options.seed)


class StepHooks:
    """Runs an action after every step of some optimizers.

    Attributes:
        complete: Whether all of them take a hook.
    """

    def __init__(self, optimizers: Sequence[Optimizer], action: Callable[[], None]) -> None:
        self._action = action
        self._ran = False
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self.complete = True
        for optimizer in optimizers:
            try:
                self._handles.append(optimizer.register_step_post_hook(self._after_step))
            except AttributeError:  # a wrapper that never initialized its base class
                self.complete = False

    def ran(self) -> bool:
        """Whether the action ran since this was asked last."""
        ran, self._ran = self._ran, False
        return ran

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._action()
        self._ran = True
