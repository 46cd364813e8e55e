"""Find adapters in the library, and say what is known of them; a list of them loads no torch."""

import os
from collections.abc import Iterable
from pathlib import Path

from veneer.core.errors import AdapterError, nearest, shown
from veneer.library import index
from veneer.library.entry import Entry, file_of, is_name
from veneer.library.place import CONTENT, ENTRIES, folder, no_such


def find(name_or_path: str | os.PathLike[str]) -> Path:
    """The file or folder of the adapter that a person asks for: a path that is there, else a name of the library.

    Of a run's folder it is the adapter in it. What has a separator (`./my-style`) is a path in any case.
    Raises `AdapterError` with the nearest name.
    """
    text = os.fspath(name_or_path)
    path = Path(os.path.expanduser(text))
    if text and os.path.exists(path):
        from veneer.files.stored import in_run

        return in_run(path)
    if not text:
        raise AdapterError("expected an adapter's file, folder or name, found an empty one")
    if text.startswith("~") or any(separator in text for separator in (os.sep, os.altsep) if separator):
        raise no_such(path)
    entry = _entry(text, folder(), "is neither a file or folder nor")
    found = path_of(entry)
    if not found.exists():
        raise AdapterError(f"the content of {entry.name!r} is missing: expected {found}; see `veneer library verify`")
    return found


def path_of(entry: Entry) -> Path:
    """The file or folder of an entry's adapter."""
    return folder() / CONTENT / entry.content / entry.file


def preview_of(entry: Entry) -> Path | None:
    """The picture of an entry, if it has one."""
    return next((folder() / CONTENT / entry.preview).glob("preview.*"), None) if entry.preview else None


def get(name: str) -> Entry:
    """The entry of that name. Raises `AdapterError` with the nearest one."""
    return _entry(name, folder(), "is not")


def listed() -> list[Entry]:
    """All entries, by name."""
    return index.search(folder(), [])


def search(words: Iterable[str]) -> list[Entry]:
    """The entries in whose name, tags, trigger words and base every one of the words is."""
    return index.search(folder(), list(words))


def unreadable() -> list[str]:
    """The files of entries that cannot be read."""
    return index.unreadable(folder())


def home_of(name: str, place: Path) -> Path | None:
    """The file of the entry of that name, if there is one."""
    home = place / ENTRIES / file_of(name)
    return home if is_name(name) and home.is_file() else None


def _entry(name: str, place: Path, said: str) -> Entry:
    home = home_of(name, place)
    if home is None:
        raise unknown(name, place, said)
    return Entry.read(home)


def unknown(name: str, place: Path, said: str = "is not") -> AdapterError:
    """The error for a name that no entry has, with the nearest one."""
    names = [entry.name for entry in index.search(place, [])]
    hint = nearest(name, names) if names else ", which is empty: `veneer library add` puts an adapter into it"
    return AdapterError(f"{shown(name)} {said} a name of the library {place}{hint}")
