"""How `inq-train` and `inq-plan` begin: their arguments, what they can import, where output goes."""

from __future__ import annotations

import logging
import re
import sys
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import to_absolute_path
from omegaconf import DictConfig, OmegaConf

from inq_lightning._common import import_extra, one_of
from inq_lightning.recipes.config import Output

_PATH = re.compile("(^|_)(ckpt|dir|file|folder|path|root)$")


def accept_json() -> None:
    """Let ``--json``, which Hydra would refuse, stand for ``output=json``.

    In ``sys.argv``, as that is the only place where Hydra looks for arguments.
    """
    sys.argv[1:] = ["output=json" if argument == "--json" else argument for argument in sys.argv[1:]]


def prepare(cfg: DictConfig) -> Any:
    """Settle what can be imported and where output goes, and give the rich console for people.

    Raises:
        ValueError: ``output`` is none of the allowed values.
        ImportError: rich is not installed.
    """
    _keep_paths(cfg)
    if (folder := to_absolute_path(".")) not in sys.path:
        sys.path.append(folder)  # model._target_ may name a module of the user's own, as under python -m
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    choose_output(cfg)
    return import_extra("rich.console", "train").Console(stderr=cfg.output == "json")


def _keep_paths(cfg: DictConfig) -> None:
    """Let relative paths mean what they did where the command was started, whatever hydra.job.chdir says.

    These are ``ckpt``, and what data and model call a path, a root, a folder and the like.
    """
    if HydraConfig.initialized() and HydraConfig.get().job.chdir:
        if cfg.ckpt is not None:
            cfg.ckpt = to_absolute_path(cfg.ckpt)
        for node in (cfg.data, cfg.model):
            _make_absolute(node)


def _make_absolute(node: DictConfig) -> None:
    for key in node:
        value = None if OmegaConf.is_missing(node, key) else node[key]
        if isinstance(value, DictConfig):
            _make_absolute(value)
        elif isinstance(value, str) and _PATH.search(str(key)):
            node[key] = to_absolute_path(value)


def choose_output(cfg: DictConfig) -> None:
    """Settle ``output``: ``rich`` on a terminal, else ``json``, which keeps standard output for lines of JSON.

    Raises:
        ValueError: It is none of the allowed values.
    """
    one_of("output", cfg.output, Output)
    if cfg.output == "auto":
        cfg.output = "rich" if sys.stdout.isatty() else "json"
    if cfg.output == "json":
        for handler in logging.getLogger().handlers:  # Hydra's
            if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout:
                handler.setStream(sys.stderr)
