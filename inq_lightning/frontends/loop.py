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

from inq_lightning.core import sharding
from inq_lightning.core.options import Options
from inq_lightning.core.plan import Plan
from inq_lightning.core.quantizer import Quantizer
from inq_lightning.core.rates import Fit
from inq_lightning.core.restart import as_configured, settings
from inq_lightning.core.schedule import Length, Unit
from inq_lightning.frontends.standing import Standing

_LOG = logging.getLogger(__name__)


class INQ(Standing):
    """Turns the weights that a training loop trains into powers of two, phase by phase.

    Call :meth:`advance` at the top of every epoch and :meth:`finish` after the last one::

        inq = INQ(model, optimizer, bits=5, epochs=300, schedulers=[scheduler], steps_per_epoch=len(loader))
        for epoch in range(300):
            inq.advance(epoch)
            ...  # train as ever
        inq.finish()

    Hooks do the rest: gradients of frozen weights are zeroed as they are accumulated, so neither clipping nor momentum
    sees them, and the weights are put back bit for bit after each optimizer step.

    INQ begins where :meth:`advance` is called first, be it in the middle of a loop: the schedule counts from there. How
    far it is, :class:`~inq_lightning.frontends.standing.Standing` tells.

    Args:
        model: The module; one that DataParallel or DistributedDataParallel wraps is found within. Its weights are
            selected when INQ begins, and those that become trainable later when they do.
        optimizer: Its optimizer, or a list of several.
        schedulers: All their learning-rate schedulers: each phase has a whole schedule, see ``restart_lr``.
        epochs: How many epochs the loop has, counted as :meth:`advance` does.
        steps: How many optimizer steps it has, for a loop that counts steps.
        steps_per_epoch: How many of them an epoch has; what a schedule made for the whole loop is fitted to phases by.
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
        self._now, self._part = -1, 0  # the epoch or step, and how many optimizer steps of it are done
        self._configured_at = 0  # the epoch or step, known once INQ begins
        self._trainable: list[bool] = []
        self._found: set[str] = set()  # parameters that something else was seen to move
        self._handles: dict[str, RemovableHandle] = {}  # by the parameter whose gradient they mask
        if self.options.restart_lr:
            _check_schedulers(self._optimizers, self._schedulers)
        self._configured = settings(self._optimizers, self._schedulers, states=self.options.reset_optimizer)
        self.quantizer.prepare(self._model)
        self.quantizer.configure(self._optimizers, self._schedulers)
        self.plan()  # what cannot work is refused here, before anything is trained
        if not self.quantizer.hold():
            raise ValueError(
                f"{' or '.join(type(o).__name__ for o in self._optimizers)} takes no step hooks, so frozen weights "
                "cannot be held; give INQ the optimizer within, where it wraps one, or let its __init__ call that of "
                "torch.optim.Optimizer"
            )
        for i, one in enumerate(self._optimizers):
            self._handles[f"optimizer {i}"] = one.register_step_pre_hook(self._before_step)

    # ---- what users ask ----------------------------------------------------------------------------------------------

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
        schedule, origin, phase = self.quantizer.timetable, self.quantizer.origin, self.phase
        due = schedule.phase_at(now - origin)
        if schedule.starts and due < phase:
            raise ValueError(
                f"advance({now}): phase {phase} has begun, which it does at {schedule.unit} "
                f"{origin + schedule.starts[phase - 1]}; after resuming, count the {schedule.unit}s on from where the "
                "checkpoint was written"
            )
        if now > self._length.total(schedule.unit):
            warnings.warn(
                f"advance({now}): the loop was said to have {self._length.total(schedule.unit):g} {schedule.unit}s; "
                "for a schedule that counts in optimizer steps, say steps=... or give it unit='step'",
                stacklevel=2,
            )
        if due > phase or (schedule.unit == "epoch" and now != self._now):  # a look takes about two optimizer steps
            self._look()
        if now != self._now:
            self._now, self._part = now, 0
        self._adopt()
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
        self._began = True
        if not resumes and self._untouched():
            self._configured_at = self.quantizer.origin
        if not self.coverage.overlooked:  # otherwise the engine has said it in a warning
            _say(str(self.coverage), expected=True)
        for fit in self._fit_rates():
            _say(fit.text, fit.fits)

    def finish(self) -> None:
        """Remove all hooks, and make sure that every frozen weight is where it was frozen.

        Warns where weights are left that were never frozen.

        Raises:
            RuntimeError: Something other than the optimizers has moved frozen weights since the last epoch; the message
                names their parameters. They have been put back.
        """
        if self.quantizer.loaded:  # a completed run's checkpoint: there was nothing left to train
            self.begin(lambda unit: 0)
        self.release()
        moved = {name: count for name, count in self.quantizer.moved().items() if name not in self._found}
        self.quantizer.restore()
        if moved:
            raise RuntimeError(
                f"{self.quantizer.listing(moved)} were changed after the last optimizer step by something else; they "
                "have been put back to their values. Let that code leave out quantized parameters"
            )
        if self.quantized_fraction < 1:
            warnings.warn(
                f"training ended with {self.quantized_fraction:.1%} of the selected weights quantized; resume it from "
                "a checkpoint to finish the schedule",
                stacklevel=2,
            )

    def release(self) -> None:
        """Remove all hooks: of a loop that was given up."""
        self.quantizer.release()
        for handle in self._handles.values():
            handle.remove()
        self._handles = {}

    # ---- what a checkpoint keeps -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a resumed loop needs beside the states of model, optimizers and schedulers; plain values and masks."""
        self.quantizer.restore()  # an interruption may lie between an update and its hook
        loop = {"now": self._now, "part": self._part, "configured_at": self._configured_at}
        return {**self.quantizer.state_dict(), "loop": {**loop, "configured": copy.deepcopy(self._configured)}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a checkpoint's state, in any order with those of model, optimizers and schedulers.

        It is compared with the weights at the next :meth:`advance`.

        Raises:
            ValueError: It was written with other optimizers or schedulers.
        """
        state = dict(state_dict)
        loop = state.pop("loop", None)
        if loop is not None:
            self._configured, self._configured_at = loop["configured"], loop["configured_at"]
            self._now, self._part = loop["now"], loop["part"]
        # Phases go back to what INQ set out from, whatever has become of it since.
        with as_configured(self._optimizers, self._schedulers, self._configured):
            self.quantizer.configure(self._optimizers, self._schedulers)
        self.quantizer.load_state_dict(state)

    # ---- what happens by itself --------------------------------------------------------------------------------------

    def _adopt(self) -> None:
        """Take in what has become trainable since the last call; asked of the flags, which costs a step nothing."""
        trainable = [parameter.requires_grad for parameter in self._model.parameters()]
        if trainable == self._trainable:
            return
        self._trainable = trainable
        self.quantizer.attach(self._model)
        for name, weight in self.quantizer.weights.items():
            if name not in self._handles and weight.parameter.requires_grad:
                self._handles[name] = _when_accumulated(weight.parameter, weight.mask_gradient)

    def _look(self) -> None:
        """Put back what something other than an optimizer has moved, and say so once."""
        sharding.reshard(self._model)
        moved = self.quantizer.moved()
        new = {name: count for name, count in moved.items() if name not in self._found}
        self._found |= new.keys()
        if moved:
            self.quantizer.restore()
        if new:
            _say(
                f"{self.quantizer.listing(new)} were changed by something other than an optimizer, such as a clamp or "
                "a norm constraint. INQ puts them back after every step and at every epoch. Let that code leave out "
                "the weights of INQ.frozen_mask(name), or exclude these parameters",
                expected=False,
            )

    def _untouched(self) -> bool:
        """Whether rates and schedulers still stand as they were configured: no training has gone before."""
        now = settings(self._optimizers, self._schedulers)
        last = [[getattr(s, "last_epoch", None) for s in self._schedulers], now["groups"]]
        return last == [[s.get("last_epoch") for s in self._configured["schedulers"]], self._configured["groups"]]

    def _fit_rates(self) -> list[Fit]:
        """Let each phase have a whole schedule, of those made for what the loop has left as they were configured."""
        unit, begin = self.quantizer.timetable.unit, self._configured_at
        ends = {u: self._length.end(u) for u in get_args(Unit) if math.isfinite(self._length.end(u))}
        left = 1 - begin / ends[unit] if unit in ends else 1.0
        counts = {u: round(end * left) for u, end in ends.items()}
        known = unit == "step" or math.isfinite(self._length.steps_per_epoch)
        obstacle = None if known else "nothing says how many batches an epoch has: say INQ(steps_per_epoch=...)"
        return self.quantizer.fit_rates(self._length, {id(s): counts for s in self._schedulers}, begin, obstacle)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.quantizer.loaded:
            raise RuntimeError(
                "a checkpoint's INQ state waits for advance(); call it before the first optimizer step, and load the "
                "optimizers' states before INQ's where loading them makes a step"
            )
        self.quantizer.check_calibrated()
        if optimizer is self._optimizers[0]:
            self._follow_rates()
            self._part += 1

    def _follow_rates(self) -> None:
        """Bring learning rates to where they belong in the phase, before an optimizer step."""
        if self.quantizer.timetable.unit == "step":
            now, part, parts = self._now + self._part, 0, 1
        else:
            parts = int(self._length.steps_per_epoch) if math.isfinite(self._length.steps_per_epoch) else 1
            now, part = self._now, min(self._part, parts - 1)
        self.quantizer.follow_rates(now, part, parts, self._schedulers)


def _when_accumulated(parameter: Tensor, action: Callable[[], None]) -> RemovableHandle:
    """Call ``action`` whenever a gradient has been added to the parameter's."""
    handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(lambda _: action())  # type: ignore[no-untyped-call]
    return handle


def _say(text: str, expected: bool) -> None:
    """Log what is as it should be, and warn of what is not: in one process."""
    if not sharding.is_first_process():
        return
    if expected:
        _LOG.info(text)
    else:
        warnings.warn(text, stacklevel=4)


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
