"""What turns configs into objects."""

import hydra
from lightning import Callback
from omegaconf import DictConfig


def instantiate_callbacks(callbacks_cfg: DictConfig | None) -> list[Callback]:
    """One callback for each entry with a `_target_`."""
    callbacks: list[Callback] = []
    for cb_conf in (callbacks_cfg or {}).values():
        if isinstance(cb_conf, DictConfig) and "_target_" in cb_conf:
            callbacks.append(hydra.utils.instantiate(cb_conf))
    return callbacks
