"""Adapters from one library to another: through a folder (a stick, a share), or a repository of the Hugging Face hub.

What is sent is an ordinary adapter that any program reads, and beside it `veneer-library.json`, its entry: names of
files with their sha256, trigger words and the rest. Where it lay on the machine that sends it is not told.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from uuid import uuid4

from veneer.core.errors import AdapterError, listed, named
from veneer.library import content, hub
from veneer.library.adding import keep
from veneer.library.entry import Entry, checked_name, name_of
from veneer.library.facts import card
from veneer.library.place import Report, no_such, silent
from veneer.library.shelf import get, path_of, preview_of
from veneer.library.source import ALONE, CARD, PICTURES, SHEET, called, sheet, source

_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_INSIDE = re.compile(rf"({_REPOSITORY.pattern})(?:/(.+))?")


def push(name: str, to: str, force: bool = False, report: Report = silent) -> str:
    """Send an adapter to a folder, where it gets one of its name, or to a repository (`owner/name`); give its place.

    A repository that is not there yet is made, for your own eyes. What is there already is replaced with `force` only.
    Raises `AdapterError`.
    """
    entry = get(name)
    if faults := content.faults(path_of(replace(entry, file=""))):
        raise AdapterError(f"{entry.name!r} is damaged: {'; '.join(faults)}; see `veneer library verify`")
    if not _is_path(to) and _REPOSITORY.fullmatch(to) and not Path(to).parent.is_dir():
        return hub.upload(to, _parcel(entry, to), f"Add {entry.name}", force, report)
    folder = Path(os.path.expanduser(to))
    if not _is_path(to) and "/" not in to:
        raise AdapterError(f"{to!r} is neither a folder nor a repository (owner/name); a new folder would be ./{to}")
    try:
        return str(_to_folder(_parcel(entry, "THIS_FOLDER"), folder / entry.name, force))
    except OSError as error:
        raise AdapterError(f"{folder / entry.name} cannot be written: {error}") from error


def pull(start: str, name: str | None = None, force: bool = False, report: Report = silent) -> Entry:
    """Take an adapter from a folder, a file, or a repository: `owner/name`, or `owner/name/path/in/it`.

    It keeps the name that it has there, unless another is given. Raises `AdapterError`, and then nothing has changed.
    """
    path = Path(os.path.expanduser(start))
    match = _INSIDE.fullmatch(start)
    if _is_path(start) or not match:
        if not os.path.exists(path):
            raise no_such(path)
        found = source(path)
    else:
        place, fetched, revision = hub.download(match[1], match[2] or "", report)
        found = source(place)
        found.files = {name: file for name, file in found.files.items() if file in fetched}
        for file in fetched:
            found.facts = (card(file) if file.name == CARD else {}) | found.facts
        found.facts["origin"] = {"repository": start, "revision": revision}
        if not found.sums:  # its folder in the cache has no name of its own
            found.name = called(PurePosixPath(start))
    return keep(found, checked_name(name) if name is not None else name_of(found.name), {}, force, report)


def _is_path(text: str) -> bool:
    """Whether this is there, or is written as only a path is."""
    return (
        os.path.exists(os.path.expanduser(text)) or os.path.isabs(text) or text.startswith((".", "~")) or "\\" in text
    )


def _parcel(entry: Entry, to: str) -> dict[str, Path | bytes]:
    """The files to send, by their names there: the adapter, its entry, a card, and its picture."""
    home, preview = path_of(replace(entry, file="")), preview_of(entry)
    names = {file: f"{entry.name}.safetensors" if file == ALONE else file for file in entry.files}
    files: dict[str, Path | bytes] = {names[file]: home / file for file in entry.files}
    if preview:
        files[preview.name] = preview
    sent = replace(
        entry,
        files={names[file]: key for file, key in entry.files.items()},
        file=names.get(entry.file, ""),
        origin={key: text for key, text in entry.origin.items() if key in ("repository", "revision")},
    )
    files.setdefault(CARD, _card(entry, to, preview).encode())
    return files | {SHEET: sent.to_json().encode()}


def _to_folder(files: Mapping[str, Path | bytes], target: Path, force: bool) -> Path:
    """Write the files to a folder of their own, whole or not at all."""
    if os.path.lexists(target) and not force:
        raise AdapterError(f"{target} exists already; nothing was written (--force replaces it)")
    if strange := _strange(target):
        raise AdapterError(f"{target} holds what no library sent, and is not replaced: {listed(strange, say=named)}")
    target.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid4().hex
    workspace, old = (target.with_name(f".{target.name}.{mark}.{what}") for what in ("part", "old"))
    workspace.mkdir()
    try:
        for name, held in files.items():
            if isinstance(held, bytes):
                content.write(workspace / name, held)
            else:
                content.copy(held, workspace / name)
        content.flush(workspace)
        if target.exists():
            os.replace(target, old)
        os.replace(workspace, target)
        content.flush(target.parent)
    finally:
        if old.exists() and not target.exists():
            os.replace(old, target)
        for rest in (workspace, old):
            shutil.rmtree(rest, ignore_errors=True)
    return target


def _strange(target: Path) -> list[str]:
    """What is in a folder and is no part of what a library sent there."""
    if not os.path.lexists(target):
        return []
    there = {path.name for path in target.iterdir()}
    sent = (
        {SHEET, CARD, *sheet(target).files, *(f"preview{ending}" for ending in PICTURES)} if SHEET in there else set()
    )
    return sorted(there - sent)


def _card(entry: Entry, to: str, preview: Path | None) -> str:
    """README.md: what it is, and how it is used."""
    said = {"base_model": entry.base if _REPOSITORY.fullmatch(entry.base) else "", "license": entry.licence}
    lines = [f"{key}: {json.dumps(value)}" for key, value in said.items() if value]
    lines += [f"instance_prompt: {json.dumps(', '.join(entry.triggers))}"] if entry.triggers else []
    rows = {
        "base": " ".join(filter(None, [entry.base, f"({entry.family})" if entry.family else ""])),
        "method": " ".join(filter(None, [entry.method, f"({entry.format})"])),
        "trigger words": ", ".join(entry.triggers),
        "tags": ", ".join(entry.tags),
        "licence": entry.licence,
    }
    table = "".join(f"| {key} | {_cell(value)} |\n" for key, value in rows.items() if value)
    shown = f"\n![What it does]({preview.name})\n" if preview else ""
    sample = "\n".join(f"    {line}" for line in entry.sample.splitlines())
    head = "\n".join(["---", *lines, "tags: [lora, veneer]", "---"])
    body = f"# {entry.name}\n\nA low-rank adapter.\n{shown}\n| | |\n|---|---|\n{table}"
    end = f"\n## A sample\n\n{sample}\n" if sample else ""
    return f"{head}\n\n{body}\n```\nveneer library pull {to}\n```\n{end}"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
