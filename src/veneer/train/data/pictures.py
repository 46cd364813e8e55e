"""Folders, lists and datasets of pictures become `Pictures`; nothing of a picture is read before it is asked for."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from veneer.core.errors import AdapterError, listed, nearest
from veneer.train.data.reading import Raw
from veneer.train.data.rows import ENDINGS, HUB_NAME, READERS, Table, column, draw, held_out, read_rows
from veneer.train.data.settings import RowsData
from veneer.train.data.tables import table_of

LISTS = tuple(f"metadata{ending}" for ending in (".jsonl", ".csv", ".parquet"))  # in the folder of their pictures
SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}
IMAGES = ("image", "img", "picture", "file_name", "file", "path", "filename")
LOOKED_INTO = 256  # pictures all of whose bytes are in the digest
END = 256  # of each picture's bytes, so many of the last are: the checksums of a PNG are there


@dataclass(frozen=True)
class Said:
    """Where what is said of a picture is: its column, or the folder of its masks, or the folder that it lies in."""

    columns: Sequence[str]  # the usual names
    key: str  # of the recipe's `data`
    asked: str | None  # the column that the recipe names
    masks: str | None = None
    of_folder: bool = False  # where it is in no column
    is_picture: bool = False
    beside: Callable[[Path, Sequence[str]], Sequence[Any]] | None = None  # of a folder's pictures, in no list
    optional: bool = False  # nothing may be said of a picture: None


@dataclass(frozen=True)
class Pictures:
    """Pictures, and what is said of each: its label, or its mask."""

    source: str
    name: Callable[[int], str]  # what it is called in the source
    picture: Callable[[int], Raw]
    said: Callable[[int], Any]
    rows: Table  # which of the source
    content: Callable[[], str]  # a digest of what decides the pictures

    def __len__(self) -> int:
        return len(self.rows)

    def place(self, index: int) -> str:
        """Where a picture is, for messages."""
        return f"{self.source}, {self.name(int(self.rows[index]))}"

    def raw(self, index: int) -> Raw:
        return self.picture(int(self.rows[index]))

    def truth(self, index: int) -> Any:
        """The label or the mask of a picture."""
        return self.said(int(self.rows[index]))

    def digest(self) -> str:
        """A name for the pictures, all of them in their order."""
        return sha256(f"{self.content()} {self.rows.tobytes().hex()}".encode()).hexdigest()


def read_sides(data: RowsData, seed: int, said: Callable[[bool], Said]) -> tuple[Pictures, Pictures]:
    """(learned from, held out); `said` tells of each of the two where what is said of its pictures is."""
    found = read_pictures(data.path, data.split, data, said(False))
    if data.eval_path or data.eval_split:
        own = said(data.eval_path is not None)
        return found, read_pictures(data.eval_path or data.path, data.eval_split or data.split, data, own)
    draws = np.array([draw(found.name(row), seed) for row in found.rows] if data.eval_share else [1.0] * len(found))
    held = held_out(draws, data.eval_share)
    return replace(found, rows=np.flatnonzero(~held)), replace(found, rows=np.flatnonzero(held))


def read_pictures(path: str, split: str, data: Any, said: Said) -> Pictures:
    """The pictures of a folder, of a list of files, of a Parquet file or of a hub dataset."""
    place = Path(path)
    ending = place.suffix.lower()
    if place.is_dir():
        folder = _of_split(place, split)
        if said.masks and folder != place and (Path(said.masks) / split).is_dir():
            said = replace(said, masks=str(Path(said.masks) / split))
        return _folder(folder, split, data, said)
    if ending == ".parquet" or (not place.exists() and ending not in READERS and HUB_NAME.fullmatch(path)):
        return _table(path, split, data, said)
    if not place.exists():
        near = nearest(place.name, (own.name for own in place.parent.iterdir())) if place.parent.is_dir() else ""
        raise AdapterError(f"{path}: there is no such file or folder{near}")
    if ending not in READERS:
        raise AdapterError(f"{path}: cannot read {ending or 'a file without an ending'}; expected a folder, {ENDINGS}")
    return _list(place, data, said)


def _of_split(folder: Path, split: str) -> Path:
    """The folder of a split, where the folder holds splits."""
    there = {own.name for own in folder.iterdir() if own.is_dir() and not own.name.startswith(".")}
    if split in there and (there <= {*SPLITS, split}):
        return folder / split
    if there and there <= SPLITS:
        raise AdapterError(f"{folder} has no folder {split!r}: found {listed(sorted(there))}; say data.split=…")
    return folder


def _folder(folder: Path, split: str, data: Any, said: Said) -> Pictures:
    if own := next((folder / name for name in LISTS if (folder / name).is_file()), None):
        return _table(str(own), "train", data, said) if own.suffix == ".parquet" else _list(own, data, said)
    names = sorted(inside(folder))
    if not names and next(folder.rglob("*.parquet"), None):  # as datasets of the hub lie on a disk
        return _table(str(folder), split, data, said)
    if not names:
        raise AdapterError(f"{folder}: expected pictures, or {listed(LISTS, say=str)} that names them; found none")
    if said.masks:
        masks = _masks(folder, names, Path(said.masks))
        return _files(folder, names, [str(Path(said.masks) / masks[name]) for name in names], masks=True)
    if said.beside:
        if said.asked is not None:
            raise AdapterError(
                f"{folder}: data.{said.key}={said.asked} means a column, and a folder has none: leave it out where "
                f"texts lie beside the pictures, or write {LISTS[0]} with file_name and {said.asked}"
            )
        return _files(folder, names, said.beside(folder, names))
    if not said.of_folder:
        raise AdapterError(
            f"{folder}: where are the masks of its pictures? say data.{said.key}s=FOLDER, and "
            f"data.eval_{said.key}s=FOLDER of those in data.eval_path"
        )
    if alone := [name for name in names if "/" not in name]:
        raise AdapterError(
            f"{folder}: expected a folder for each class; {listed(alone)} lie in none. Move them into folders, or "
            f"write {LISTS[0]} with file_name and label"
        )
    return _files(folder, names, [name.partition("/")[0] for name in names], masks=False)


def inside(folder: Path) -> Iterable[str]:
    """The pictures in a folder and its folders, by their endings; hidden files are none."""
    endings = Image.registered_extensions()
    for path, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        own = Path(path).relative_to(folder)
        for name in files:
            if not name.startswith(".") and Path(name).suffix.lower() in endings:
                yield (own / name).as_posix()


def _masks(folder: Path, names: Sequence[str], masks: Path) -> dict[str, str]:
    """The mask of each picture: that of the same name, whatever its ending."""
    if not masks.is_dir():
        raise AdapterError(f"data.masks={masks}: there is no such folder")
    there = {str(Path(name).with_suffix("")): name for name in inside(masks)}
    found = {name: there.get(str(Path(name).with_suffix("")), "") for name in names}
    if lone := [name for name, mask in found.items() if not mask]:
        raise AdapterError(
            f"{len(lone):,} pictures of {folder} have no mask of their name in {masks}: {listed(lone)}; it has "
            f"{listed(sorted(there.values()), 3)}"
        )
    return found


def _list(file: Path, data: Any, said: Said) -> Pictures:
    """Pictures that a file names, as they lie beside it."""
    rows = list(read_rows(str(file)))
    columns = list(dict.fromkeys(name for row in rows[:100] for name in row.values))
    image = column(data.image, ("file_name", *IMAGES), columns, "image", file.name)
    own = _said_in(columns, said, file.name)
    problems, names, labels = [], [], []
    for row in rows:
        name, label = row.values.get(image), row.values.get(own) if own else None
        if not isinstance(name, str) or not (file.parent / name).is_file():
            problems.append(f"{row.place}: {image} is {name!r:.80}, and no file beside the list")
        if said.is_picture and (not isinstance(label, str) or not (file.parent / label).is_file()):
            problems.append(f"{row.place}: {own} is {label!r:.80}, and no file beside the list")
        elif (label is None or label == "") and not said.optional:
            problems.append(f"{row.place}: {own} is missing")
        names.append(str(name))
        labels.append(str(file.parent / str(label)) if said.is_picture else label)
    if problems:
        raise AdapterError(listed(problems, say=str, between="; "))
    return _files(file.parent, names, labels, masks=said.is_picture)


def _said_in(columns: Sequence[str], said: Said, source: str) -> str | None:
    """The column of what is said; None where nothing needs to be said, and no column is asked for or has its name."""
    if said.optional and said.asked is None and not set(said.columns) & set(columns):
        return None
    return column(said.asked, said.columns, columns, said.key, source)


def _files(folder: Path, names: Sequence[str], said: Sequence[Any], masks: bool = False) -> Pictures:
    def content() -> str:
        digest = sha256()
        for number, (name, label) in enumerate(zip(names, said, strict=True)):
            digest.update(f"{name} {'' if masks else repr(label)}\n".encode("utf-8", "surrogatepass"))
            whole = number % max(1, len(names) // LOOKED_INTO) == 0
            for path in (folder / name, *([Path(label)] if masks else [])):
                digest.update(_looked_into(path, whole))
        return digest.hexdigest()

    rows = np.arange(len(names))
    return Pictures(str(folder), names.__getitem__, lambda row: folder / names[row], said.__getitem__, rows, content)


def _looked_into(path: Path, whole: bool) -> bytes:
    """The size of a file with all of its bytes, or with the last of them."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0 if whole else max(0, size - END))
        return b"%d %s" % (size, file.read())


def _table(path: str, split: str, data: Any, said: Said) -> Pictures:
    """Pictures in the rows of a Parquet file or a hub dataset, which stay on the disk."""
    table = table_of(path, split, data.subset)
    image = column(data.image, table.pictures or IMAGES, table.columns, "image", path)
    own = _said_in(table.columns, said, path)
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    rows = np.arange(len(table))
    others = table.raw(own, folder) if own and said.is_picture else table.label(own, said.optional)

    def content() -> str:
        return f"{table.content()} {image} {own}"

    return Pictures(table.source, lambda row: f"row {row + 1}", table.raw(image, folder), others, rows, content)


def counted(labels: Iterable[str]) -> Mapping[str, int]:
    """How often each label occurs."""
    counts: dict[str, int] = {}
    for label in labels:
        counts[label] = counts.get(label, 0) + 1
    return counts
