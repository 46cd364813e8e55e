"""Prepared rows on the disk: written once, whole or not at all, and read through a memory map ever after.

A store is a folder of `rows` in the cache (`VENEER_CACHE`, else the platform's own place), named by a hash of all that
it was made from. It may be deleted at any time: the next run makes it again.

    pieces       the bytes of every row, end to end
    table        a record of fixed width for every row: where its piece ends, the piece's CRC-32, numbers of the writer
    index.json   what the store was made from, how many bytes the pieces are, a checksum of this and of the table
"""

import json
import mmap
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from veneer.core.errors import AdapterError
from veneer.zoo.cache import building, cache_folder, settle

LAYOUT = 1  # raised when a store is written in another way, so that older ones are made anew
FLUSH = 4096  # records a write of the table

Columns = list[tuple[str, str]]  # names and numpy types of the writer's own numbers
Pieces = Iterable[tuple[bytes, tuple[float, ...]]]  # of each row: its piece, and its numbers


class Store(Sequence[bytes]):
    """The pieces of a store, each checked when it is read, and its table."""

    def __init__(self, folder: Path, made_of: Mapping[str, Any], columns: Columns, fresh: bool = False) -> None:
        """Raises `OSError` or `ValueError` where the folder is not such a store, whole. `fresh`: was made just now."""
        self.folder, self.made_of, self.fresh = folder, made_of, fresh
        self._pieces = _mapped(folder / "pieces")
        self.table = np.frombuffer(_mapped(folder / "table"), _record(columns))
        digest = sha256(self.table.data)
        self._ends, self._sums = self.table["end"], self.table["sum"]
        if json.loads((folder / "index.json").read_bytes()) != _index(made_of, len(self._pieces), digest.digest()):
            raise ValueError("the index is not that of the files")

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> bytes:  # type: ignore[override]
        index = range(len(self))[index]
        begin = int(self._ends[index - 1]) if index else 0
        return self._checked(self._pieces[begin : int(self._ends[index])], index)

    def __iter__(self) -> Iterator[bytes]:
        """All pieces in their order; through a file, for what was read through the map stays in memory."""
        with (self.folder / "pieces").open("rb") as pieces:
            for index, size in enumerate(self.sizes()):
                yield self._checked(pieces.read(size), index)

    def _checked(self, piece: bytes, index: int) -> bytes:
        if crc32(piece) != self._sums[index]:
            raise AdapterError(f"{self.folder} is damaged (row {index + 1}): delete it, and it will be made again")
        return piece

    def sizes(self) -> "np.ndarray[Any, np.dtype[np.int64]]":
        """The bytes of each piece."""
        return np.diff(self._ends, prepend=0)


def prepared(
    kind: str, made_of: Mapping[str, Any], columns: Columns, pieces: Callable[[], Pieces], say: Callable[[str], None]
) -> Store:
    """The store of all that `made_of` says, from the cache; where it is not there, or damaged, made of `pieces`.

    `made_of` is plain JSON and decides every byte of the store. Of two processes one makes it, and the other waits.
    """
    place = cache_folder() / "rows" / f"{kind}-{digest_of([LAYOUT, sys.byteorder, made_of])}"
    try:
        if (store := _opened(place, made_of, columns)) is not None:
            return store
        with building(place, "run that prepares the same rows", say) as workspace:
            if (store := _opened(place, made_of, columns)) is not None:  # somebody else was faster
                return store
            if place.exists():
                say(f"{place} is damaged and is made again")
            folder = workspace / place.name
            folder.mkdir()
            _write(folder, made_of, columns, pieces())
            return Store(settle(folder, place), made_of, columns, fresh=True)
    except OSError as error:
        raise AdapterError(
            f"prepared rows could not be kept in {place.parent}: {error}. VENEER_CACHE names another folder"
        ) from error


def digest_of(value: object) -> str:
    """A name for plain JSON: equal values have equal names."""
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def _write(folder: Path, made_of: Mapping[str, Any], columns: Columns, rows: Pieces) -> None:
    digest, end = sha256(), 0
    records: list[tuple[float, ...]] = []
    with (folder / "pieces").open("xb") as pieces, (folder / "table").open("xb") as table:

        def flush() -> None:
            part = np.array(records, _record(columns)).tobytes()
            digest.update(part)
            table.write(part)
            records.clear()

        for piece, numbers in rows:
            end += len(piece)
            pieces.write(piece)
            records.append((end, crc32(piece), *numbers))
            if len(records) == FLUSH:
                flush()
        flush()
    (folder / "index.json").write_text(json.dumps(_index(made_of, end, digest.digest()), indent=2))


def _opened(place: Path, made_of: Mapping[str, Any], columns: Columns) -> Store | None:
    try:
        return Store(place, made_of, columns)
    except (OSError, ValueError):
        return None


def _record(columns: Columns) -> "np.dtype[np.void]":
    return np.dtype([("end", "i8"), ("sum", "u4"), *columns])


def _index(made_of: Mapping[str, Any], size: int, table: bytes) -> dict[str, Any]:
    known = {"made of": made_of, "pieces": size}
    return {**known, "checksum": sha256(json.dumps(known, sort_keys=True).encode() + table).hexdigest()}


def _mapped(path: Path) -> mmap.mmap | bytes:
    """The bytes of a file; nothing is read until it is looked at."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
