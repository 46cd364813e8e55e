"""Where the library is, and who may change it."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from veneer.core.errors import AdapterError, nearest

ENTRIES, CONTENT, UNFINISHED = "entries", "content", "unfinished"
MARK = ".pending"  # ends the name of what says that a content may be unfinished
Report = Callable[[str], None]


def silent(line: str) -> None:
    """Say nothing."""


def folder() -> Path:
    """The library's folder, which may not be there yet: `VENEER_LIBRARY`, else the platform's own place for data."""
    chosen = os.environ.get("VENEER_LIBRARY")
    if chosen:
        return Path(os.path.expanduser(chosen)).absolute()
    return Path(needed("platformdirs").user_data_path("veneer", appauthor=False)) / "library"


def needed(module: str) -> Any:
    """The module, imported now; when its package is missing, an error that says what to install."""
    try:
        return import_module(module)
    except ImportError as error:
        raise AdapterError(
            f"the library of adapters needs: pip install 'veneer[train]' ({module} is not installed: {error})"
        ) from error


@contextmanager
def changing(report: Report = silent) -> Iterator[Path]:
    """Give the library's folder to one process at a time.

    Raises `AdapterError` where it cannot be written, the disk is full, or the like.
    """
    place = folder()
    filelock = needed("filelock")
    try:
        for part in (ENTRIES, CONTENT, UNFINISHED):
            (place / part).mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(place / ".lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            report(f"waiting for another process that changes {place}")
            lock.acquire()
        try:
            yield place
        finally:
            lock.release()
    except (OSError, NotImplementedError) as error:
        raise AdapterError(
            f"the library {place} cannot be changed: {error}. Nothing was half-done; it needs a folder that can be "
            "written, with room for the adapter (VENEER_LIBRARY names another one)"
        ) from error


def visible(folder: Path, ending: str = "") -> list[Path]:
    """What a folder holds and does not hide, by name; nothing, where there is no such folder."""
    try:
        return sorted(path for path in folder.iterdir() if path.name.endswith(ending) and not path.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []


def no_such(path: Path) -> AdapterError:
    """The error for a path that leads to nothing."""
    siblings = [str(file) for file in visible(path.parent)] if os.access(path.parent, os.R_OK) else []
    return AdapterError(f"{path}: there is no such file or folder{nearest(str(path), siblings)}")


def discard(path: Path) -> None:
    """Take a file or folder away, whatever it is; a symbolic link goes alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
