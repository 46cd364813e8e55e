"""The entries, searched: an SQLite file that is a cache of their JSON files, and never believed against them.

Whoever opens it first takes in what changed since, by each file's time, size and number; a file that was written just
now is always read again, for such a time tells little. So nothing depends on when the index was last written, and
where it cannot be (a library that is read only, a damaged file) the same table is made in memory. It has no write-ahead
log: that needs shared memory, which network drives do not have, and a folder that readers may write.
"""

import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from veneer.core.errors import AdapterError
from veneer.library.entry import Entry
from veneer.library.place import ENTRIES, visible

INDEX = "index-1.sqlite"  # the number is raised when the table or what an entry says is another
_TABLE = (
    "CREATE TABLE IF NOT EXISTS entries (file TEXT PRIMARY KEY, stamp TEXT, content TEXT, preview TEXT, words TEXT, "
    "facts TEXT)"
)
_YOUNG = 3.0  # seconds; the coarsest clock of a file system ticks every two
_BUSY = 10.0  # seconds that another process may take to write the index


def search(place: Path, words: list[str]) -> list[Entry]:
    """The entries, by name, in whose name, tags, trigger words and base every one of the words is, in any capitals."""
    where = " AND ".join(["facts IS NOT NULL", *["instr(words, ?)"] * len(words)])
    with _opened(place) as index:
        rows = index.execute(f"SELECT facts FROM entries WHERE {where} ORDER BY file", [w.casefold() for w in words])
        return [Entry(**json.loads(row[0])) for row in rows]


def unreadable(place: Path) -> list[str]:
    """The files of entries that cannot be read."""
    with _opened(place) as index:
        return [row[0] for row in index.execute("SELECT file FROM entries WHERE facts IS NULL ORDER BY file")]


def refers(place: Path, content: str) -> bool:
    """Whether any entry needs a content, or may: one that cannot be read may need any.

    What the index denies is asked of the files themselves: a content goes when nothing refers to it.
    """
    with _opened(place) as index:
        found = "SELECT 1 FROM entries WHERE ? IN (content, preview) OR facts IS NULL LIMIT 1"
        if index.execute(found, [content]).fetchone():
            return True
    rows = (_row(place, file, "") for file in _stamps(place / ENTRIES))
    return any(row[-1] is None or content in row[2:4] for row in rows)


def is_sound(place: Path) -> bool:
    """Whether the index can be used, or need not be there."""
    if not (place / INDEX).exists():
        return True
    try:
        with closing(_connected(place / INDEX)) as index:
            _take_in(index, place)
            return index.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    except sqlite3.Error as error:
        return error.sqlite_errorname in ("SQLITE_BUSY", "SQLITE_READONLY")


def rebuild(place: Path) -> None:
    """Make the index anew, if it cannot be used."""
    if not is_sound(place):
        for path in place.glob(f"{INDEX}*"):
            path.unlink(missing_ok=True)
    with _opened(place):
        pass


@contextmanager
def _opened(place: Path) -> Iterator[sqlite3.Connection]:
    """The table as the entries are now."""
    with ExitStack() as stack:
        try:
            if not (place / ENTRIES).is_dir():
                raise sqlite3.OperationalError("there is no library to keep an index in")
            index = stack.enter_context(closing(_connected(place / INDEX)))
            _take_in(index, place)
        except sqlite3.Error:
            index = stack.enter_context(closing(_connected(":memory:")))
            _take_in(index, place)
        yield index


def _connected(path: Path | str) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=_BUSY)


def _take_in(index: sqlite3.Connection, place: Path) -> None:
    """Bring the table up to the files."""
    index.execute(_TABLE)
    stamps = _stamps(place / ENTRIES)
    known = dict(index.execute("SELECT file, stamp FROM entries"))
    read = (_row(place, file, stamp) for file, stamp in stamps.items() if not stamp or known.get(file) != stamp)
    had = "SELECT * FROM entries WHERE file = ?"
    fresh = [row for row in read if index.execute(had, row[:1]).fetchone() != row]
    with index:
        if gone := known.keys() - stamps.keys():
            index.executemany("DELETE FROM entries WHERE file = ?", [(file,) for file in gone])
        if fresh:
            index.executemany("INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, ?, ?)", fresh)


def _stamps(folder: Path) -> dict[str, str]:
    """What tells one state of each entry's file from another; "" where nothing does yet."""
    stamps, now = {}, time.time()
    try:
        for path in visible(folder, ".json"):
            with suppress(FileNotFoundError):
                state = path.stat()
                young = state.st_mtime > now - _YOUNG
                stamps[path.name] = "" if young else f"{state.st_mtime_ns} {state.st_size} {state.st_ino}"
    except OSError as error:
        raise AdapterError(f"the library's {folder} cannot be read: {error}") from error
    return stamps


def _row(place: Path, file: str, stamp: str) -> tuple[str | None, ...]:
    """What the table says of a file; of one that cannot be read, only that it is there."""
    try:
        entry = Entry.read(place / ENTRIES / file)
    except AdapterError:
        return file, stamp, None, None, None, None
    words = "\n".join([entry.name, entry.base, entry.family, *entry.tags, *entry.triggers]).casefold()
    return file, stamp, entry.content, entry.preview, words, json.dumps(asdict(entry))
