"""When the quantized portion rises, and to what."""

from __future__ import annotations

import difflib
import itertools
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from inq_lightning._common import one_of

Unit = Literal["epoch", "step"]

#: Accumulated portions of Zhou et al., ICLR 2017: by network at 5 bits (section 3.1), by bit width on ResNet-18
#: (section 3.3).
PRESETS: dict[str, tuple[float, ...]] = {
    "alexnet": (0.3, 0.6, 0.8, 1.0),
    "vgg16": (0.5, 0.75, 0.875, 1.0),
    "googlenet": (0.2, 0.4, 0.6, 0.8, 1.0),
    "resnet18": (0.5, 0.75, 0.875, 1.0),
    "resnet50": (0.5, 0.75, 0.875, 1.0),
    "4bit": (0.3, 0.5, 0.8, 0.9, 0.95, 1.0),
    "3bit": (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0),
    "2bit": (0.2, 0.4, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.975, 1.0),
}


def default_preset(bits: int) -> str:
    """The preset that the paper uses at this bit width: its ResNet-18 rows."""
    return f"{bits}bit" if bits < 5 else "resnet18"


@dataclass(frozen=True)
class Length:
    """How long a run is; inf where nothing says so.

    Attributes:
        epochs: Epochs at most.
        steps: Optimizer steps at most.
        steps_per_epoch: Optimizer steps of an epoch; inf where unknown: data without a length, or code that steps its
            optimizers when it likes.
        trial: Whether it is a trial run, which may end before the schedule does.
        manual: Whether code steps its optimizers when it likes, as often as it has to: it has the benefit of the doubt.
    """

    epochs: float = math.inf
    steps: float = math.inf
    steps_per_epoch: float = math.inf
    trial: bool = False
    manual: bool = False

    def total(self, unit: Unit) -> float:
        """Epochs or optimizer steps of the run; inf where nothing says so."""
        end = self.end(unit)
        return math.ceil(end) if math.isfinite(end) else end

    def end(self, unit: Unit) -> float:
        """As :meth:`total`, but what is run of the last epoch counts as part of one."""
        if unit == "step":
            return min(self.steps, self.epochs * self.steps_per_epoch)
        if math.isfinite(self.steps_per_epoch * self.steps):
            return min(self.epochs, self.steps / self.steps_per_epoch)
        return self.epochs

    def at_least(self, unit: Unit) -> float:
        """Epochs or optimizer steps that the run has for certain, with one step an epoch where nothing is known."""
        if math.isfinite(self.steps_per_epoch):
            return self.total(unit)
        if unit == "step":
            return min(self.steps, math.inf if self.manual else self.epochs)
        return min(self.epochs, 1) if math.isfinite(self.steps) else self.epochs


