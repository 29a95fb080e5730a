"""What every Hydra application finds of this package, without a line of its own: `callbacks=inq` and the group `inq`.

Hydra imports all its plugins whenever an application starts, so this one imports nothing of the package but its face:
torch and the structured configs come in when an application composes the group.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from hydra._internal.core_plugins import file_config_source
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.plugins.config_source import ConfigResult
from hydra.plugins.search_path_plugin import SearchPathPlugin


class INQSource(file_config_source.FileConfigSource):
    """The groups `inq` and `inq/schedule` of a folder; those of `inq-train` beside them stay hidden."""

    def __init__(self, provider: str, path: str) -> None:
        super().__init__(provider, path)
        self.store = ConfigStore.instance()

    @staticmethod
    def scheme() -> str:
        """``inq://``, on a search path."""
        return "inq"

    def is_group(self, config_path: str) -> bool:
        """Hide other groups; ``""``, the folder itself, counts as one."""
        return config_path.split("/")[0] in ("", "inq") and super().is_group(config_path)

    def is_config(self, config_path: str) -> bool:
        """Hide other files."""
        return config_path.startswith("inq/") and super().is_config(config_path)

    def load_config(self, config_path: str) -> ConfigResult:
        """Register the structured configs that the files build on, first.

        Hydra composes from a copy of its sources and their store, made before: they go there.
        """
        from inq_lightning.recipes.config import INQConfig, ScheduleConfig

        self.store.store("base", INQConfig, "inq")
        self.store.store("base", ScheduleConfig, "inq/schedule")
        return super().load_config(config_path)


class INQSearchPath(SearchPathPlugin):
    """Puts them at the end of the search path, where an application's own files go before them."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append both folders."""
        search_path.append("inq-lightning", f"file://{Path(__file__).parent / 'conf'}")
        search_path.append("inq-lightning", f"inq://{files('inq_lightning.conf')}")
