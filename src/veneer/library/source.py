"""What is to be added: a file, an adapter's folder, or a run, with all that lies beside it and says something."""

import json
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from veneer.core.errors import AdapterError, listed, named
from veneer.files.folder import CONFIG, WEIGHTS
from veneer.files.stored import adapter_file
from veneer.library.content import SUMS
from veneer.library.entry import Entry, is_plain
from veneer.library.facts import card, loaded
from veneer.library.place import visible
from veneer.safe.stored import existing, parsed, read_bytes

CARD, SHEET, RECIPE, RUN_ADAPTER = "README.md", "veneer-library.json", "recipe.yaml", "adapter"
USAGE = "veneer.json"  # how an adapter is used
ALONE = "adapter.safetensors"  # what a file is called where it is kept: equal files are equal contents
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
_BEGINNINGS = {rb"\x89PNG\r\n\x1a\n": ".png", rb"\xff\xd8\xff": ".jpg", rb"(?s)RIFF....WEBP": ".webp"}
_LARGEST = 32 << 20  # bytes of a picture
_SAYING_NOTHING = {"adapter", "adapter_model", "pytorch_lora_weights", "default", "model"}
_LONGEST = 1000  # characters of a sample


@dataclass
class Source:
    """The files to keep under the names that they get, and what is known of them from around them."""

    path: Path
    name: str
    files: dict[str, Path]
    file: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    preview: dict[str, Path] = field(default_factory=dict)  # a picture, under the name that it gets
    left: list[str] = field(default_factory=list)  # what lies beside it and is not the adapter
    sums: dict[str, str] = field(default_factory=dict)  # the sha256 of each file, where a library sent it


def source(path: Path) -> Source:
    """What `path` leads to. Raises `AdapterError` for what is none of an adapter's file, its folder, or a run."""
    try:
        if not path.is_file() and not path.is_dir():
            raise AdapterError(f"{path} is neither a file nor a folder")
        if (path / SHEET).is_file():
            return _sent(path)
        if (sent := sorted(path.glob(f"*/{SHEET}"))) and not (path / CONFIG).is_file():
            raise AdapterError(
                f"{path} holds what a library sent, name one: {listed((s.parent for s in sent), say=str)}"
            )
        place = adapter_file(path)
        if place.name == WEIGHTS and (place.parent / CONFIG).is_file():
            place = place.parent
        found = _folder(place) if place.is_dir() else _alone(place, place.parent / CARD if place != path else None)
        return _with_run(found, path) if path / RUN_ADAPTER in (place, place.parent) else found
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error


def sheet(folder: Path) -> Entry:
    """The entry that a library sent with an adapter. Raises `AdapterError`."""
    return Entry.of(parsed(read_bytes(folder / SHEET), str(folder / SHEET)), str(folder / SHEET))


def called(path: PurePath) -> str:
    """What a file or folder is called, or the folder that it is in where its name says nothing."""
    name = path.stem if path.suffix == ".safetensors" else path.name
    return called(path.parent) if name in _SAYING_NOTHING and path.parent.name else name


def picture(path: Path) -> dict[str, Path]:
    """A picture's file, under the name that it is kept by. Raises `AdapterError` for what is none."""
    try:
        with path.open("rb") as file:
            first, size = file.read(16), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise AdapterError(f"preview {path} cannot be read: {error}") from error
    ending = next((ending for beginning, ending in _BEGINNINGS.items() if re.match(beginning, first)), None)
    if ending is None or size > _LARGEST:
        raise AdapterError(f"preview {path}: expected a PNG, JPEG or WebP picture of at most {_LARGEST >> 20} MB")
    return {f"preview{ending}": path}


def _alone(path: Path, about: Path | None) -> Source:
    """One file; `about` is the card of the folder that was named in its place."""
    if path.suffix in _PICKLES:
        raise AdapterError(
            f"{path} is a pickle, which could run code and is never kept: `veneer convert {path} OUT --to peft` makes "
            "an adapter of it that is none"
        )
    if path.suffix != ".safetensors":
        raise AdapterError(f"{path} is no adapter: expected a .safetensors file, an adapter's folder, or a run's")
    beside = [path.with_name(f"{path.stem}{more}{ending}") for more in ("", ".preview") for ending in PICTURES]
    facts = (card(about) if about else {}) | {"origin": {"path": _said(path)}}
    usage = path.with_name(USAGE)
    files = {ALONE: path} | ({USAGE: usage} if usage.is_file() else {})
    return Source(path, called(_whole(path)), files, ALONE, facts, _first_picture(beside))


def _folder(path: Path) -> Source:
    """A PEFT folder: its plain files, without what a trainer left of its own."""
    existing(path, WEIGHTS)
    files = {file.name: file for file in visible(path) if file.is_file() and is_plain(file.name)}
    files = {name: file for name, file in files.items() if file.suffix not in _PICKLES and name.upper() != SUMS}
    left = [named(file.name) for file in visible(path) if file.name not in files]
    facts = card(path / CARD) | {"origin": {"path": _said(path)}}
    return Source(path, called(_whole(path)), files, "", facts, left=left)


def _sent(path: Path) -> Source:
    """What another library sent: the files of its entry, to be held to their sha256."""
    entry = sheet(path)
    names = {name: ALONE if name == entry.file else name for name in entry.files}
    if missing := [name for name in names if not (path / name).is_file()]:
        raise AdapterError(f"{path} is not whole: missing {listed(missing, say=str)}")
    said = ("base", "licence", "tags", "triggers", "note", "sample")
    facts = {key: value for key in said if (value := getattr(entry, key))} | {"origin": {"path": _said(path)}}
    files, sums = {names[name]: path / name for name in names}, {names[name]: key for name, key in entry.files.items()}
    preview = _first_picture(path / f"preview{ending}" for ending in PICTURES)
    return Source(path, entry.name, files, ALONE if entry.file else "", facts, preview, sums=sums)


def _with_run(run: Source, path: Path) -> Source:
    """The adapter of a run, with the base as its recipe calls it, and what it answered or drew."""
    run.facts["origin"] = {"run": _said(path)}
    with suppress(AdapterError):
        recipe = loaded(read_bytes(path / RECIPE).decode("utf-8", "replace"))
        if isinstance(base := recipe.get("base"), str):
            run.facts["base"] = base
    run.preview = _first_picture(reversed(visible(path / "samples")))
    with suppress(AdapterError, ValueError, KeyError, TypeError, RecursionError):
        first = json.loads(read_bytes(path / "samples" / "answers.jsonl").splitlines()[0])
        run.facts["sample"] = f"{first['prompt']}\n\n{first['adapted']}".strip()[:_LONGEST]
    return run


def _first_picture(paths: Iterable[Path]) -> dict[str, Path]:
    """The first of the paths that leads to a picture."""
    for path in paths:
        if path.suffix in PICTURES and path.is_file():
            with suppress(AdapterError):
                return picture(path)
    return {}


def _whole(path: Path) -> Path:
    """The path from the root, with no `..` in it."""
    return Path(os.path.abspath(path))


def _said(path: Path) -> str:
    """The whole path, as text that every file can hold."""
    return os.fsencode(_whole(path)).decode("utf-8", "replace")
