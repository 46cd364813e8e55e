"""A small base in a wheel of its own, and a cache that is nobody's."""

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from zipfile import ZipFile

import pytest

from veneer.zoo import CATALOGUE, Base
from veneer.zoo.catalogue import Wheel

MODEL = "tiny_base/model/"
Carry = Callable[..., Base]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache for one test, no network, and no setting of pip or of the hub from outside."""
    for variable in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """Where the tests' wheel is, and where pip finds it."""
    return tmp_path / "wheels" / "tiny_base-1.0-py3-none-any.whl"


@pytest.fixture
def carry(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> Carry:
    """Pack files into the wheel and enter it into the catalogue as `tiny`."""

    def pack(files: dict[str, bytes], inside: str = MODEL) -> Base:
        wheel.parent.mkdir(exist_ok=True)
        about = "tiny_base-1.0.dist-info/"
        needs = "Requires-Dist: a-package-that-nobody-has\n"
        files = files | {
            f"{about}METADATA": f"Metadata-Version: 2.1\nName: tiny-base\nVersion: 1.0\n{needs}".encode(),
            f"{about}WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            f"{about}licenses/LICENSE": b"do what you like",
            f"{about}RECORD": b"",
        }
        with ZipFile(wheel, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        base = Base(
            name="tiny",
            summary="a test's base",
            kind="encoder",
            parameters=1,
            disk_bytes=1000,
            licence="CC0-1.0",
            origin="made up",
            wheel=Wheel(
                package="tiny-base",
                version="1.0",
                file=wheel.name,
                sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
                download_bytes=wheel.stat().st_size,
                inside=inside,
            ),
        )
        monkeypatch.setitem(CATALOGUE, "tiny", base)
        return base

    return pack


@pytest.fixture
def tiny(carry: Carry) -> Base:
    """A base whose files are copied as they are."""
    files = {f"{MODEL}config.json": b"{}", f"{MODEL}part/weights.bin": b"\x00" * 5000}
    return carry(files | {f"{MODEL}.gitattributes": b"", "tiny_base/__init__.py": b"raise SystemExit"})


@pytest.fixture(scope="session")
def real_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One cache for the tests that pull the real bases, with pip as this machine has it."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("real-cache")
        patch.setenv("VENEER_CACHE", str(folder))
        yield folder
