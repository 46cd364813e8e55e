"""Files and folders written whole or not at all."""

import errno
import os
import shutil
import tempfile
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


def write_folder(folder: Path, fill: Write) -> None:
    """Let `fill` make a new folder beside its place, flush its files to the disk, then put it in place in one step.

    What fails leaves nothing. Raises `OSError`, also where something is there already.
    """
    if folder.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    workspace = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        made = workspace / folder.name  # whose mode is the umask's
        made.mkdir()
        fill(made)
        for path in made.rglob("*"):
            if path.is_file():
                path.chmod(made.stat().st_mode & 0o666)  # some writers make files that only their owner could read
                to_disk(path)
        os.replace(made, folder)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


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
