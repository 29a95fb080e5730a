"""Mistakes on a command line told in one message, where a traceback would be no help."""

from __future__ import annotations

import re
import traceback

from hydra.errors import HydraException, InstantiationException, MissingConfigException, OverrideParseException
from lightning_fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from inq_lightning.recipes.keys import no_such_key, takes

_LIBRARIES = {"inq_lightning", "hydra", "omegaconf", "pytorch_lightning", "lightning_fabric"}


def explain(error: BaseException) -> str | None:
    """What to tell of a user's mistake; None for an error whose traceback is wanted.

    A mistake is what this package, Lightning or Hydra refuse, and what files or missing packages do: not an error out
    of the user's own code, nor one of torch.
    """
    cause = error.__cause__
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        options = ", ".join(name for name in error.options if not name.startswith("base"))
        return f"{group}={option}: there is no such option; there are {options}"
    if isinstance(error, OverrideParseException):
        return f"{error.override} cannot be read; in braces and brackets, names take no quotes of their own"
    if isinstance(cause, (ConfigAttributeError, ConfigKeyError)) and cause.full_key:
        return _unknown_key(cause)
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} has no value; say {error.full_key}=VALUE"
    if isinstance(error, InstantiationException):
        place = re.search(r"full_key: (\S+)", str(error))
        told = (cause and _is_mistake(cause) and explain(cause)) or _first_lines(error)
        return f"{place[1]}: {told}" if place else told
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        return _first_lines(error) + (f"\n{_first_lines(cause)}" if cause else "")
    return str(error) if _is_mistake(error) else None


def _is_mistake(error: BaseException) -> bool:
    if isinstance(error, (OSError, ImportError, OmegaConfBaseException, MisconfigurationException)):
        return True
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    raised_in = frames[-1].f_globals.get("__name__", "") if frames else ""
    return isinstance(error, ValueError) and raised_in.split(".")[0] in _LIBRARIES


def _unknown_key(error: ConfigAttributeError | ConfigKeyError) -> str:
    parent, key = error.parent_node, str(error.full_key)
    if not isinstance(parent, DictConfig):
        return _first_lines(error)
    if takes(parent, key.rpartition(".")[2]):
        return f"there is no key {key} yet; to add it, say +{key}=VALUE"
    return no_such_key(key, parent._get_root())


def _first_lines(error: BaseException) -> str:
    """The message without what Hydra and OmegaConf append for developers."""
    for_developers = re.compile(r"\s*(full_key|object_type|reference_type)[:=]|To append to your config|$")
    return "\n".join(line for line in str(error).splitlines() if not for_developers.match(line))
