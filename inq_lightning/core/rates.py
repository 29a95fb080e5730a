"""Learning-rate schedules and phases: a schedule made for the whole run is run whole in each phase, in less time."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from inq_lightning.core.restart import Restart

_SLACK = 1e-6  # of the highest rate: what rounding may do to a curve


class Fit(NamedTuple):
    """What becomes of a scheduler in the phases.

    Attributes:
        text: A sentence about it.
        fits: Whether every phase gets a whole schedule; False also where nobody can know.
    """

    text: str
    fits: bool = True


class LearningRates:
    """The learning rates of a run: put back at each phase, with schedules made for the whole run fitted to the phases.

    What a schedule was made for is seen from its curve: the rates that it gives over the whole run. Where it does
    within the length of a phase all that it ever does, it begins anew with each phase and is left alone otherwise.
    Where it does not, it was made for the run: then its steps are taken here, all of them in each phase, and calls of
    its ``step`` do nothing.

    Args:
        optimizers: Optimizers, freshly configured.
        schedulers: Schedulers, freshly configured.
    """

    def __init__(self, optimizers: Sequence[Optimizer], schedulers: Sequence[Any]) -> None:
        self._optimizers = list(optimizers)
        self._schedulers = list(schedulers)
        self._restart = Restart(optimizers, schedulers)
        self._drivers: dict[int, Driver] = {}  # by the index of the scheduler
        self._saved: Mapping[int, Any] = {}  # a checkpoint's positions

    def fit(
        self, steps: Mapping[int, Mapping[str, float]], lengths: Sequence[float], obstacle: str | None = None
    ) -> list[Fit]:
        """Find out what each schedule was made for, and fit it to the phases.

        Args:
            steps: By the id of a scheduler: what it counts, ``"epoch"`` or ``"step"``, and how many of them the whole
                run has; inf where unknown. Both where it is not known which of them it counts.
            lengths: How long the time before the first phase and each phase are, in any unit; inf where unknown.
            obstacle: What keeps :meth:`follow` from being called before each optimizer step, if anything.

        Returns:
            What is done, for each scheduler that moves a rate.
        """
        self.release()
        fits = []
        for index, scheduler in enumerate(self._schedulers):
            fit = self._fit(index, scheduler, steps.get(id(scheduler), {}), lengths, obstacle)
            fits += [] if fit is None else [fit]
        return fits

    def begin_phase(self) -> None:
        """Put learning rates and schedulers back to where they began."""
        self._restart()
        for driver in self._drivers.values():
            driver.position = 0

    def follow(self, phase: int, done: int, total: float, schedulers: Collection[Any]) -> None:
        """Bring the schedules that are run whole in each phase to where they belong before an optimizer step.

        Args:
            phase: The phase, 0 before the first one.
            done: How many optimizer steps of it are done.
            total: How many it has; the last one may be cut short.
            schedulers: Those in use: others may have taken the place of some that were configured.
        """
        self._restart.notice_groups()
        in_use = {id(scheduler) for scheduler in schedulers}
        drivers = [driver for driver in self._drivers.values() if id(driver.scheduler) in in_use]
        targets = [position(done, math.ceil(total), driver.spans[phase]) for driver in drivers]
        for driver, target in zip(drivers, targets, strict=True):
            if driver.position is None or driver.position > target:
                self._restart(driver.scheduler)
                driver.position = 0
        for driver, target in zip(drivers, targets, strict=True):
            driver.move(target)

    def release(self) -> None:
        """Give schedulers back to those who step them."""
        for driver in self._drivers.values():
            driver.release()
        self._drivers = {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides the states of optimizers and schedulers, as plain values."""
        positions = {
            index: {"position": driver.position, "spans": driver.spans} for index, driver in self._drivers.items()
        }
        return {"positions": positions, "groups": self._restart.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` returned, before :meth:`fit`."""
        self._saved = state["positions"]
        self._restart.load_state_dict(state["groups"])

    def _fit(
        self, index: int, scheduler: Any, steps: Mapping[str, float], lengths: Sequence[float], obstacle: str | None
    ) -> Fit | None:
        name, phases = self._name(scheduler), f"each of the {len(lengths) - 1} phases"
        if isinstance(scheduler, ReduceLROnPlateau):
            return Fit(f"{name} begins anew with {phases}, without the metrics from before it.")
        try:
            self._check(scheduler, steps, lengths)
            curve = self._curve(scheduler, int(max(steps.values())))
            if is_constant(curve):
                return None
            unit = _unit(curve, steps)
            run = int(steps[unit])
            curve = curve[: run + 1]
            own = [max(1, round(run * length / sum(lengths))) if length else 0 for length in lengths]
            spans = fitted(curve, own)
            if spans != own and obstacle:
                raise _UnfitError(f"it lasts longer than a phase, and {obstacle}")
        except _UnfitError as error:
            return Fit(
                f"{name} cannot be fitted to the phases: {error}. As far as it can be put back, it begins anew with "
                f"{phases}, at its own pace. Let it last one phase (inq_lightning.phase_length tells how long that "
                "is), or set restart_lr=False.",
                fits=False,
            )
        if spans != own:
            saved = self._saved.get(index, {})  # none from a run without INQ; of no use from one of another length
            position = saved["position"] if saved.get("spans") == spans else None
            self._drivers[index] = Driver(scheduler, spans, position)
            made = f"spans the whole run of {run}" if max(spans) == run else f"lasts {max(spans)}"
            return Fit(f"{name} {made} {unit}s: its whole curve is run in {phases}.")
        if period := pace(curve):
            each = unit if period == 1 else f"{period} {unit}s"
            return Fit(f"{name} changes the rate by the same factor each {each}: it begins anew with {phases}.")
        return Fit(f"{name} fits into a phase: it begins anew with {phases}.")

    def _name(self, scheduler: Any) -> str:
        name = type(scheduler).__name__
        if len(self._optimizers) == 1:
            return name
        numbers = [i for i, o in enumerate(self._optimizers) if o is getattr(scheduler, "optimizer", None)]
        return f"{name} of optimizer {numbers[0]}" if numbers else name

    def _check(self, scheduler: Any, steps: Mapping[str, float], lengths: Sequence[float]) -> None:
        """Make sure that a scheduler can be stepped through the whole run, and put back afterwards."""
        if not steps or not all(map(math.isfinite, [*steps.values(), *lengths])):
            raise _UnfitError("nothing says how long the run is")
        if not any(optimizer is getattr(scheduler, "optimizer", None) for optimizer in self._optimizers):
            raise _UnfitError("it has no optimizer that belongs to the run")
        if "step" in vars(scheduler):
            raise _UnfitError("its step has been replaced")
        if foreign := self._restart.foreign(scheduler):
            raise _UnfitError(f"it keeps {', '.join(foreign)}, which cannot be put back")

    def _curve(self, scheduler: Any, steps: int) -> list[float]:
        """The rates of a scheduler, all groups together: at first and after each of its steps, until it ends."""
        now = Restart(self._optimizers, self._schedulers)
        self._restart()
        start = Restart(self._optimizers, [])
        curve = [_rate(scheduler)]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # no optimizer has made a step yet
                while len(curve) <= steps:
                    scheduler.step()
                    curve.append(max(_rate(scheduler), 0.0))
                    if _rate(scheduler) < 0:  # a straight line that has passed its end
                        break
        except Exception as error:  # its last step has been taken, unless it is the first
            if len(curve) == 1:
                raise _UnfitError(f"its step fails ({type(error).__name__}: {error})") from error
        finally:
            self._restart.moved |= start.changes()
            now.moved |= now.changes()
            now()
        return curve


class _UnfitError(Exception):
    """Why a scheduler cannot be fitted to the phases."""


class Driver:
    """Takes the steps of a scheduler; those that others want to take do nothing.

    Args:
        scheduler: The scheduler.
        spans: How many of its steps the time before the first phase and each phase have.
        position: How many of them it has taken in this phase; None where unknown.
    """

    def __init__(self, scheduler: Any, spans: Sequence[int], position: int | None) -> None:
        self.scheduler = scheduler
        self.spans = spans
        self.position = position
        self._class = type(scheduler)
        # An attribute of the object would go into checkpoints.
        scheduler.__class__ = type(self._class.__name__, (self._class,), {"step": _do_nothing})

    def move(self, position: int) -> None:
        """Take the steps that are missing to this position."""
        for _ in range(self.position or 0, position):
            self._class.step(self.scheduler)
        self.position = position

    def release(self) -> None:
        """Let others step the scheduler again."""
        self.scheduler.__class__ = self._class


def fitted(curve: Sequence[float], phases: Sequence[int]) -> list[int]:
    """How many steps of a schedule each phase has to have, so that it has the whole schedule.

    Args:
        curve: The rates over the whole run: at first and after each step.
        phases: How many steps each phase has by itself; 0 where there is no such phase.

    Returns:
        Steps for each phase: as many as by itself where that is enough.
    """
    end = len(curve) - 1
    period = pace(curve) or end
    enough = {steps for steps in set(phases) if steps and (period < steps or is_whole(curve, steps))}
    whole = min(enough, default=end)
    return [min(steps, end) if steps in enough or not steps else whole for steps in phases]


def is_constant(curve: Sequence[float]) -> bool:
    """Whether the rate stays what it is."""
    return min(curve) == max(curve)


def is_whole(curve: Sequence[float], steps: int) -> bool:
    """Whether a schedule does within its first steps all that it does.

    It has been as high then as it will ever be, has since fallen as low as it will ever be, and the rate has changed
    before the last step.
    """
    if steps >= len(curve):
        return True
    head, rest = curve[: steps + 1], curve[steps:]
    peak = max(head)
    return (
        not is_constant(curve[: max(steps, 1)])
        and max(rest) <= peak * (1 + _SLACK)
        and min(rest) >= min(_fall(head)) - peak * _SLACK
    )


def pace(curve: Sequence[float]) -> int | None:
    """After how many steps a rate is multiplied by the same factor, again and again; None where it is not.

    Such a schedule, ExponentialLR or StepLR, has no length.
    """
    visible = [rate for rate in curve if rate > max(curve) * 1e-12]  # below, rounding changes the factor
    changes = [i for i in range(1, len(visible)) if visible[i] != visible[i - 1]]
    factors = [visible[i] / visible[i - 1] for i in changes]
    intervals = {b - a for a, b in pairwise([0, *changes])}
    if len(changes) < 2 or len(intervals) > 1 or max(factors) - min(factors) > _SLACK * max(factors):
        return None
    return intervals.pop()


def position(done: int, total: int, steps: int) -> int:
    """Which of a schedule's steps belongs to an optimizer step, so that a phase has its first and its last.

    Args:
        done: Optimizer steps of the phase that are done, below ``total``.
        total: How many it has.
        steps: How many steps of the schedule it has.
    """
    return min(max(done * steps // total, done * (steps - 1) // max(total - 1, 1)), steps - 1)


def _unit(curve: Sequence[float], steps: Mapping[str, float]) -> str:
    """What a scheduler counts: the fewer where its rate is by then, or a little later, as low as it ever gets."""
    fewer = min(steps, key=lambda unit: steps[unit])
    fall = _fall(curve[: 2 * int(steps[fewer]) + 1])
    over = not is_constant(fall) and min(fall) <= min(curve) + fall[0] * _SLACK
    if over or (pace(curve) or math.inf) < steps[fewer]:
        return fewer
    return max(steps, key=lambda unit: steps[unit])


def _fall(curve: Sequence[float]) -> Sequence[float]:
    """The part of a curve from its peak on."""
    peak = max(curve) * (1 - _SLACK)
    return curve[next(i for i, rate in enumerate(curve) if rate >= peak) :]


def _rate(scheduler: Any) -> float:
    return float(sum(group["lr"] for group in scheduler.optimizer.param_groups))


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    """Takes the place of a scheduler's ``step``."""
