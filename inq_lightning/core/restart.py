"""Putting back what a new phase puts back: what schedulers move, the schedulers themselves, an optimizer's state."""

from __future__ import annotations

import copy
import inspect
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

#: What the schedulers of PyTorch move in a parameter group, and what they keep beside it.
_MOVED = {"lr", "momentum", "betas", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum"}


class Restart:
    """Remembers where schedulers stand and what they move in their optimizers, and puts both back.

    Both have to be put back: most schedulers compute the next rate from the optimizer's present one. All else in a
    parameter group is the optimizer's own, such as a step size that it adapts.

    Args:
        optimizers: Optimizers, freshly configured.
        schedulers: Schedulers, freshly configured.

    Attributes:
        moved: Which options of parameter groups are put back.
    """

    def __init__(self, optimizers: Sequence[Optimizer], schedulers: Sequence[Any]) -> None:
        self.moved = set(_MOVED)
        self._optimizers = list(optimizers)
        self._groups = [dict(enumerate(map(_numbers, optimizer.param_groups))) for optimizer in optimizers]
        self._later: list[dict[int, dict[str, Any]]] = [{} for _ in optimizers]
        shared = [part for o in optimizers for part in (o.param_groups, *o.param_groups)]
        self._kept = {id(scheduler): Kept(scheduler, shared) for scheduler in schedulers}

    def __call__(self, scheduler: Any = None) -> None:
        """Put everything back, or only one scheduler and its optimizer's rates.

        Parameter groups that were added later go back to what they were added with.
        """
        self.notice_groups()
        for optimizer, groups, later in zip(self._optimizers, self._groups, self._later, strict=True):
            if scheduler is None or scheduler.optimizer is optimizer:
                for index, options in (groups | later).items():
                    if index < len(optimizer.param_groups):
                        _update(optimizer.param_groups[index], {k: v for k, v in options.items() if k in self.moved})
        for kept in self._kept.values() if scheduler is None else [self._kept[id(scheduler)]]:
            kept.put_back()

    def notice_groups(self) -> None:
        """Remember parameter groups that have been added since, as they are now."""
        for optimizer, groups, later in zip(self._optimizers, self._groups, self._later, strict=True):
            for index in range(len(groups), len(optimizer.param_groups)):
                if index not in later:
                    later[index] = _numbers(optimizer.param_groups[index])

    def changes(self) -> set[str]:
        """Which options of parameter groups are others now than when this was made."""
        return {
            key
            for optimizer, groups in zip(self._optimizers, self._groups, strict=True)
            for group, options in zip(optimizer.param_groups, groups.values(), strict=False)
            for key, value in options.items()
            if key in group and group[key] != value
        }

    def foreign(self, scheduler: Any) -> list[str]:
        """What the scheduler keeps that cannot be put back: attributes with their types."""
        return self._kept[id(scheduler)].foreign

    def state_dict(self) -> list[dict[int, dict[str, Any]]]:
        """The parameter groups that were added later: for each optimizer, index → options."""
        return [{index: dict(options) for index, options in later.items()} for later in self._later]

    def load_state_dict(self, state: Sequence[dict[int, dict[str, Any]]]) -> None:
        """Take up what :meth:`state_dict` returned."""
        if len(state) == len(self._later):
            self._later = [dict(later) for later in state]


class OptimizerState:
    """Remembers the state that optimizers begin with, which some make before their first step, and puts it back."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._states = [(o, {key: copy.deepcopy(value) for key, value in o.state.items()}) for o in optimizers]

    def __call__(self) -> None:
        """Put it back."""
        for optimizer, state in self._states:
            _refill(optimizer.state, {key: copy.deepcopy(value) for key, value in state.items()})


def settings(optimizers: Sequence[Optimizer], schedulers: Sequence[Any], states: bool = False) -> dict[str, Any]:
    """Where optimizers and schedulers stand, as plain values for a checkpoint.

    Args:
        optimizers: The optimizers.
        schedulers: The schedulers.
        states: Whether the states of the optimizers count too.
    """
    return copy.deepcopy(
        {
            "groups": [[_numbers(group) for group in optimizer.param_groups] for optimizer in optimizers],
            "states": [_by_index(optimizer) if states else {} for optimizer in optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in schedulers],
        }
    )


@contextmanager
def as_configured(
    optimizers: Sequence[Optimizer], schedulers: Sequence[Any], configured: Mapping[str, Any]
) -> Iterator[None]:
    """Have optimizers and schedulers for a while as :func:`settings` has found them.

    Raises:
        ValueError: There were others then.
    """
    for kind, here, there in (
        ("optimizers", len(optimizers), len(configured["groups"])),
        ("schedulers", len(schedulers), len(configured["schedulers"])),
    ):
        if here != there:
            raise ValueError(f"the checkpoint was written with {there} {kind}, here are {here}")
    now, states = settings(optimizers, schedulers), [dict(optimizer.state) for optimizer in optimizers]
    _set(optimizers, schedulers, configured)
    for optimizer, state in zip(optimizers, configured["states"], strict=True):
        parameters = dict(enumerate(_parameters(optimizer)))
        _refill(optimizer.state, {parameters.get(key, key): value for key, value in copy.deepcopy(state).items()})
    try:
        yield
    finally:
        _set(optimizers, schedulers, now)
        for optimizer, state in zip(optimizers, states, strict=True):
            _refill(optimizer.state, state)


class Kept:
    """What an object and the objects within it know now, to be put back; each stays the object that it is.

    Of schedulers within schedulers, and of objects that hold nothing but data, the attributes are put back. Optimizers,
    modules, parameters and functions are not theirs and stay as they are.

    Args:
        thing: The object.
        shared: Objects that are not its own, although it may hold them.

    Attributes:
        foreign: Attributes that nobody knows how to put back, with their types: generators, or objects of objects.
    """

    def __init__(self, thing: Any, shared: Iterable[Any] = ()) -> None:
        self.foreign: list[str] = []
        self._seen = {id(part): part for part in (thing, *shared)}  # kept alive, or an id might be used again
        self._attributes: list[tuple[Any, dict[str, Any], dict[str, Any]]] = []  # object, its data, what else it holds
        self._containers: list[tuple[Any, Any]] = []  # lists and dicts of objects, and what is in them
        self._keep(thing, "")

    def put_back(self) -> None:
        """Put everything back."""
        for container, content in self._containers:
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(content)
        for thing, data, held in self._attributes:
            vars(thing).clear()
            vars(thing).update({**held, **copy.deepcopy(data)})

    def _keep(self, thing: Any, where: str) -> None:
        data: dict[str, Any] = {}
        held: dict[str, Any] = {}
        self._attributes.append((thing, data, held))
        for name, value in vars(thing).items():
            if not _is_data(value):
                held[name] = value
                self._visit(value, where or name)
                continue
            try:
                data[name] = copy.deepcopy(value)
            except Exception:  # of a lock, for instance
                held[name] = value
                self._leave(value, where or name)

    def _visit(self, value: Any, where: str) -> None:
        if id(value) in self._seen or _is_data(value) or _is_held(value):
            return
        self._seen[id(value)] = value
        if isinstance(value, (list, dict, tuple)):
            if not isinstance(value, tuple):
                self._containers.append((value, copy.copy(value)))
            for part in value.values() if isinstance(value, dict) else value:
                self._visit(part, where)
        elif _is_scheduler(value) or (hasattr(value, "__dict__") and all(map(_is_simple, vars(value).values()))):
            self._keep(value, where)
        else:
            self._leave(value, where)

    def _leave(self, value: Any, where: str) -> None:
        self.foreign.append(f"{where} ({type(value).__name__})")


def _is_simple(value: Any) -> bool:
    return _is_data(value) or _is_held(value)


def _is_data(value: Any) -> bool:
    """Whether a value is what it is made of, so that a copy is as good."""
    if isinstance(value, (list, tuple, set, deque)):
        return all(map(_is_data, value))
    if isinstance(value, dict):
        return all(map(_is_data, [*value, *value.values()]))
    if isinstance(value, Tensor):
        return not isinstance(value, nn.Parameter)
    return not hasattr(value, "__dict__") and not hasattr(value, "__next__") and not _is_held(value)


def _is_held(value: Any) -> bool:
    return isinstance(value, (Optimizer, nn.Module, nn.Parameter, type, ModuleType)) or inspect.isroutine(value)


def _is_scheduler(value: Any) -> bool:
    return isinstance(value, LRScheduler) or (hasattr(value, "step") and hasattr(value, "optimizer"))


def _fill(tensor: Tensor, value: Tensor | float) -> Tensor:
    with torch.no_grad():
        return tensor.copy_(value) if isinstance(value, Tensor) else tensor.fill_(value)


def _numbers(group: dict[str, Any]) -> dict[str, Any]:
    """The options of a parameter group that a scheduler could move: numbers, and tuples of numbers."""

    def is_number(value: Any) -> bool:
        if isinstance(value, Tensor):
            return value.numel() == 1 and not isinstance(value, nn.Parameter)
        return isinstance(value, (int, float)) or (isinstance(value, (tuple, list)) and all(map(is_number, value)))

    return {key: copy.deepcopy(value) for key, value in group.items() if key != "params" and is_number(value)}


def _update(group: dict[str, Any], options: dict[str, Any]) -> None:
    for key, value in options.items():
        if isinstance(group.get(key), Tensor):  # compiled optimizers know it as this tensor
            _fill(group[key], value)
        else:
            group[key] = copy.deepcopy(value)


def _set(optimizers: Sequence[Optimizer], schedulers: Sequence[Any], settings: Mapping[str, Any]) -> None:
    """Take rates and schedulers to where :func:`settings` has found them."""
    for optimizer, groups in zip(optimizers, settings["groups"], strict=True):
        for group, options in zip(optimizer.param_groups, groups, strict=False):  # some may have been added since
            _update(group, options)
    for scheduler, state in zip(schedulers, settings["schedulers"], strict=True):
        scheduler.load_state_dict(copy.deepcopy(state))


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _by_index(optimizer: Optimizer) -> dict[Any, Any]:
    """An optimizer's state by the numbers of its parameters."""
    numbers = {id(parameter): number for number, parameter in enumerate(_parameters(optimizer))}
    return {numbers.get(id(key), key): value for key, value in optimizer.state.items()}


def _refill(state: MutableMapping[Any, Any], content: Mapping[Any, Any]) -> None:
    """Others hold the same mapping, wrappers for instance."""
    state.clear()
    state.update(content)
