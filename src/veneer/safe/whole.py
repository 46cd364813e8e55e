"""Files written whole or not at all."""

import os
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

Write = Callable[[Path], object]


def write_whole(files: Mapping[Path, Write]) -> None:
    """Let every writer fill a temporary file beside its path, flush them all to the disk, then put them in place, one
    after the other and in their order, on the disk too.

    What fails before the last step leaves the old files as they were, all of them.
    """
    temporaries: dict[Path, Path] = {}
    try:
        for path, write in files.items():
            temporary = temporaries[path] = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
            descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            mode = os.fstat(descriptor).st_mode & 0o777  # as the umask has it; some writers make files of their own
            os.close(descriptor)
            write(temporary)
            temporary.chmod(mode)
            to_disk(temporary)
        for path, temporary in temporaries.items():
            os.replace(temporary, path)
            with suppress(OSError):  # not every system flushes folders
                to_disk(path.parent)
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)


def to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    # Windows flushes only what is open for writing
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
