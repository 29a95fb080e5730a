"""How a run of `inq-train`, `inq-plan` or `inq-quantize` begins: its keys, what it can import, where output goes."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import to_absolute_path
from omegaconf import DictConfig, OmegaConf

from inq_lightning._common import import_extra, one_of
from inq_lightning.recipes.config import Output
from inq_lightning.recipes.keys import check_keys

_LIBRARIES = ("lightning", "lightning_fabric", "pytorch_lightning", "sklearn", "tensorboard", "torch", "torchmetrics")
_PATH = re.compile("(^|_)(ckpt|dir|file|folder|path|root)$")


def prepare(cfg: DictConfig) -> Any:
    """Settle what can be imported and where output goes, and give the rich console for people.

    Raises:
        ValueError: There is a key that nothing would read, or ``output`` is none of the allowed values.
        ImportError: rich is not installed.
    """
    _keep_paths(cfg)
    if (folder := to_absolute_path(".")) not in sys.path:
        sys.path.append(folder)  # model._target_ may name a module of the user's own, as under python -m
    check_keys(cfg)
    _keep_quiet()
    choose_output(cfg)
    return import_extra("rich.console", "train").Console(stderr=cfg.output == "json")


def _keep_quiet() -> None:
    """Leave out what other libraries tell their developers, and Lightning about itself; its warnings stay."""
    for library in ("lightning.pytorch", "pytorch_lightning"):  # Lightning logs under either name
        logging.getLogger(f"{library}.utilities.rank_zero").addFilter(_matters)
    for category in (DeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category, module=f"({'|'.join(_LIBRARIES)})(\\.|$)")


def _matters(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or "inq_lightning" in Path(record.pathname).parts


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
