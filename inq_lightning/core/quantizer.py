"""The engine: incremental network quantization of one module, in whatever loop trains it."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from inq_lightning.core import sharding, state
from inq_lightning.core.activation import PowerOfTwoActivation
from inq_lightning.core.activations import activations_of, quantize_activations
from inq_lightning.core.coverage import Coverage, LeftOut
from inq_lightning.core.frozen import MANY_ZEROS, FrozenWeight, Rounding
from inq_lightning.core.layer import Layer, named_weights, plain_name
from inq_lightning.core.optimizers import StepHooks, check_optimizers
from inq_lightning.core.options import Options
from inq_lightning.core.plan import Plan
from inq_lightning.core.rates import Fit, LearningRates
from inq_lightning.core.restart import OptimizerState
from inq_lightning.core.schedule import Length, Schedule, Unit
from inq_lightning.core.selection import Selected, Selection, select_parameters
from inq_lightning.core.size import snr_db
from inq_lightning.core.together import Together
from inq_lightning.grid import Grid
from inq_lightning.grid.power_of_two import fit_rule

# Share of a layer's weights that its grid may round to zero without a word; by least error it is about half at 2 bits.
_NEARLY_ALL = 0.9
_NAMED = 8  # parameters that a message names at most


class Quantizer:
    """Rounds and freezes the weights of one module, phase by phase (Zhou et al., ICLR 2017, algorithm 1).

    A front end calls, in this order: :meth:`configure` with fresh optimizers, :meth:`load_state_dict` where a run
    resumes, :meth:`attach` once the weights are in place, :meth:`begin`, :meth:`fit_rates`; then :meth:`advance`
    wherever a phase may begin, :meth:`follow_rates` before each optimizer step, :meth:`mask_gradients` after each
    backward pass and :meth:`restore` after each optimizer step, which :meth:`hold` sees to; at the end :meth:`release`
    and :meth:`verify`.

    With sharded parameters, attach, begin, advance, moved, frozen_mask and state_dict are collective calls.

    Attributes:
        options: What the user asked for.
        timetable: The schedule; with starts once :meth:`begin` has fitted it to the run.
        origin: Epoch or step at which INQ began, from which the timetable counts.
        phase: How many portions have begun: 0 before the first one.
        rounding: Power of all weights frozen so far, before they were rounded, and of what that changed.
        weights: The selected parameters by name, in the module's order.
        activations: What rounds the activations, by its name as a module; nothing where they stay as they are.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.timetable: Schedule = options.phases
        self.origin = 0
        self.phase = 0
        self.rounding = (0.0, 0.0)
        self.weights: dict[str, FrozenWeight] = {}
        self._together = Together(self.weights)
        self._left_out: list[LeftOut] = []
        self._loaded: dict[str, Any] | None = None  # a checkpoint's state, until begin
        self._optimizers: Sequence[Optimizer] = ()
        self._rates: LearningRates | None = None
        self._rates_state: dict[str, Any] | None = None  # a checkpoint's, and what is left of them after release
        self._lengths: list[float] = []  # of the time before the first phase and of each phase
        self._rates_begin = 0  # where the first of them begins
        self._optimizer_state: OptimizerState | None = None
        self._hooks: StepHooks | None = None
        self.activations: dict[str, PowerOfTwoActivation] = {}

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
    def coverage(self) -> Coverage:
        """How much of the module is being quantized, and what is left out and why; nothing before :meth:`attach`."""
        left_out = (one for one in self._left_out if one.name not in self.weights)
        return Coverage.of(sum(weight.numel for weight in self.weights.values()), left_out)

    @property
    def complete(self) -> bool:
        """Whether the last phase has begun."""
        return self.phase == len(self.timetable.portions)

    @property
    def loaded(self) -> bool:
        """Whether a checkpoint's state waits for :meth:`begin`."""
        return self._loaded is not None

    def metrics(self) -> dict[str, float]:
        """What loggers show, by name: the fraction, the phase, what rounding did to all that is frozen."""
        values = {"inq/quantized_fraction": self.quantized_fraction, "inq/phase": float(self.phase)}
        if all(self.rounding):  # otherwise it has changed nothing, which no logger can draw
            values["inq/sqnr_db"] = float(snr_db(*self.rounding))
        if self.options.log_per_layer:
            # Not below inq/quantized_fraction: names are paths to MLflow, and no file can be a folder too.
            shares = {layer.name: layer.frozen / layer.numel if layer.numel else 1.0 for layer in self.layers}
            values |= {f"inq/quantized_fraction_per_layer/{name}": share for name, share in shares.items()}
        return values

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
        """Which weights of a parameter are frozen: bool in its shape, collective for a sharded one."""
        if name not in self.weights:
            near = difflib.get_close_matches(name, self.weights, n=3, cutoff=0.3)
            raise KeyError(
                f"{name!r} is not a quantized parameter" + (f"; near names: {', '.join(near)}" if near else "")
            )
        weight = self.weights[name]
        return sharding.full(weight.mask, weight.parameter)

    def select(self, module: nn.Module, untrained: bool = False) -> Selection:
        """The parameters of ``module`` that would be quantized, and at how many bits; and what would not, and why.

        Args:
            module: The module.
            untrained: Whether to take those too that are not trained, or that no optimizer holds.
        """
        options = self.options
        return select_parameters(
            module,
            options.bits,
            include=options.include,
            exclude=options.exclude,
            layer_bits=options.layer_bits,
            levels=options.levels,
            layer_levels=options.layer_levels,
            embeddings=options.embeddings,
            pruned=options.keep_zeros,
            trainable_only=not untrained,
            optimizers=() if untrained else self._optimizers,
        )

    def plan(self, module: nn.Module, length: Length | None = None) -> Plan:
        """What would happen to ``module`` in a run of this length; nothing changes.

        Raises:
            ValueError: The run is too short, or nothing can be selected.
        """
        schedule = self.options.phases if length is None else self.options.phases.fit(length)
        return Plan.of(module, self.select(module), schedule, self.options.keep_zeros, self.options.underflow)

    # ---- a run -------------------------------------------------------------------------------------------------------

    def prepare(self, module: nn.Module) -> None:
        """Put activations in place, if they are to be rounded: before a checkpoint is loaded into the module.

        Raises:
            ValueError: They cannot be rounded everywhere, see :func:`~inq_lightning.quantize_activations`.
        """
        if self.options.activation_bits is not None:
            bits, layer_bits = self.options.activation_bits, self.options.layer_activation_bits
            quantize_activations(module, bits, input_bits=self.options.input_bits, layer_bits=layer_bits)

    def configure(self, optimizers: Sequence[Optimizer], schedulers: Sequence[Any] = ()) -> None:
        """Remember optimizers and schedulers as they were configured, before a checkpoint changes them.

        Raises:
            ValueError: An optimizer moves weights where frozen ones cannot be held.
        """
        check_optimizers(optimizers)
        if self._rates is not None:
            self._rates.release()
        self._optimizers = optimizers
        self._rates = LearningRates(optimizers, schedulers) if self.options.restart_lr else None
        self._optimizer_state = OptimizerState(optimizers) if self.options.reset_optimizer else None

    def attach(self, module: nn.Module) -> None:
        """Take in all selected weights, those included that are trained only since the last call.

        Parameters that none of the optimizers holds are left alone, unless these hold nothing of the module.
        """
        sharding.reshard(module)
        selection = self.select(module)
        self._left_out = selection.left_out
        new = []
        for selected in selection:
            if selected.name in self.weights:
                continue
            weight = self.weights[selected.name] = self._frozen_weight(selected)
            new.append(weight)
            if self._loaded is None and self.options.keep_zeros:
                weight.keep_zeros(selected.pruning_mask)
        if self._loaded is None and self.phase:
            self._freeze(new)

    def begin(self, module: nn.Module, length: Length, position: Callable[[Unit], int]) -> None:
        """Fit the schedule to the run, then go on from a loaded state or begin where the run stands.

        Warns of what stays in floating point though nobody asked for it.

        Args:
            module: The module, after :meth:`attach`.
            length: How long the run is, from its very start.
            position: The epoch or step at which it stands.

        Raises:
            ValueError: The run is too short, or the state does not fit it; the message says what differs.
        """
        schedule = self.options.phases.counted_for(length)
        self.activations = activations_of(module)
        if self._loaded is None:
            self._calibrate()
            self.origin = position(schedule.unit)
            self.timetable = schedule.fit(length, self.origin)
            self.timetable.check_certain(length, self.origin)
        else:
            self._resume(module, schedule, length, state.check(self._loaded))
        if self.coverage.overlooked and sharding.is_first_process():
            warnings.warn(str(self.coverage), stacklevel=2)

    def _resume(self, module: nn.Module, schedule: Schedule, length: Length, loaded: dict[str, Any]) -> None:
        saved = Schedule(**loaded["schedule"])
        # An open schedule was spread over the run that began.
        self.timetable = saved if schedule.starts is None and schedule.portions == saved.portions else schedule
        later = {one.name for one in self._left_out if one.reason in ("frozen", "not optimized")}
        if later := later & loaded["layers"].keys():  # a finetuning callback has not made them trainable again yet
            selection = self.select(module, untrained=True)
            self.weights.update((one.name, self._frozen_weight(one)) for one in selection if one.name in later)
        state.check_fits(loaded, self.options, self.timetable, self.weights)
        self.timetable.fit(length, loaded["origin"])
        self.timetable.check_certain(length, loaded["origin"])
        state.load(loaded, self.weights)
        self.phase, self.origin, self._loaded = loaded["phase"], loaded["origin"], None
        self.rounding = tuple(loaded.get("rounding", self.rounding))  # what is older says nothing of it
        self._rates_state = loaded["rates"]
        if loaded.get("calibrating"):
            self._calibrate()

    def fit_rates(
        self,
        length: Length,
        steps: Mapping[int, Mapping[str, float]],
        begin: int = 0,
        obstacle: str | None = None,
    ) -> list[Fit]:
        """Let each phase have a whole learning-rate schedule, see :class:`~inq_lightning.core.rates.LearningRates`.

        Args:
            length: How long the run is, from its very start.
            steps: By the id of a scheduler, how many epochs or steps of the run it counts.
            begin: The epoch or step at which the schedulers stand as they were configured.
            obstacle: What keeps :meth:`follow_rates` from being called before each optimizer step, if anything.

        Returns:
            What is done about each scheduler.
        """
        before, *phases = self.timetable.phase_lengths(length, self.origin)
        self._lengths, self._rates_begin = [max(before - begin, 0), *phases], begin
        if self._rates is None or length.trial or len([phase for phase in self._lengths if phase]) == 1:
            return []
        if self._rates_state is not None:
            self._rates.load_state_dict(self._rates_state)
        return self._rates.fit(steps, self._lengths, obstacle)

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
        roundings = self._freeze(self.weights.values(), phase)
        self.phase = phase
        self._calibrate()
        if self._rates is not None:
            self._rates.begin_phase()
        if self._optimizer_state is not None:
            self._optimizer_state()
        signal, noise = (float(sum(sums)) for sums in zip(self.rounding, *roundings, strict=True))
        self.rounding = (signal, noise)
        return True

    def _calibrate(self) -> None:
        """Let the next training batch calibrate the activations."""
        for activation in self.activations.values():
            activation.pending = True

    def check_calibrated(self) -> None:
        """Refuse a network of which a training batch has reached only a part.

        Raises:
            RuntimeError: Activations have not been calibrated by it; the message names them.
        """
        if missed := [name for name, activation in self.activations.items() if activation.pending]:
            raise RuntimeError(
                f"the training batch has not reached {', '.join(missed[:_NAMED])}, so their scale is unknown: let the "
                "training step call the network's forward, in training mode, or take rounded activations out of parts "
                "that are not trained"
            )

    def follow_rates(self, now: int, part: int, parts: int, schedulers: Collection[Any]) -> None:
        """Bring learning rates to where they belong, as far as they are fitted to the phases.

        Args:
            now: The epoch or step.
            part: How many optimizer steps of it are done.
            parts: How many it has.
            schedulers: The schedulers in use.
        """
        if self._rates is not None and self._lengths:
            done = now - self._rates_begin - int(sum(self._lengths[: self.phase]))
            total = self._lengths[self.phase] * parts
            self._rates.follow(self.phase, done * parts + min(part, parts), total, schedulers)

    def mask_gradients(self) -> None:
        """Zero the gradients of frozen weights."""
        self._together.mask_gradients()

    def restore(self) -> None:
        """Put frozen weights back to their values, bit for bit."""
        self._together.restore()

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
        if self._rates is not None:
            self._rates_state = self._rates.state_dict()
            self._rates.release()
        self._hooks = self._rates = self._optimizer_state = None
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
            "rounding": list(self.rounding),
            "calibrating": any(activation.pending for activation in self.activations.values()),
            "rates": self._rates.state_dict() if self._rates is not None else self._rates_state,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until :meth:`begin`; only then are the weights known to be in place."""
        self._loaded = state_dict or None

    def _frozen_weight(self, one: Selected) -> FrozenWeight:
        options = self.options
        return FrozenWeight(one.name, one.parameter, one.bits, options.underflow, options.exponent, one.levels)

    def _check(self, weights: Iterable[FrozenWeight]) -> list[Grid]:
        """Refuse weights that cannot be rounded, and warn of those that rounding would wipe out; the others' grids."""
        lost, filled, grids = {}, {}, []
        for weight in weights:
            grids.append(grid := weight.check())
            if grid is weight.grid:
                continue
            if 0 in grid.codes:
                if (share := weight.lost(grid)) > _NEARLY_ALL:
                    lost[weight.name] = f"{share:.1%} ({weight.bits} bits)"
            elif (share := weight.zeros()) > MANY_ZEROS:
                filled[weight.name] = f"{share:.1%}"
        if lost:
            what = "INQ rounds nearly all weights of these layers to zero, as their grids lie too high for them"
            _warn(what, lost, self._remedies(lost))
        if filled:
            what = "INQ moves the weights of these layers that are exactly zero, as their levels have no zero"
            _warn(what, filled, 'levels="auto", or "full" for them, by layer_levels')
        return grids

    def _remedies(self, names: Iterable[str]) -> str:
        """What keeps these layers from becoming zero."""
        remedies = ["more bits for them, by layer_bits", "or leave them out, by exclude"]
        if self.options.underflow == "truncate":
            remedies.insert(0, 'underflow="nearest", which rounds at half of the smallest level')
        if any(fit_rule(self.options.exponent, self.weights[name].bits) == "max" for name in names):
            remedies.insert(0, 'exponent="mse", which fits a grid to all weights, not to the largest one')
        return "; ".join(remedies)

    def _freeze(self, weights: Collection[FrozenWeight], phase: int | None = None) -> list[Rounding]:
        """Freeze what a phase asks for, the present one unless another is given; in all of them or, by error, none."""
        portion = self.timetable.portions[(phase or self.phase) - 1]
        grids = self._check(weights)
        options = self.options
        return [
            weight.freeze(portion, options.partition, options.seed, grid)
            for weight, grid in zip(weights, grids, strict=True)
        ]


def _warn(what: str, shares: Mapping[str, str], remedy: str) -> None:
    """Warn once of layers whose grids do not suit them, by name."""
    if sharding.is_first_process():
        lines = "".join(f"\n  {name}: {share}" for name, share in shares.items())
        warnings.warn(f"{what}:{lines}\nBetter: {remedy}", stacklevel=3)
