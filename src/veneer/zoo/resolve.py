"""A base as people write it (a name of the zoo, a folder, a hub id) → a folder on this machine."""

import os
import re
from pathlib import Path

from veneer.core.errors import AdapterError, nearest
from veneer.zoo import hub
from veneer.zoo.cache import is_here
from veneer.zoo.catalogue import CATALOGUE
from veneer.zoo.pull import Report, pull

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")  # with an owner, or one of the hub's oldest models


def resolve(name: str, *, download: bool = True, report: Report | None = None) -> Path:
    """The folder of a base that is named by a folder, a name of the zoo, or a hub id, looked for in that order.

    What is not on this machine is fetched, unless `download` is off. `report` is that of `pull`.
    """
    path = Path(os.path.expanduser(name))
    if name and path.exists() and (name not in CATALOGUE or _is_model(path)):
        return _checked(name, path)
    if name in CATALOGUE:
        if download or is_here(name):
            return pull(name, report=report)
        raise AdapterError(f"base {name!r} is not here yet: run `veneer pull {name}`")
    nothing = (
        f"base {name!r} is neither a folder, a name that `veneer models` lists ({', '.join(CATALOGUE)}), nor a hub id "
        f"(owner/name){nearest(name, CATALOGUE)}"
    )
    if not _HUB_NAME.fullmatch(name):
        raise AdapterError(nothing)
    try:
        return hub.snapshot(name, download=download)
    except AdapterError as error:
        # a word without an owner is more likely a slip than one of the hub's oldest models
        slip = f"{nothing} (as a name of the hub: {error})"
        raise AdapterError(f"base {name!r} is a hub id, but {error}" if "/" in name else slip) from error


def _is_model(path: Path) -> bool:
    """Whether a folder holds a transformers model or a diffusers pipeline."""
    return (path / "config.json").is_file() or (path / "model_index.json").is_file()


def _checked(name: str, path: Path) -> Path:
    """The folder itself when it is a model, else an error that names what it lacks."""
    if _is_model(path):
        return path
    if path.is_file():
        raise AdapterError(f"base {name!r} is a file; expected a folder with config.json")
    if (path / "adapter_config.json").is_file():
        raise AdapterError(f"base {name!r} is a folder with an adapter; expected the model that it was made for")
    raise AdapterError(f"base {name!r} is a folder without config.json (or model_index.json): not a model")
