"""Adapter files of every community: read, written, told apart by what they hold. One format, one module.

A format's module says `NAME`; `detects(names, about)`, which judges by the names of a file's tensors and by what the
file says of itself; `read(tensors, about, where, *, …)` and `write(adapter, path, *, …)`, whose keywords are what the
format can be told. One that is a folder is read from `where`, and puts its files in place itself; the others write to a
path that nobody reads yet, which is put in place here.
"""

import inspect
import os
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from veneer.apart.changes import changes, checked
from veneer.core.adapter import Adapter
from veneer.core.errors import AdapterError, listed, named, nearest
from veneer.files.attach import adapter_on, attach, carriers, detach
from veneer.files.folder import CONFIG, broken
from veneer.files.stored import PICKLES, Stored, adapter_file, mapped
from veneer.safe.whole import write_whole

__all__ = ["FORMATS", "adapter_on", "attach", "carriers", "detach", "detect", "read", "recognised", "write"]

FORMATS = ("cloneofsimo", "diffusers", "kohya", "loralib", "lycoris", "peft")
FOLDERS = ("peft",)  # whose adapter is a folder
Place = str | os.PathLike[str]
_FILE = ".safetensors"


def read(path: Place, format: str | None = None, **asked: Any) -> Adapter:
    """The adapter that a file or a folder holds, in whatever format it is; its tensors' values are not read yet.

    A folder is PEFT's, or a run's with its `adapter`, or has one adapter file in it. A pickle (`.pt`, `.bin`) is
    opened when it is named itself, and then for tensors alone. `asked` is what the format has to be told, like `alpha`.

    Raises `AdapterError` that says all that is wrong with the file, or what was tried when no format knows it.
    """
    return recognised(path, format, **asked)[0]


def recognised(path: Place, format: str | None = None, **asked: Any) -> tuple[Adapter, str]:
    """What `read` gives, and the format that it was in; the file is opened once."""
    place = adapter_file(Path(path))
    if place.is_dir():
        name = _agreed(format, "peft", place)
        file = Stored(place, {}, {})
    else:
        file = mapped(place)
        name = format or _detected(file)
    run = _module(name).read
    adapter: Adapter = run(file.tensors, file.about, str(place), **_told(run, name, asked))
    if adapter.faults or file.faults:
        raise AdapterError("\n".join([f"{place} ({name}):", *file.faults, *adapter.faults]))
    return adapter, name


def detect(path: Place) -> str:
    """The format of a file or folder, by what it holds. Raises `AdapterError` where none knows it, or several do."""
    place = adapter_file(Path(path))
    return "peft" if place.is_dir() else _detected(mapped(place))


def write(adapter: Adapter, path: Place, format: str, force: bool = False, **asked: Any) -> Path:
    """Write the adapter whole or not at all; what is there already is replaced with `force` alone. `asked` is what the
    format can be told, like kohya's `sgm`.

    Raises `AdapterError` with every reason why the format cannot hold it.
    """
    run = _module(format).write
    checked(changes(adapter))
    given = _told(run, format, asked)
    path = Path(path)
    taken = (path.exists() and (not path.is_dir() or any(path.iterdir()))) if format in FOLDERS else path.exists()
    if format not in FOLDERS and path.is_dir():
        raise AdapterError(f"{path} is a folder: {format} is one file, give its name ({path / 'adapter.safetensors'})")
    _expect_name(path, format)
    if taken and not force:
        raise AdapterError(f"{path} exists already; nothing was written (force=True or --force replaces it)")
    if faults := broken(adapter):
        raise AdapterError(f"{faults[0]}; nothing was written")
    if format in FOLDERS:
        run(adapter, path, **given)
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole({path: lambda temporary: run(adapter, temporary, **given)})
    except OSError as error:
        raise AdapterError(f"{path} cannot be written: {error}") from error
    return path


def _module(name: str) -> Any:
    if name not in FORMATS:
        raise AdapterError(f"{named(name)} is no format of veneer: it has {listed(FORMATS)}{nearest(name, FORMATS)}")
    return import_module(f"veneer.files.{name}")


def _expect_name(path: Path, format: str) -> None:
    """Raises `AdapterError` for a name that would say of a folder or file that it is something else."""
    if format in FOLDERS and path.suffix in (_FILE, *PICKLES):
        raise AdapterError(f"{path} is a file's name, and {format} is a folder: {path.with_suffix('')}, for example")
    if format not in FOLDERS and path.suffix in PICKLES:
        raise AdapterError(f"{path} is a pickle's name, and none is written: {path.with_suffix(_FILE)}, for example")


def _agreed(format: str | None, found: str, place: Path) -> str:
    if format not in (None, found):
        raise AdapterError(f"{place} holds {CONFIG}, as {found} has it, and is not read as {named(str(format))}")
    return found


def _detected(file: Stored) -> str:
    found = [name for name in FORMATS if _module(name).detects(file.tensors.keys(), file.about)]
    if len(found) == 1:
        return found[0]
    some = listed(file.tensors, say=named)
    if found:
        raise AdapterError(f"{file.where} may be of {listed(found, say=str)}: say which (format=…). It holds {some}")
    raise AdapterError(
        f"{file.where} is no adapter file that veneer knows. It holds {some}; tried: {listed(FORMATS, say=str)}"
    )


def _told(run: Callable[..., object], name: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """What of `asked` was given, all of it being what the format can be told."""
    given = {key: value for key, value in asked.items() if value is not None}
    parameters = inspect.signature(run).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    if strange := [key for key in given if key not in known]:
        other = f"; what can be given is {listed(known)}" if known else ""
        raise AdapterError(f"{listed(strange)} cannot be given for {name}, which says that itself{other}")
    return given
