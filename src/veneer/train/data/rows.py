"""Files and hub datasets become rows; each row knows the place that it came from."""

import csv
import gzip
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b, file_digest
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeVar

import numpy as np

from veneer.core.errors import AdapterError, listed, nearest

T = TypeVar("T")
Values = dict[str, object]
Numbered = Iterable[tuple[int, Values]]
Table = np.ndarray[Any, np.dtype[Any]]
Draws = np.ndarray[Any, np.dtype[np.float64]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its columns, and where it is (`train.jsonl, line 17`)."""

    values: Values
    place: str


@dataclass(frozen=True)
class Rows:
    """The rows of one source, read anew from its beginning each time that they are asked for."""

    source: str  # the file or dataset
    unit: str  # what `numbered` counts: line, item or row
    numbered: Callable[[], Numbered]
    content: Callable[[], Values]  # what decides the rows, as plain JSON: a hash of the file

    def place(self, number: int) -> str:
        """Where a row is, for messages."""
        return f"{self.source}, {self.unit} {number}"

    def __iter__(self) -> Iterator[Row]:
        return (Row(values, self.place(number)) for number, values in self.numbered())


def read_rows(path: str, split: str = "train", subset: str | None = None) -> Rows:
    """The rows of a file, read as its ending says, or of the hub dataset `owner/name` (its `subset` and `split`).

    A file that is not there is an error at once; what is wrong inside is one when the rows are gone through.
    """
    file = Path(path)
    ending = Path(path.removesuffix(".gz")).suffix.lower()
    if file.is_dir():
        inside = sorted(entry.name for entry in file.iterdir() if entry.is_file())
        raise AdapterError(f"{path} is a folder, expected a file. Name one of its files: {listed(inside)}")
    if not file.exists() and ending not in READERS and HUB_NAME.fullmatch(path):
        return _hub_rows(path, split, subset)
    if not file.exists():
        folder = file.parent.iterdir() if file.parent.is_dir() else ()
        hint = nearest(file.name, (entry.name for entry in folder))
        raise AdapterError(f"{path}: there is no such file{hint}")
    if ending not in READERS:
        raise AdapterError(f"{path}: cannot read {ending or 'a file without an ending'}; expected {ENDINGS}")
    unit, reader = READERS[ending]
    return Rows(file.name, unit, partial(_checked, path, partial(reader, file)), partial(_hashed, file, ending))


def _checked(path: str, read: Callable[[], Numbered]) -> Numbered:
    """The rows that `read` gives, at least one."""
    number = None
    try:
        for number, values in read():
            yield number, values
    except (OSError, EOFError) as error:
        raise AdapterError(f"{path}: cannot be read: {error}") from error
    if number is None:
        raise AdapterError(f"{path}: expected rows, found none; the file or split is empty")


def _hashed(file: Path, ending: str) -> Values:
    """The file's bytes as a hash, and how they are read."""
    try:
        with file.open("rb") as stream:
            digest = file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise AdapterError(f"{file}: cannot be read: {error}") from error
    return {"sha256": digest, "ending": ending, "packed": file.suffix == ".gz"}


def held_out(draws: Draws, share: float) -> Flags:
    """Which rows are held out, by `draw` of their keys: about `share`, and rows of one key stay together.

    A hash of key and seed decides, so the order of the rows does not matter, and more rows move none of the
    others. Something is always learned from; with two keys or more and a share, something is held out.
    """
    if not share or not len(draws):
        return np.zeros(len(draws), bool)
    held = draws < share
    if not held.any():
        held = draws == draws.min()
    return held & (draws != draws.max())


def draw(key: str, seed: int) -> float:
    """A number in [0, 1) that the key and the seed decide."""
    digest = blake2b(key.encode("utf-8", "surrogatepass"), digest_size=6, salt=str(seed).encode()[-16:])
    return int.from_bytes(digest.digest()) / 2**48


def column(wanted: str | None, usual: Sequence[str], columns: Sequence[str], key: str, source: str) -> str:
    """The column that the recipe names, or the first of the usual ones. Raises `AdapterError` where it is not there."""
    found = wanted if wanted is not None else next((name for name in usual if name in columns), None)
    if found is not None and found in columns:
        return found
    expected = f"{key}={wanted!r}{nearest(wanted, columns)}" if wanted is not None else f"{' or '.join(usual)}"
    raise AdapterError(f"{source}: expected the column {expected}, found {listed(columns, 20)}; say data.{key}=…")


def evenly(items: Sequence[T], most: int) -> list[T]:
    """At most so many of the items, evenly spread."""
    count = min(most, len(items))
    return [items[i * len(items) // count] for i in range(count)]


@contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked when its name ends in .gz."""
    with file.open("rb") as plain:
        if file.suffix != ".gz":
            yield plain
        else:
            with gzip.open(plain) as unpacked:
                yield unpacked  # type: ignore[misc]


def _lines(file: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, each with its end; bytes that are not UTF-8 are named with their line."""
    with _opened(file) as stream:
        for number, line in enumerate(stream, 1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise AdapterError(
                    f"{file.name}, line {number}: expected UTF-8, found the byte 0x{error.object[error.start]:02x}; "
                    "save the file as UTF-8"
                ) from error


def _json_lines(file: Path) -> Numbered:
    for number, line in enumerate(_lines(file), 1):
        if not line.isspace():
            value = _parsed(line, file, number, hint="a file that is one JSON value is named .json")
            yield number, _object(value, f"{file.name}, line {number}")


def _json(file: Path) -> Numbered:
    value = _parsed("".join(_lines(file)), file, 1, hint="a file with one object a line is named .jsonl")
    if isinstance(value, dict):
        lists = [inner for inner in value.values() if isinstance(inner, list)]
        if len(lists) != 1:
            raise AdapterError(
                f"{file.name}: expected a list of objects, or an object that holds one list; found an object "
                f"with {len(lists)} lists and the keys {listed(value)}"
            )
        value = lists[0]
    if not isinstance(value, list):
        raise AdapterError(f"{file.name}: expected a list of objects, found {type(value).__name__}")
    for number, item in enumerate(value, 1):
        yield number, _object(item, f"{file.name}, item {number}")


def _parsed(text: str, file: Path, first_line: int, hint: str) -> Any:
    """The JSON value of `text`; a fault is named with its line in the file, when `text` begins at `first_line`."""
    try:
        return json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        place = f"{file.name}, line {first_line + error.lineno - 1}"
        raise AdapterError(f"{place}: not valid JSON: {error.msg} at column {error.colno} ({hint})") from error
    except RecursionError as error:
        raise AdapterError(f"{file.name}, line {first_line}: the JSON is nested too deeply") from error


def _object(value: object, place: str) -> Values:
    if not isinstance(value, dict):
        raise AdapterError(f'{place}: expected an object like {{"text": …}}, found {type(value).__name__}')
    return value


def _table(file: Path, delimiter: str) -> Numbered:
    limit = csv.field_size_limit(2**31 - 1)  # Python's own limit, 131,072 characters, is less than a long text
    try:
        yield from _records(file, delimiter)
    finally:
        csv.field_size_limit(limit)


def _records(file: Path, delimiter: str) -> Numbered:
    """Each record under the header's names, with the line that it begins on (a quoted field may hold lines)."""
    reader = csv.reader(_lines(file), delimiter=delimiter, strict=True)
    header: list[str] = []
    begins = 1
    try:
        for fields in reader:
            place = f"{file.name}, line {begins}"
            if fields and not header:
                header = fields
                if "" in header or len(set(header)) < len(header):
                    raise AdapterError(f"{place}: expected a header of different names, found {listed(header)}")
            elif fields:
                if len(fields) != len(header):
                    raise AdapterError(
                        f"{place}: expected {len(header)} fields as in the header ({listed(header)}), found "
                        f"{len(fields)}; a field that holds a {delimiter!r} or a quote is put in quotes"
                    )
                yield begins, dict(zip(header, fields, strict=True))
            begins = reader.line_num + 1
    except csv.Error as error:
        raise AdapterError(f"{file.name}, line {begins}: not a valid table: {error}") from error


def _parquet(file: Path) -> Numbered:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        _needs("reading a Parquet file", error)
    try:
        with ParquetFile(file) as table:
            batches = (batch.to_pylist() for batch in table.iter_batches())
            yield from enumerate((values for batch in batches for values in batch), 1)
    except ArrowException as error:
        raise AdapterError(f"{file.name}: cannot be read as Parquet: {error}") from error


def _hub_rows(name: str, split: str, subset: str | None) -> Rows:
    try:
        import datasets
    except ImportError as error:
        _needs("a dataset of the hub", error)
    try:
        table = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # the library raises a dozen unrelated kinds; to a reader they are one
        reason = str(error).strip() or type(error).__name__
        raise AdapterError(
            f"{name}: there is no such file, and the split {split!r} of a hub dataset of that name could not "
            f"be loaded: {reason}"
        ) from error
    return Rows(
        f"{name} ({subset}, {split})" if subset else f"{name} ({split})",
        "row",
        partial(_checked, name, partial(enumerate, table, 1)),
        lambda: {"dataset": name, "subset": subset, "split": split, "fingerprint": table._fingerprint},
    )


def _needs(what: str, error: ImportError) -> NoReturn:
    raise AdapterError(f"{what} needs: pip install 'veneer[train]'") from error


# ending: (what its rows are counted in, how it is read)
READERS: dict[str, tuple[str, Callable[[Path], Numbered]]] = {
    ".jsonl": ("line", _json_lines),
    ".ndjson": ("line", _json_lines),
    ".json": ("item", _json),
    ".csv": ("line", partial(_table, delimiter=",")),
    ".tsv": ("line", partial(_table, delimiter="\t")),
    ".parquet": ("row", _parquet),
}
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
ENDINGS = f"{', '.join(READERS)} (all but the last also as .gz)"
