"""Everything that a user can say about a quantization: one record, checked once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import Any, Concatenate, ParamSpec, TypeAlias, get_type_hints

from inq_lightning._common import one_of
from inq_lightning.core.activation import check_activation_bits
from inq_lightning.core.partition import Partition
from inq_lightning.core.patterns import check_layer_levels, check_patterns, check_widths
from inq_lightning.core.schedule import Schedule, default_preset
from inq_lightning.grid import Exponent, LevelsOption, Underflow
from inq_lightning.grid.levels import check_levels, choose_levels, plain, zero_of
from inq_lightning.grid.power_of_two import check_bits, fit_rule

P = ParamSpec("P")
ScheduleLike: TypeAlias = Schedule | Mapping[int, float] | str | None

#: Options that change only what is logged: a run may resume with others.
_SHOWN = {"log_per_layer"}


@dataclass(frozen=True)
class Options:
    """Arguments of :class:`~inq_lightning.INQCallback` and of every other front end.

    Attributes:
        bits: Code length of one weight, 2 to 8.
        schedule: When the quantized portion rises, and to what: a :class:`~inq_lightning.Schedule`, a mapping epoch →
            portion such as ``{0: 0.5, 4: 0.75, 8: 0.875, 12: 1.0}``, or the name of a preset. Left out: the paper's
            portions for ``bits``, spread evenly over the run. Epochs count from where INQ began.
        partition: Which free weights freeze first: ``"magnitude"`` (the largest) or ``"random"``.
        underflow: What becomes of weights below the smallest level: ``"nearest"`` or ``"truncate"``, see
            :class:`~inq_lightning.grid.PowerOfTwoGrid`.
        exponent: How each layer's grid is fitted when its first weights freeze: ``"max"``, by the largest weight (the
            paper's equation 2); ``"mse"``, by the least squared error; ``"auto"``, what suits the layer's bits:
            ``"mse"`` at 2 to 4, ``"max"`` from 5 on. See :meth:`~inq_lightning.grid.PowerOfTwoGrid.from_weights`.
        include: Quantize only parameters that match one of these patterns, see
            :func:`~inq_lightning.select_parameters`.
        exclude: Leave out parameters that match one of these patterns.
        layer_bits: Bit widths for what matches a pattern, for instance ``{"net.conv1": 8, "net.fc": 8}``.
        levels: Which powers of two a weight may be, up to a factor for each layer. ``"paper"``: zero and 2^(bits-2)
            magnitudes, which leaves almost half of the codes unused. ``"full"``: zero and 2^(bits-1) - 1 magnitudes.
            ``"dense"``: 2^(bits-1) magnitudes and no zero, ±1 and ±4 at 2 bits, ±1, ±4, ±8 and ±16 at 3.
            ``Levels(zero=…, exponents=…)``: one's own. ``"auto"``: what suits the layer's bits best, ``"dense"`` at 2
            and 3, ``"full"`` at 4, ``"paper"`` from 5 on; with a zero where it is needed: ``keep_zeros``,
            ``underflow="truncate"``, the padding of an embedding, or more than a hundredth of the weights exactly zero.
        layer_levels: Levels for what matches a pattern, for instance ``{"net.fc": "full"}``.
        embeddings: Whether to quantize embedding tables too.
        activation_bits: Width of activations, 2 to 8: they are rounded to steps of a power of two from the beginning
            of training on, see :func:`~inq_lightning.quantize_activations`. None leaves them as they are.
        layer_activation_bits: Widths for the outputs of layers that match a pattern.
        input_bits: Width of the network's input, where activations are rounded.
        keep_zeros: Freeze the weights that are exactly zero when INQ begins, at zero, for pruned networks (the paper's
            section 3.5); portions then count the others. Weights under :mod:`torch.nn.utils.prune` are quantized in
            place, as ``weight_orig``.
        restart_lr: Put learning rates and their schedulers back to where they began, at each phase; a schedule made for
            the whole run is run whole in each, in less time.
        reset_optimizer: Put the optimizers' state (momentum, second moments) back to what it began with, at each phase.
        log_per_layer: Log each layer's quantized fraction too.
        seed: Seed of the random partition.
        phases: The schedule that ``schedule`` stands for; not an argument.

    Raises:
        ValueError: An option is none of the allowed values; the message names it.
    """

    bits: int = 5
    schedule: ScheduleLike = None
    _: KW_ONLY
    partition: Partition = "magnitude"
    underflow: Underflow = "nearest"
    exponent: Exponent = "auto"
    include: Sequence[str] | None = None
    exclude: Sequence[str] = ()
    layer_bits: Mapping[str, int] | None = None
    levels: LevelsOption = "auto"
    layer_levels: Mapping[str, LevelsOption] | None = None
    embeddings: bool = False
    activation_bits: int | None = None
    layer_activation_bits: Mapping[str, int] | None = None
    input_bits: int = 8
    keep_zeros: bool = False
    restart_lr: bool = True
    reset_optimizer: bool = False
    log_per_layer: bool = False
    seed: int = 0
    phases: Schedule = field(init=False)

    def __post_init__(self) -> None:
        check_bits(self.bits)
        for option in fields(self):
            value = getattr(self, option.name, None)
            if option.type == "bool" and not isinstance(value, bool):
                raise ValueError(f"{option.name} must be True or False, got {value!r}")
        one_of("partition", self.partition, Partition)
        one_of("underflow", self.underflow, Underflow)
        one_of("exponent", self.exponent, Exponent)
        check_patterns("include", self.include)
        check_patterns("exclude", self.exclude)
        check_widths("layer_bits", self.layer_bits)
        object.__setattr__(self, "levels", check_levels("levels", self.levels, self.bits))
        object.__setattr__(self, "layer_levels", check_layer_levels("layer_levels", self.layer_levels))
        self._check_zero()
        self._check_activations()
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 1 << 31:
            raise ValueError(f"seed must be a whole number from 0 to {(1 << 31) - 1}, got {self.seed!r}")
        object.__setattr__(self, "exclude", self.exclude or ())
        object.__setattr__(self, "phases", _as_schedule(self.schedule, self.bits))

    def _check_zero(self) -> None:
        """Refuse levels without a zero where zeros are to stay, or to come.

        Raises:
            ValueError: There are such; the message names both options.
        """
        needs = "keep_zeros=True" if self.keep_zeros else "underflow='truncate'" if self.underflow == "truncate" else ""
        for levels in (self.levels, *(self.layer_levels or {}).values()):
            if needs and levels != "auto" and not zero_of(levels):
                raise ValueError(f"{needs} needs a zero, which levels={levels!r} lack; write levels='full'")

    def _check_activations(self) -> None:
        """Refuse widths of activations that there are not.

        Raises:
            ValueError: There are such; the message names the option.
        """
        if self.activation_bits is not None:
            check_activation_bits("activation_bits", self.activation_bits)
        check_activation_bits("input_bits", self.input_bits)
        check_widths("layer_activation_bits", self.layer_activation_bits)
        if self.activation_bits is None and self.layer_activation_bits:
            raise ValueError("layer_activation_bits needs activation_bits, the width of all other activations")

    def as_dict(self) -> dict[str, Any]:
        """All options but the schedule as plain JSON values."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("schedule", "phases")}
        for name, kind in (("include", list), ("exclude", list), ("layer_bits", dict), ("layer_activation_bits", dict)):
            if values[name] is not None:
                values[name] = kind(values[name])
        values["levels"] = plain(self.levels)
        if self.layer_levels is not None:
            values["layer_levels"] = {pattern: plain(levels) for pattern, levels in self.layer_levels.items()}
        return values

    def differences(self, saved: Mapping[str, Any]) -> list[str]:
        """What another run's :meth:`as_dict` has otherwise, a line each; options that it lacks do not count."""
        here = self.as_dict()
        return [
            f"{name}: {saved[name]!r} in the checkpoint, {value!r} here"
            for name, value in here.items()
            if name in saved and name not in _SHOWN and self._effect(name, saved[name]) != self._effect(name, value)
        ]

    def _effect(self, name: str, value: Any) -> Any:
        """What an option's value comes to, so that ``exponent="auto"`` resumes what one of its rules has begun."""
        widths = (self.bits, *(self.layer_bits or {}).values())
        if name == "exponent":
            return {bits: fit_rule(value, bits) for bits in widths}
        if name == "levels":
            return {bits: choose_levels(check_levels(name, value), bits) for bits in widths}
        # The order of patterns counts, which equality of mappings overlooks; no pattern is as good as no mapping.
        return list(value.items()) or None if isinstance(value, Mapping) else value


def takes_options(target: Callable[P, Options]) -> Callable[[Callable[..., None]], Callable[Concatenate[Any, P], None]]:
    """Give an ``__init__(self, *args, **kwargs)`` the signature of ``target``, to which it passes its arguments.

    So the options are listed once, and type checkers, editors and LightningCLI know them for each front end.
    """

    def decorate(init: Callable[..., None]) -> Callable[Concatenate[Any, P], None]:
        types = get_type_hints(target)
        options = [p.replace(annotation=types[p.name]) for p in inspect.signature(target).parameters.values()]
        own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        init.__signature__ = inspect.Signature([own, *options])  # type: ignore[attr-defined]
        return init

    return decorate


def _as_schedule(schedule: ScheduleLike, bits: int) -> Schedule:
    if isinstance(schedule, Schedule):
        return schedule
    if isinstance(schedule, Mapping):
        return Schedule.from_mapping(schedule)
    if schedule is not None and not isinstance(schedule, str):
        raise ValueError(
            f"schedule must be a Schedule, a mapping epoch → portion or the name of a preset, got {schedule!r}"
        )
    return Schedule.from_preset(default_preset(bits) if schedule is None else schedule)
