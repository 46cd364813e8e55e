"""Read the whole library again, and say what is not as it was put there."""

import os
import shlex
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from veneer.core.errors import AdapterError, named
from veneer.library import content, index
from veneer.library.adding import sweep
from veneer.library.entry import Entry
from veneer.library.place import CONTENT, ENTRIES, MARK, UNFINISHED, Report, changing, folder, silent, visible

LOST = "lost"  # where `repair` puts what nothing refers to; nothing there is ever touched again


@dataclass(frozen=True)
class Fault:
    """Something that is wrong, and what mends it."""

    where: str
    what: str
    advice: str


def verify(repair: bool = False, report: Report = silent) -> list[Fault]:
    """Read and hash everything; give the faults that are left. A library with nothing wrong has none.

    `repair` makes the index anew and moves what no entry refers to out of the way, to `lost/`. What is missing or
    changed cannot be made good from here: the advice says how. Nobody changes the library meanwhile; one that this
    process may not write is read as it is.
    """
    place = folder()
    if not (place / ENTRIES).is_dir() and not (place / CONTENT).is_dir():
        return []
    faults = []
    with ExitStack() as stack:
        try:
            stack.enter_context(changing(report))
        except AdapterError:
            if repair:
                raise
        else:
            if not repair and not index.is_sound(place):
                faults.append(Fault(index.INDEX, "is damaged, and is not used", "--repair makes it anew"))
            else:
                sweep(place)
        try:
            entries = _entries(place, faults, repair)
            _contents(place, entries, faults, repair)
        except OSError as error:
            raise AdapterError(f"the library {place} cannot be read: {error}") from error
    return faults


def _entries(place: Path, faults: list[Fault], repair: bool) -> list[Entry]:
    """The entries that can be read; what is wrong with the others goes to `faults`."""
    entries = []
    for path in visible(place / ENTRIES, ".json"):
        try:
            entries.append(Entry.read(path))
        except AdapterError as error:
            if repair:
                _set_aside(path, place)
            else:
                advice = f"--repair moves it to {LOST}/; then add the adapter again"
                faults.append(Fault(f"{ENTRIES}/{named(path.name)}", str(error), advice))
    return entries


def _contents(place: Path, entries: list[Entry], faults: list[Fault], repair: bool) -> None:
    """What is wrong with the contents, and with what entries say of them."""
    there = {path.name: path for path in visible(place / CONTENT)}
    needed = {key for entry in entries for key in (entry.content, entry.preview) if key}
    wrong = {key: content.faults(there[key]) if key in there else ["missing"] for key in sorted(needed)}
    for entry in entries:
        advice = f"`veneer library add {_origin(entry)} --name {entry.name} --force` puts it there again"
        for key, what in ((entry.content, "content"), (entry.preview, "preview")):
            if key and wrong[key]:
                faults.append(Fault(entry.name, f"{what} {key[:12]}: {'; '.join(wrong[key])}", advice))
        if not wrong[entry.content] and content.files_of(there[entry.content]) != entry.files:
            faults.append(Fault(entry.name, "its entry names other files than its content has", advice))
    marked = {path.stem for path in visible(place / UNFINISHED, MARK)}  # they go with the next change
    for name in sorted(there.keys() - needed - marked):
        if repair:
            _set_aside(there[name], place)
        else:
            advice = f"--repair moves it to {LOST}/; `veneer library add {there[name]} --name NAME` gives it a name"
            faults.append(Fault(f"{CONTENT}/{named(name)}", "orphaned: no entry refers to it", advice))


def _set_aside(path: Path, place: Path) -> None:
    (place / LOST).mkdir(exist_ok=True)
    target = place / LOST / path.name
    os.replace(path, target if not os.path.lexists(target) else target.with_name(f"{path.name}-{uuid4().hex[:8]}"))
    content.flush(target.parent)
    content.flush(path.parent)


def _origin(entry: Entry) -> str:
    found = next((entry.origin[key] for key in ("path", "run") if entry.origin.get(key)), "")
    return shlex.quote(found) if found else "FILE_OR_RUN"
