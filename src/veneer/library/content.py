"""Contents: sets of files, each kept once in a folder that its sha256 names.

SHA256SUMS lists the files as the program `sha256sum` does, in the order of their names; a content's sha256 is that of
the list. So `sha256sum -c SHA256SUMS` checks one without veneer.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from veneer.core.errors import AdapterError, listed
from veneer.library.entry import is_key, is_plain
from veneer.library.place import CONTENT, UNFINISHED, discard
from veneer.safe.stored import read_bytes

SUMS = "SHA256SUMS"
_CHUNK = 1 << 20  # bytes


@contextmanager
def draft(place: Path, files: Mapping[str, Path]) -> Iterator[Path]:
    """Copies of the files under the names that they get, in a folder of their own, with their list, on the disk.

    Raises `AdapterError` for a source that cannot be read, `OSError` for a library that cannot be written.
    """
    workspace = place / UNFINISHED / uuid4().hex
    workspace.mkdir()
    try:
        sums = {name: copy(source, workspace / name) for name, source in sorted(files.items())}
        write(workspace / SUMS, _as_text(sums).encode())
        flush(workspace)
        yield workspace
    finally:
        discard(workspace)


def settle(workspace: Path, place: Path) -> str:
    """Put a finished draft where contents are; give its sha256. A content that is there already, whole, stays."""
    key = digest(workspace / SUMS)
    home = place / CONTENT / key
    if home.exists():
        if not faults(home):
            return key
        os.replace(home, place / UNFINISHED / uuid4().hex)
    os.replace(workspace, home)
    flush(home.parent)
    return key


def files_of(content: Path) -> dict[str, str]:
    """The sha256 of each file of a content, as its list has it. Raises `AdapterError`."""
    lines = read_bytes(content / SUMS).decode("utf-8", "replace").splitlines()
    pairs = [line.partition("  ")[::2] for line in lines]
    if not pairs or not all(is_key(key) and is_plain(name) for key, name in pairs):
        raise AdapterError(f"{content / SUMS} is not a list of sha256 and files' names")
    return {name: key for key, name in pairs}


def faults(content: Path) -> list[str]:
    """What is wrong with a content, after reading all of it."""
    if content.is_symlink() or not content.is_dir():
        return ["is no folder"]
    try:
        expected = files_of(content)
        found = [] if digest(content / SUMS) == content.name else [f"{SUMS} is changed"]
        there = {path.name for path in content.iterdir()} - {SUMS}
    except AdapterError as error:
        return [f"{SUMS} is missing or torn ({error})"]
    missing, strange = sorted(expected.keys() - there), sorted(there - expected.keys())
    found += [f"missing: {listed(missing)}"] if missing else []
    found += [f"does not belong there: {listed(strange)}"] if strange else []
    changed = [name for name in sorted(expected.keys() & there) if not _is(content / name, expected[name])]
    return found + ([f"changed or torn: {listed(changed)}"] if changed else [])


def copy(source: Path, target: Path) -> str:
    """Copy a plain file to a new one, to the disk, and give the sha256 of what was written.

    Raises `AdapterError` where the source cannot be read, and `OSError` where the target cannot be written.
    """
    hashed = hashlib.sha256()
    with target.open("xb") as out:
        try:
            file = source.open("rb") if source.is_file() else None
        except OSError as error:
            raise AdapterError(f"{source} cannot be read: {error}") from error
        if file is None:
            raise AdapterError(f"{source} is no plain file")
        with file:
            while chunk := _read(file.fileno(), source):
                hashed.update(chunk)
                out.write(chunk)
        out.flush()
        os.fsync(out.fileno())
    return hashed.hexdigest()


def write(path: Path, text: bytes) -> None:
    """A new file with this text, on the disk."""
    with path.open("xb") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())


def flush(folder: Path) -> None:
    """Wait until a folder's list of files is on the disk."""
    if os.name == "nt":  # Windows opens no folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(path: Path) -> str:
    """The sha256 of a file. Raises `AdapterError`."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error


def _is(path: Path, key: str) -> bool:
    try:
        return path.is_file() and not path.is_symlink() and digest(path) == key
    except AdapterError:
        return False


def _read(descriptor: int, source: Path) -> bytes:
    try:
        return os.read(descriptor, _CHUNK)
    except OSError as error:
        raise AdapterError(f"{source} cannot be read: {error}") from error


def _as_text(sums: Mapping[str, str]) -> str:
    return "".join(f"{key}  {name}\n" for name, key in sums.items())
