"""What every part of the package needs and no library has."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, get_args


def import_extra(module: str, extra: str) -> Any:
    """Import a module that only an optional extra of this package installs.

    Args:
        module: Full name of the module, such as ``torchvision.models``.
        extra: Extra of inq-lightning that installs it.

    Raises:
        ImportError: The module is missing, or is installed but fails to import; says which and what to install.
    """
    package = module.split(".")[0]
    advice = _advice(extra)
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise ImportError(f"{package} is installed but needs {error.name}, which is not: {advice}") from error
        raise ImportError(f"{package} is needed here and is not installed: {advice}") from error
    # A torchvision built for another torch raises RuntimeError or OSError rather than ImportError.
    except Exception as error:
        raise ImportError(
            f"{package} is installed but fails to import ({type(error).__name__}: {error}); its build probably does "
            f"not match torch {version('torch')}. Install a matching pair: {advice}"
        ) from error


def _advice(extra: str) -> str:
    """The command that installs what an extra asks for; by its packages' names, wherever this one came from."""
    try:
        listed = requires("inq-lightning") or []
    except PackageNotFoundError:  # a checkout on the path
        return f"the extra {extra}, pip install '.[{extra}]' in the folder of inq-lightning"
    from packaging.requirements import Requirement  # Lightning needs it, too

    found = [r for r in map(Requirement, listed) if r.marker and r.marker.evaluate({"extra": extra})]
    return " ".join([f"the extra {extra}, pip install", *(f"'{str(r).partition(';')[0].strip()}'" for r in found)])


class Lazy:
    """A module that is imported where it is first used.

    Args:
        module: Full name of the module.
    """

    def __init__(self, module: str) -> None:
        self._import = partial(importlib.import_module, module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._import(), name)


class LazyExtra(Lazy):
    """A module of an extra that is imported where it is first used, see :func:`import_extra`.

    Args:
        module: Full name of the module.
        extra: Extra of inq-lightning that installs it.
    """

    def __init__(self, module: str, extra: str) -> None:
        self._import = partial(import_extra, module, extra)


def one_of(option: str, value: object, allowed: Any) -> None:
    """Refuse a value that is none of those allowed.

    Args:
        option: What the value is for, as the user calls it.
        value: What was given.
        allowed: The allowed values, or a ``Literal`` of them.

    Raises:
        ValueError: The value is none of them; the message names the option and lists them.
    """
    values = get_args(allowed) or tuple(allowed)
    if value not in values:
        raise ValueError(f"{option} must be one of {', '.join(map(str, values))}, got {value!r}")


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Give a temporary name beside ``path`` to write to; the file gets its own name only once it is complete."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
