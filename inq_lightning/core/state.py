"""What a run keeps in a checkpoint: is it whole, does it fit the run that resumes from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from inq_lightning.core.frozen import FrozenWeight
from inq_lightning.core.options import Options
from inq_lightning.core.schedule import Schedule

VERSION = 2

_STATE = {"phase": int, "origin": int, "schedule": dict, "layers": dict}
_LAYER = {"shape": list, "bits": int, "underflow": str, "frozen": int, "kept": int, "mask": Tensor}
_NONE = type(None)
# What each version has besides: version 1 did not keep the options, and of a grid only n1.
_STATE_OF: dict[Any, dict[str, Any]] = {1: {}, 2: {"options": dict, "rates": (dict, _NONE)}}
_LAYER_OF: dict[Any, dict[str, Any]] = {1: {"n1": (int, _NONE)}, 2: {"grid": (dict, _NONE)}}


def check(state: Any) -> dict[str, Any]:
    """Refuse a state that this release cannot read.

    Returns:
        The state as this version writes it: ``options`` (those that were kept), ``phase``, ``origin``, ``schedule``
        (arguments of :class:`~inq_lightning.Schedule`), ``rates`` (of
        :class:`~inq_lightning.core.rates.LearningRates`, or None) and ``layers`` (states of
        :class:`~inq_lightning.FrozenWeight` by name).

    Raises:
        ValueError: It is of another version, or damaged; the message names each damage.
    """
    version: Any = state.get("version") if isinstance(state, Mapping) else VERSION
    if version not in _STATE_OF:
        raise ValueError(
            f"the checkpoint's INQ state has version {version!r}, this release reads versions 1 to {VERSION}; "
            "resume with the release that wrote it, or load only its weights and start INQ afresh"
        )
    _refuse(_damages(state, version), "is damaged", "from another checkpoint")
    return _from_version_1(state) if version == 1 else state


def check_fits(
    state: Mapping[str, Any], options: Options, schedule: Schedule, layers: Mapping[str, FrozenWeight]
) -> None:
    """Refuse a state that belongs to another run.

    Args:
        state: What :func:`check` returns.
        options: The options of the run that resumes.
        schedule: Its schedule.
        layers: Its layers by name.

    Raises:
        ValueError: Something differs; the message names each difference.
    """
    lines = options.differences(state["options"]) + _differences(state, schedule, layers)
    _refuse(lines, "does not fit this run", "with the settings that it was written with")


def load(state: Mapping[str, Any], layers: Mapping[str, FrozenWeight]) -> None:
    """Load the layers' states.

    Raises:
        ValueError: The weights or the masks are not those that were saved; the message names each layer.
    """
    lines = []
    for name, layer_state in state["layers"].items():
        try:
            layers[name].load_state_dict(layer_state)
        except ValueError as error:
            lines.append(f"{name}: {str(error).removeprefix(f'{name}: ')}")
    _refuse(lines, "is damaged", "from another checkpoint")


def _refuse(lines: list[str], what: str, remedy: str) -> None:
    """Refuse a checkpoint's state if there is anything against it."""
    if lines:
        reasons = "\n  ".join(lines)
        raise ValueError(
            f"the checkpoint's INQ state {what}:\n  {reasons}\n"
            f"Resume {remedy}, or load only its weights and start INQ afresh"
        )


def _from_version_1(state: Mapping[str, Any]) -> dict[str, Any]:
    layers = {}
    for name, layer in state["layers"].items():
        grid = {"kind": "power_of_two", "n1": layer["n1"], "bits": layer["bits"], "underflow": layer["underflow"]}
        layers[name] = {key: value for key, value in layer.items() if key != "n1"}
        layers[name]["grid"] = grid if layer["frozen"] else None
    return {**state, "version": VERSION, "options": {}, "rates": None, "layers": layers}


def _damages(state: Any, version: int) -> list[str]:
    """What is missing from a checkpoint's state, or of another type than was written, a line each."""

    def wrong(where: str, fields: Any, kinds: Mapping[str, Any]) -> list[str]:
        if not isinstance(fields, dict):
            return [f"{where or 'it'} is a {type(fields).__name__}, not a dict"]
        lines = [f"{where}{': ' if where else ''}{key} is missing" for key in kinds if key not in fields]
        for key, kind in kinds.items():
            if key in fields and (not isinstance(fields[key], kind) or isinstance(fields[key], bool)):
                lines.append(f"{where}{': ' if where else ''}{key} is of type {type(fields[key]).__name__}")
        return lines

    lines = wrong("", state, _STATE | _STATE_OF[version])
    if lines:
        return lines
    for name, layer in state["layers"].items():
        lines += wrong(name, layer, _LAYER | _LAYER_OF[version])
    try:
        phases = len(Schedule(**state["schedule"]).portions)
    except (TypeError, ValueError) as error:
        return [*lines, f"schedule: {error}"]
    if not 0 <= state["phase"] <= phases or state["origin"] < 0:
        lines.append(f"phase {state['phase']} of {phases}, counted from {state['origin']}, is none")
    return lines


def _differences(state: Mapping[str, Any], schedule: Schedule, layers: Mapping[str, FrozenWeight]) -> list[str]:
    """What keeps a checkpoint's state from fitting the run, a line each."""
    saved, lines = Schedule(**state["schedule"]), []
    for field in ("portions", "starts", "unit"):
        here, there = getattr(schedule, field), getattr(saved, field)
        if here != there:
            lines.append(f"schedule {field}: {there} in the checkpoint, {here} here")
    lines += [
        f"{name}: quantized in the checkpoint, not selected here" for name in state["layers"] if name not in layers
    ]
    lines += [f"{name}: selected here, not in the checkpoint" for name in layers if name not in state["layers"]]
    for name, layer in layers.items():
        there = state["layers"].get(name)
        if there is None:
            continue
        here = {"shape": list(layer.parameter.shape), "bits": layer.bits, "underflow": layer.underflow}
        lines += [f"{name}: {k} {there[k]} in the checkpoint, {v} here" for k, v in here.items() if there[k] != v]
    return lines
