"""How `inq-train` and `inq-plan` begin: their arguments, what they can import, where output goes."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from inq_lightning._common import import_extra, one_of
from inq_lightning.recipes.config import Output


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
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # model._target_ may name a module of the user's own, as under python -m
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    choose_output(cfg)
    return import_extra("rich.console", "train").Console(stderr=cfg.output == "json")


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
