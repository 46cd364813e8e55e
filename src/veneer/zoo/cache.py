"""Where what was pulled or prepared is kept: each thing in its place whole, or not at all."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

from veneer.safe.whole import to_disk
from veneer.zoo.catalogue import Base, Wheel, named
from veneer.zoo.needed import needed

MANIFEST = "veneer.json"
SHIPPED = Path(__file__).parent / "bases"  # the bases that come with veneer
LAYOUT = 1  # raised when a conversion writes other files or values, so that older folders are made anew


def cache_folder() -> Path:
    """The folder of everything that veneer fetches or prepares: `VENEER_CACHE`, else the platform's own place."""
    chosen = os.environ.get("VENEER_CACHE")
    if chosen:
        return Path(os.path.expanduser(chosen)).absolute()
    return Path(needed("platformdirs").user_cache_path("veneer", appauthor=False))


def folder_of(name: str) -> Path:
    """The folder that a base of the zoo has once it is here."""
    base = named(name)
    return (cache_folder() / "bases" if base.wheel else SHIPPED) / base.name


def is_here(name: str) -> bool:
    """Whether a base comes with veneer, or is in the cache: its manifest is there and every file has its size."""
    base, folder = named(name), folder_of(name)
    if base.wheel is None:
        return True
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        made_of = (manifest["layout"], manifest["sha256"])
        sizes = {path: (folder / path).stat().st_size for path in manifest["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return made_of == (LAYOUT, base.wheel.sha256) and sizes == manifest["files"]


@contextmanager
def building(place: Path, what: str, report: Callable[[str], None]) -> Iterator[Path]:
    """Give an empty folder beside `place`, to one process at a time, and remove it in the end.

    Who holds the lock may also sweep what killed processes left: nobody else can be writing there.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    filelock = needed("filelock")
    lock = filelock.FileLock(place.parent / f".{place.name}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        report(f"waiting for another {what}")
        lock.acquire()
    try:
        for leftover in place.parent.glob(f".{place.name}-*.part"):
            shutil.rmtree(leftover, ignore_errors=True)
        workspace = Path(mkdtemp(prefix=f".{place.name}-", suffix=".part", dir=place.parent))
        try:
            yield workspace
        finally:
            shutil.rmtree(workspace, ignore_errors=True)
    finally:
        lock.release()


def install(folder: Path, base: Base, wheel: Wheel) -> Path:
    """Seal a finished folder with its manifest and move it to the base's place in one step."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {
        "name": base.name,
        "package": f"{wheel.package}=={wheel.version}",
        "wheel": wheel.file,
        "sha256": wheel.sha256,
        "licence": base.licence,
        "layout": LAYOUT,
        "files": {path.relative_to(folder).as_posix(): path.stat().st_size for path in files},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return settle(folder, folder_of(base.name))


def settle(folder: Path, place: Path) -> Path:
    """Move a finished folder of a workspace to its place in one step, once all of it is on the disk."""
    for path in (*folder.rglob("*"), folder):
        to_disk(path)
    if place.exists():  # incomplete or of an older layout; it goes when the workspace goes
        os.replace(place, folder.parent / "replaced")
    os.replace(folder, place)
    to_disk(place.parent)
    return place
