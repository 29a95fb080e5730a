"""What every part of the package needs and no library has."""

from __future__ import annotations

import importlib
from typing import Any

import torch


def import_extra(module: str, extra: str) -> Any:
    """Imports a module that only an optional extra of this package installs.

    Args:
        module: Full name of the module, such as `torchvision.models`.
        extra: Extra of inq-lightning that installs it.

    Returns:
        The module.

    Raises:
        ImportError: The module is missing, or is installed but fails to import; says which and what to install.
    """
    package = module.split(".")[0]
    advice = f"pip install 'inq-lightning[{extra}]'"
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
            f"not match torch {torch.__version__}. Install a matching pair: {advice}"
        ) from error
