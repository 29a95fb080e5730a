"""INQ in a training loop of your own: one call an epoch, the rest is done by hooks."""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, get_args

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from inq_lightning.core.coverage import Coverage
from inq_lightning.core.layer import Layer
from inq_lightning.core.options import Options
from inq_lightning.core.plan import Plan
from inq_lightning.core.quantizer import Quantizer, StepHooks
from inq_lightning.core.schedule import Length, Unit

_log = logging.getLogger(__name__)


class INQ:
    """Turns the weights that a training loop trains into powers of two, phase by phase.

    Call :meth:`advance` at the top of every epoch and :meth:`finish` after the last one::

        inq = INQ(model, optimizer, bits=5, epochs=300, schedulers=[scheduler])
        for epoch in range(300):
            inq.advance(epoch)
            ...  # train as ever
        inq.finish()

    Hooks do the rest: gradients of frozen weights are zeroed as they are accumulated, so clipping and momentum do not
    see them, and the weights are put back bit for bit after each optimizer step.

    INQ begins where :meth:`advance` is called first, be it in the middle of a loop: the schedule counts from there.

    Args:
        model: The module; what DataParallel and DistributedDataParallel have wrapped is found within. Its weights are
            selected when INQ begins, and those that become trainable later when they do.
        optimizer: Its optimizer, or a list of several.
        schedulers: Their learning-rate schedulers, a list of all: they begin anew at each phase, see ``restart_lr``.
            Where ``steps_per_epoch`` is given, or the schedule counts in steps, one that was made for the whole loop is
            run whole in each phase; calls of its ``step`` do nothing then.
        epochs: How many epochs the loop has, counted as :meth:`advance` does.
        steps: How many optimizer steps it has, for one that counts in steps.
        steps_per_epoch: How many of them an epoch has.
        options: Arguments of :class:`~inq_lightning.Options` by name, such as ``bits=4``.

    Attributes:
        options: These options.
        quantizer: The engine that does the work.

    Raises:
        ValueError: An option is none of the allowed values, nothing can be selected, the loop is too short for the
            schedule, or an optimizer moves weights where frozen ones cannot be held.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        schedulers: Sequence[Any] = (),
        epochs: float = math.inf,
        steps: float = math.inf,
        steps_per_epoch: float = math.inf,
        **options: Any,
    ) -> None:
        self.options = Options(**options)
        self.quantizer = Quantizer(self.options)
        self._model = model.module if isinstance(model, (DataParallel, DistributedDataParallel)) else model
        self._optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        self._schedulers = list(schedulers)
        self._length = Length(epochs, steps, steps_per_epoch)
        self._began = False
        self._trainable: list[bool] = []
        self._masks: dict[str, RemovableHandle] = {}
        self.plan()  # what cannot work is refused here, before anything is trained
        if self.options.restart_lr:
            _check_schedulers(self._optimizers, self._schedulers)
        self._configured = self._settings()
        self._configured_at = 0  # the epoch or step, known once INQ begins
        self._now = 0  # where advance() was called last
        self._stepped = 0  # steps of all optimizers since then
        self.quantizer.configure(self._optimizers, self._schedulers)
        self._steps = StepHooks(self._optimizers, self._after_step)
        if not self._steps.complete:
            raise ValueError(
                f"{' or '.join(type(o).__name__ for o in self._optimizers)} takes no step hooks, so frozen weights "
                "cannot be held; give INQ the optimizer within, where it wraps one, or let its __init__ call that of "
                "torch.optim.Optimizer"
            )

    # ---- what users ask ----------------------------------------------------------------------------------------------

    @property
    def quantized_fraction(self) -> float:
        """Share of the selected weights that are frozen, all layers together: 0 to 1."""
        return self.quantizer.quantized_fraction

    @property
    def phase(self) -> int:
        """How many portions have begun: 0 before the first one."""
        return self.quantizer.phase

    @property
    def layers(self) -> list[Layer]:
        """One record for each selected parameter, in the module's order; empty before INQ has begun."""
        return self.quantizer.layers

    @property
    def coverage(self) -> Coverage:
        """How much of the model is quantized, and what is left out and why; nothing before INQ has begun."""
        return self.quantizer.coverage

    def frozen_mask(self, name: str) -> Tensor:
        """Which weights of a parameter are frozen: bool in its shape, see :meth:`INQCallback.frozen_mask`."""
        return self.quantizer.frozen_mask(name)

    def plan(self) -> Plan:
        """What a loop that begins with INQ will do: layers, phases, weights and bytes; nothing changes.

        Raises:
            ValueError: The loop is too short, or nothing can be selected.
        """
        return self.quantizer.plan(self._model, self._length)

    # ---- what the loop calls -----------------------------------------------------------------------------------------

    def advance(self, now: int) -> bool:
        """Begin the phase that the schedule asks for, unless it has begun; in all layers or in none.

        Args:
            now: The epoch that is about to begin, or the optimizer step where the schedule counts in steps. The first
                call says where INQ begins; after resuming, count on from where the checkpoint was written.

        Returns:
            Whether a phase has begun.

        Raises:
            ValueError: Weights cannot be rounded, the loop is too short, a checkpoint does not fit it, or ``now`` lies
                before the phase that has begun.
        """
        if not self._began or self.quantizer.loaded:
            self.begin(lambda unit: now)
        self._adopt()
        schedule, origin, phase = self.quantizer.timetable, self.quantizer.origin, self.phase
        if schedule.starts and schedule.phase_at(now - origin) < phase:
            raise ValueError(
                f"advance({now}): phase {phase} has begun, which it does at {schedule.unit} "
                f"{origin + schedule.starts[phase - 1]}; after resuming, count the {schedule.unit}s on from where the "
                "checkpoint was written"
            )
        total = self._length.total(schedule.unit)
        if now > total:
            warnings.warn(
                f"advance({now}): the loop was said to have {total:g} {schedule.unit}s; for a schedule that counts in "
                "optimizer steps, say steps=... or give it unit='step'",
                stacklevel=2,
            )
        if now != self._now:
            self._now, self._stepped = now, 0
        began = self.quantizer.advance(self._model, now)
        self._follow_rates()
        return began

    def begin(self, position: Callable[[Unit], int]) -> None:
        """Begin, or go on from a loaded state, now rather than at the first :meth:`advance`.

        Args:
            position: The epoch or the optimizer step at which the loop stands.

        Raises:
            ValueError: The loop is too short, or a checkpoint does not fit it; the message says what differs.
        """
        resumes = self.quantizer.loaded
        self.quantizer.attach(self._model)
        self.quantizer.begin(self._model, self._length, position)
        if not resumes and self._settings() == self._configured:
            self._configured_at = self.quantizer.origin
        self._fit_rates()
        self._began = True

    def finish(self) -> None:
        """Remove all hooks, and make sure that every frozen weight is where it was frozen.

        Warns where weights are left that were never frozen.

        Raises:
            RuntimeError: Something has moved frozen weights behind INQ's back; the message names their layer.
        """
        if self.quantizer.loaded:  # a completed run's checkpoint: there was nothing left to train
            self.begin(lambda unit: 0)
        self.release()
        self.quantizer.verify()
        if self.quantized_fraction < 1:
            warnings.warn(
                f"training ended with {self.quantized_fraction:.1%} of the selected weights quantized; resume it from "
                "a checkpoint to finish the schedule",
                stacklevel=2,
            )

    def release(self) -> None:
        """Remove all hooks: of a loop that was given up."""
        self.quantizer.release()
        self._steps.remove()
        for mask in self._masks.values():
            mask.remove()
        self._masks = {}

    # ---- what a checkpoint keeps -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a resumed loop needs beside the states of model, optimizers and schedulers; plain values and masks."""
        self.quantizer.restore()  # an interruption may lie between an update and its hook
        progress = {"configured_at": self._configured_at, "now": self._now, "stepped": self._stepped}
        return {**self.quantizer.state_dict(), "configured": copy.deepcopy(self._configured), "progress": progress}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a checkpoint's state, in any order with those of model, optimizers and schedulers.

        It is checked against the weights at the next :meth:`advance`.

        Raises:
            ValueError: It was written with other optimizers or schedulers.
        """
        state = dict(state_dict)
        configured = state.pop("configured", None)
        if configured is not None:
            # Phases restart the rates from which INQ set out, whatever has become of them since.
            now, self._configured = self._settings(), configured
            self._set(configured)
            self.quantizer.configure(self._optimizers, self._schedulers)
            self._set(now)
        for name, value in state.pop("progress", {}).items():
            setattr(self, f"_{name}", value)
        self.quantizer.load_state_dict(state)

    # ---- the steps of a run ------------------------------------------------------------------------------------------

    def _adopt(self) -> None:
        """Take in what has become trainable since the last call; asked of the flags, which costs a step nothing."""
        trainable = [parameter.requires_grad for parameter in self._model.parameters()]
        if trainable == self._trainable:
            return
        self._trainable = trainable
        self.quantizer.attach(self._model)
        for name, weight in self.quantizer.weights.items():
            if name not in self._masks and weight.parameter.requires_grad:
                self._masks[name] = _when_accumulated(weight.parameter, weight.mask_gradient)

    def _after_step(self) -> None:
        if self.quantizer.loaded:
            raise RuntimeError(
                "a checkpoint's INQ state waits for advance(); call it before the first optimizer step, and load the "
                "optimizers' states before INQ's where loading them makes a step"
            )
        self.quantizer.restore()
        if self._began:
            self._stepped += 1
            self._follow_rates()

    def _fit_rates(self) -> None:
        unit = self.quantizer.timetable.unit
        total = self._length.total(unit)
        left = (total - self._configured_at) / total if math.isfinite(total) else 1.0
        steps = {u: round(self._length.total(u) * left) for u in get_args(Unit) if math.isfinite(self._length.total(u))}
        known = unit == "step" or math.isfinite(self._length.steps_per_epoch)
        fits = self.quantizer.fit_rates(
            self._length,
            {id(scheduler): steps for scheduler in self._schedulers},
            self._configured_at,
            None if known else "nothing says how many optimizer steps an epoch has: say steps_per_epoch=...",
        )
        for fit in fits:
            if fit.fits:
                _log.info("Learning rate: %s", fit.text)
            else:
                warnings.warn(f"Learning rate: {fit.text}", stacklevel=4)

    def _follow_rates(self) -> None:
        done = self._stepped // len(self._optimizers)
        if self.quantizer.timetable.unit == "step":
            self.quantizer.follow_rates(self._now + done, 0, 1, self._schedulers)
        elif math.isfinite(self._length.steps_per_epoch):
            self.quantizer.follow_rates(self._now, done, int(self._length.steps_per_epoch), self._schedulers)

    def _settings(self) -> dict[str, Any]:
        """Where learning rates and schedulers stand, as plain values."""
        groups = [[{k: v for k, v in g.items() if k != "params"} for g in o.param_groups] for o in self._optimizers]
        return copy.deepcopy({"optimizers": groups, "schedulers": [s.state_dict() for s in self._schedulers]})

    def _set(self, settings: dict[str, Any]) -> None:
        for kind, here in (("optimizers", self._optimizers), ("schedulers", self._schedulers)):
            if len(settings[kind]) != len(here):
                raise ValueError(f"the checkpoint's INQ had {len(settings[kind])} {kind}, this one has {len(here)}")
        for optimizer, groups in zip(self._optimizers, settings["optimizers"], strict=True):
            for group, options in zip(optimizer.param_groups, groups, strict=False):
                group.update(copy.deepcopy(options))
        for scheduler, state in zip(self._schedulers, settings["schedulers"], strict=True):
            scheduler.load_state_dict(copy.deepcopy(state))


def _when_accumulated(parameter: Tensor, action: Callable[[], None]) -> RemovableHandle:
    """Call ``action`` whenever a gradient has been added to the parameter's."""
    handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(lambda _: action())  # type: ignore[no-untyped-call]
    return handle


def _check_schedulers(optimizers: Sequence[Optimizer], schedulers: Sequence[Any]) -> None:
    """Refuse schedulers that INQ is not told of: rates put back behind their backs would follow no schedule."""
    groups = [g for s in schedulers for g in getattr(getattr(s, "optimizer", None), "param_groups", [])]
    for optimizer in optimizers:
        group = optimizer.param_groups[0]
        if "initial_lr" in group and not any(group is known for known in groups):
            raise ValueError(
                f"{type(optimizer).__name__} has a learning-rate scheduler that INQ does not know; give it, as "
                "schedulers=[scheduler], or leave the rates alone with restart_lr=False"
            )
