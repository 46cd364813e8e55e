"""Put adapters into the library, and take them out."""

import os
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

from veneer.core.errors import AdapterError
from veneer.library import content, index
from veneer.library.entry import Entry, checked_name, file_of, is_key, name_of
from veneer.library.facts import facts, words
from veneer.library.place import CONTENT, ENTRIES, MARK, UNFINISHED, Report, changing, discard, folder, no_such, silent
from veneer.library.shelf import get, home_of, unknown
from veneer.library.source import Source, picture, source
from veneer.safe.whole import write_whole


def add(
    path: str | os.PathLike[str],
    name: str | None = None,
    *,
    tags: Iterable[str] = (),
    triggers: Iterable[str] = (),
    licence: str = "",
    preview: str | os.PathLike[str] | None = None,
    note: str = "",
    force: bool = False,
    report: Report = silent,
) -> Entry:
    """Keep the adapter of a file, a folder or a run under a name, which is the file's or folder's own if none is given.

    What the files and what lies around them say of it is kept with it; what is said here goes before it. `force` gives
    a name that is taken to the new adapter. Raises `AdapterError`, and then nothing has changed.
    """
    place = Path(os.path.expanduser(path))
    if not os.path.exists(place):
        raise no_such(place)
    found = source(place)
    if preview is not None:
        found.preview = picture(Path(os.path.expanduser(preview)))
    said = {"tags": words(tags), "triggers": words(triggers), "licence": licence, "note": note}
    return keep(found, checked_name(name) if name is not None else name_of(found.name), said, force, report)


def keep(found: Source, name: str, said: Mapping[str, Any], force: bool, report: Report) -> Entry:
    """Keep what was found under the name; what is `said` goes before what is found."""
    if found.left:
        report(f"left out, as no part of the adapter: {', '.join(found.left)}")
    with changing(report) as place, ExitStack() as stack:
        sweep(place)
        home = place / ENTRIES / file_of(name)
        if home.exists() and not force:
            raise AdapterError(f"{name!r} is in the library already: --name gives another name, --force replaces it")
        draft, *pictures = [
            stack.enter_context(content.draft(place, files)) for files in (found.files, found.preview) if files
        ]
        if torn := [name for name, key in found.sums.items() if content.files_of(draft).get(name) != key]:
            raise AdapterError(f"{found.path} is torn or changed since it was sent: {', '.join(torn)}; send it again")
        values = _facts(draft, found) | found.facts | {key: value for key, value in said.items() if value}
        values |= {
            "name": name,
            "content": content.digest(draft / content.SUMS),
            "files": content.files_of(draft),
            "size": sum((draft / file).stat().st_size for file in found.files),
            "added": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "file": found.file,
            "preview": content.digest(pictures[0] / content.SUMS) if pictures else "",
        }
        entry = Entry.of(values, "what is said of it")
        text = entry.to_json()
        _mark(place, [entry.content, entry.preview, *_contents(home)])
        for workspace in (draft, *pictures):
            content.settle(workspace, place)
        write_whole({home: lambda temporary: temporary.write_text(text, encoding="utf-8")})
        sweep(place)
    return entry


def _facts(draft: Path, found: Source) -> dict[str, Any]:
    """What the files that are kept say of themselves; errors name the source."""
    try:
        return facts(draft / found.file)
    except AdapterError as error:
        raise AdapterError(str(error).replace(str(draft / found.file), str(found.path))) from error


def remove(name: str, report: Report = silent) -> None:
    """Take a name out of the library, and its content if no other name has the same. Raises `AdapterError`."""
    if not (folder() / ENTRIES).is_dir():
        get(name)
    with changing(report) as place:
        sweep(place)
        home = home_of(name, place)
        if home is None:
            raise unknown(name, place)
        _mark(place, _contents(home))
        home.unlink()
        content.flush(home.parent)
        sweep(place)


def sweep(place: Path) -> None:
    """Take away what nobody needs any more: drafts of killed processes, and marked contents that no entry has.

    Only for who may change the library. A content is marked before it is put in place or loses an entry; so whoever is
    killed in between leaves nothing that would not be known for what it is.
    """
    index.rebuild(place)
    left = sorted((place / UNFINISHED).iterdir())
    for mark in [path for path in left if path.suffix == MARK]:
        home = place / CONTENT / mark.stem
        if is_key(mark.stem) and os.path.lexists(home) and not index.refers(place, mark.stem):
            rest = place / UNFINISHED / uuid4().hex
            os.replace(home, rest)
            content.flush(home.parent)
            discard(rest)
        discard(mark)
    for path in [*left, *(place / ENTRIES).glob(".*.part")]:
        if path.suffix != MARK:
            discard(path)


def _mark(place: Path, contents: Iterable[str]) -> None:
    for key in {*contents} - {""}:
        (place / UNFINISHED / f"{key}{MARK}").touch()
    content.flush(place / UNFINISHED)


def _contents(home: Path) -> list[str]:
    """The contents that the entry in a file has, if it can be read."""
    try:
        entry = Entry.read(home)
    except AdapterError:
        return []
    return [entry.content, entry.preview]
