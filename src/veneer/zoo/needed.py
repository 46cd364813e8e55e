"""Packages that only some commands need."""

from importlib import import_module
from typing import Any

from veneer.core.errors import AdapterError


def needed(module: str) -> Any:
    """The module, imported now; when its package is missing, an error that says what to install."""
    try:
        return import_module(module)
    except ImportError as error:
        raise AdapterError(
            f"pulling a base model needs: pip install 'veneer[train]' ({module} is not installed: {error})"
        ) from error
