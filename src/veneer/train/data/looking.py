"""Every picture is read once, whole: what is broken is named before anything is learned, and its size is known."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, __version__

from veneer.core.errors import AdapterError, listed
from veneer.train.data.pictures import Pictures
from veneer.train.data.reading import Raw, read_picture
from veneer.train.data.rows import Table
from veneer.train.store import Pieces, prepared
from veneer.train.task import Reporter

COLUMNS = [("width", "i4"), ("height", "i4"), ("moves", "i1")]
PAGES = {"MPO"}  # formats whose further pictures are views of the same
Look = tuple[bytes, tuple[float, ...]]


@dataclass(frozen=True)
class Looks:
    """What is known of each picture of a source, by its row there."""

    sizes: Table  # (rows, 2): width and height, upright; 0 for rows that were not looked at
    moves: Table  # (rows,): whether it has several pictures, of which the first is seen
    contents: dict[int, str]  # a digest of its bytes


def look(pictures: Pictures, reporter: Reporter) -> Looks:
    """Read every picture, or what is known of them from the last time, where none of them has changed.

    Raises `AdapterError` that names all that cannot be read.
    """
    rows = np.unique(pictures.rows).tolist()
    if not rows:
        return Looks(np.zeros((0, 2), np.int64), np.zeros(0, bool), {})
    made_of = {"pictures": _listing(pictures, rows), "rows": len(rows), "pillow": __version__}
    store = prepared("looks", made_of, COLUMNS, lambda: _read(pictures, rows, reporter), reporter.say)
    sizes, moves = np.zeros((rows[-1] + 1, 2), np.int64), np.zeros(rows[-1] + 1, bool)
    sizes[rows] = np.stack([store.table["width"], store.table["height"]], axis=1)
    moves[rows] = store.table["moves"]
    return Looks(sizes, moves, dict(zip(rows, (piece.hex() for piece in store), strict=True)))


def _listing(pictures: Pictures, rows: list[int]) -> str:
    """What tells whether a picture has changed, without reading it: of files their names, sizes and times."""
    if isinstance(pictures.picture(rows[0]), bytes):
        return f"{pictures.content()} {sha256(repr(rows).encode()).hexdigest()}"
    digest = sha256()
    for row in rows:
        raw = pictures.picture(row)
        told = sha256(raw).hexdigest() if isinstance(raw, bytes) else f"{raw} {_stamp(raw)}"
        digest.update(f"{row} {told}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _stamp(path: str | Path) -> str:
    try:
        now = os.stat(path)
    except OSError:  # which is told of when it is read
        return "gone"
    return f"{now.st_size} {now.st_mtime_ns}"


def _read(pictures: Pictures, rows: list[int], reporter: Reporter) -> Pieces:
    """The looks of the rows, once all could be read."""
    found: list[Look] = []
    problems: list[str] = []
    for done, seen in enumerate(_seen(pictures, rows), 1):
        if isinstance(seen, str):
            problems.append(seen)
        else:
            found.append(seen)
        if done % 64 == 0 or done == len(rows):
            reporter.progress(f"{pictures.source}: reading pictures", done, len(rows))
    if problems:
        raise AdapterError(
            f"{len(problems):,} of {len(rows):,} pictures cannot be used: {listed(problems, 20, str, '; ')}. Mend or "
            "remove them"
        )
    yield from found


def _seen(pictures: Pictures, rows: list[int]) -> Iterator[Look | str]:
    def see(row: int) -> Look | str:
        try:
            return _look(pictures.picture(row), f"{pictures.source}, {pictures.name(row)}")
        except AdapterError as error:
            return str(error)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        yield from threads.map(see, rows)


def _look(raw: Raw, place: str) -> Look:
    try:
        content = raw if isinstance(raw, bytes) else Path(raw).read_bytes()
    except OSError as error:
        raise AdapterError(f"{place}: cannot be read: {error.strerror or error}") from error
    picture = read_picture(content, place)
    with Image.open(BytesIO(content)) as opened:
        moves = bool(getattr(opened, "is_animated", False)) and opened.format not in PAGES
    return sha256(content).digest(), (*picture.size, moves)