@dataclass(frozen=True)
class Schedule:
    """The accumulated portions, and when each begins.

    Attributes:
        portions: Accumulated portions, strictly increasing, in (0, 1], the last one 1.
        starts: When each portion begins, counted in ``unit`` from 0, strictly increasing; None: spread evenly over the
            Trainer's run.
        unit: ``"epoch"``, or ``"step"`` for optimizer steps (the Trainer's ``global_step``).

    Raises:
        ValueError: Portions or starts break these rules; the message says which and how.
    """

    portions: Sequence[float]
    starts: Sequence[int] | None = None
    unit: Unit = "epoch"

    def __post_init__(self) -> None:
        portions = tuple(_number(p, float, "portion") for p in self.portions)
        object.__setattr__(self, "portions", portions)
        if not portions:
            raise ValueError("a schedule needs at least one portion, such as [0.5, 0.75, 0.875, 1.0]")
        for p in portions:
            if not 0 < p <= 1:
                raise ValueError(f"portions must lie in (0, 1], got {p} in {list(portions)}")
        if any(a >= b for a, b in itertools.pairwise(portions)):
            raise ValueError(f"portions accumulate, so each must be larger than the one before, got {list(portions)}")
        if portions[-1] != 1:
            raise ValueError(
                f"the last portion must be 1.0, or some weights would never be quantized, got {list(portions)}"
            )
        one_of("unit", self.unit, Unit)
        if self.starts is None:
            return
        starts = tuple(_number(s, int, "start") for s in self.starts)
        object.__setattr__(self, "starts", starts)
        if len(starts) != len(portions):
            raise ValueError(f"{len(portions)} portions need as many starts, got {len(starts)}: {list(starts)}")
        if starts[0] < 0 or any(a >= b for a, b in itertools.pairwise(starts)):
            raise ValueError(f"starts must be increasing and not negative, got {list(starts)}")

    @classmethod
    def from_mapping(cls, portions: Mapping[int, float], unit: Unit = "epoch") -> Schedule:
        """Build from start → portion, such as ``{0: 0.5, 4: 0.75, 8: 0.875, 12: 1.0}``, in any order of the keys."""
        for start in portions:
            _number(start, int, "start")
        starts = sorted(portions)
        return cls(tuple(portions[s] for s in starts), tuple(starts), unit)

    @classmethod
    def from_preset(cls, name: str) -> Schedule:
        """One of the paper's rows, spread over the Trainer's run.

        Raises:
            ValueError: There is no such preset.
        """
        if name not in PRESETS:
            near = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.4)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"unknown schedule {name!r}, known are {', '.join(PRESETS)}{hint}")
        return cls(PRESETS[name])

    @classmethod
    def every(cls, length: int, portions: Sequence[float], unit: Unit = "epoch") -> Schedule:
        """Phases of equal ``length``, the first one at 0."""
        _number(length, int, "phase length")
        if length < 1:
            raise ValueError(f"a phase must last at least 1 {unit}, got {length}")
        return cls(portions, tuple(i * length for i in range(len(portions))), unit)

    def spread(self, total: int) -> Schedule:
        """Give an open schedule starts that spread its phases evenly over ``total`` epochs or steps.

        Raises:
            ValueError: ``total`` is shorter than the number of phases.
        """
        if self.starts is not None:
            return self
        phases = len(self.portions)
        if total < phases:
            raise ValueError(
                f"{phases} portions {list(self.portions)} need at least {phases} {self.unit}s, one for each, but "
                f"training runs {total}; train longer or use fewer portions"
            )
        return replace(self, starts=tuple(i * total // phases for i in range(phases)))

    def counted_for(self, length: Length) -> Schedule:
        """Let an open schedule count in steps where a run is limited in steps alone and has no number of epochs."""
        return replace(self, unit="step") if self.starts is None and not math.isfinite(length.epochs) else self

    def fit(self, length: Length, origin: int = 0) -> Schedule:
        """Spread an open schedule over what is left of a run after ``origin``, and make sure that it reaches 1.

        Raises:
            ValueError: The run is too short, or has no end that a schedule could be spread over.
        """
        schedule = self.counted_for(length)
        if schedule.starts is None:
            total = length.total(schedule.unit) - origin
            if length.trial:
                total = max(total, len(schedule.portions))
            if not math.isfinite(total):
                raise ValueError(
                    "an open schedule is spread over the run, but this one has no end: set max_epochs or max_steps (of "
                    "a Trainer) or epochs or steps (of a loop), or say when each portion begins, such as "
                    "schedule={0: 0.5, 4: 0.75, 8: 0.875, 12: 1.0}"
                )
            schedule = schedule.spread(int(total))
        if not length.trial:
            schedule.check_fits(length.total(schedule.unit) - origin)
        return schedule

    def check_fits(self, total: float) -> None:
        """Refuse a run of ``total`` epochs or steps that ends before the portion reaches 1.

        Raises:
            ValueError: The last portion would begin only after the end.
        """
        starts = self._starts
        if starts[-1] < total:
            return
        reached = self.portion_at(int(total) - 1)
        raise ValueError(
            f"the schedule reaches portion 1.0 at {self.unit} {starts[-1]} (counted from where INQ begins), but "
            f"training runs only {total} {self.unit}s and would stop at portion {reached}; train at least "
            f"{starts[-1] + 1}, or let it begin earlier"
        )

    def check_certain(self, length: Length, origin: int = 0) -> None:
        """Refuse a run of which nobody can tell whether it ends before the portion reaches 1.

        Raises:
            ValueError: It has a limit in epochs that counts here in steps, or the other way round, and the number of
                steps in an epoch is not known.
        """
        if length.trial or self._starts[-1] < length.at_least(self.unit) - origin:
            return
        other: Unit = "epoch" if self.unit == "step" else "step"
        limits = {"epoch": ("max_epochs", length.epochs), "step": ("max_steps", length.steps)}
        name, value = limits[other]
        raise ValueError(
            f"the schedule reaches portion 1.0 at {self.unit} {self._starts[-1]} (counted from where INQ begins), but "
            f"{name}={value} may end the run before: how many optimizer steps an epoch has is not known (data without "
            f"a length, or manual optimization); limit the run by {limits[self.unit][0]} alone ({name}=-1), or count "
            f"the schedule in {other}s"
        )

    def phase_lengths(self, length: Length, origin: int = 0) -> list[float]:
        """How long a run trains before the first phase and in each phase, in epochs or steps; 0 for not at all."""
        edges = [0, *(origin + start for start in self._starts), length.end(self.unit)]
        return [max(end - begin, 0) for begin, end in itertools.pairwise(edges)]

    def phase_at(self, now: int) -> int:
        """How many portions have begun at epoch or step ``now``: 0 before the first one."""
        return bisect_right(self._starts, now)

    def portion_at(self, now: int) -> float:
        """The portion in force at epoch or step ``now``: 0 before the first one."""
        phase = self.phase_at(now)
        return self.portions[phase - 1] if phase else 0.0

    @property
    def _starts(self) -> Sequence[int]:
        if self.starts is None:
            raise ValueError("this schedule has no starts yet: call spread(total) first")
        return self.starts


def _number(value: object, kind: type[float] | type[int], what: str) -> float | int:
    """``value`` if it is a real number (a whole one for int), else an error that names it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or (kind is int and not isinstance(value, int)):
        raise ValueError(f"a {what} must be a{' whole' if kind is int else ''} number, got {value!r}")
    return value
