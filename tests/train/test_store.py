"""Stores: what is kept is what was made, whole or not at all, and what is damaged is never used."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread

import pytest

from veneer.core.errors import AdapterError
from veneer.train.store import FLUSH, Store, prepared

COLUMNS = [("number", "i8"), ("share", "f4")]
ROWS = [(bytes([i % 256]) * (i % 5), (i, i / 4)) for i in range(FLUSH + 7)]
MADE_OF = {"what": "a test"}


def made(rows=ROWS, say=lambda text: None, **made_of: object) -> Store:
    return prepared("test", {**MADE_OF, **made_of}, COLUMNS, lambda: iter(rows), say)


def unreachable() -> Iterator[tuple[bytes, tuple[float, ...]]]:
    raise AssertionError("it is made anew")
    yield


def test_what_is_kept_is_what_was_made():
    first = made()
    second = prepared("test", MADE_OF, COLUMNS, unreachable, lambda text: None)
    assert (first.fresh, second.fresh) == (True, False)
    for store in (first, second):
        assert list(store) == [store[i] for i in range(len(store))] == [piece for piece, _ in ROWS]
        assert [tuple(numbers) for numbers in store.table[["number", "share"]].tolist()] == [n for _, n in ROWS]
        assert store.sizes().tolist() == [len(piece) for piece, _ in ROWS]
        assert store[-1] == ROWS[-1][0]
    assert made([(b"", (0, 0))], other=1)[0] == b""


def test_all_that_it_is_made_of_decides_where_it_is(cache: Path):
    folders = {made(**other).folder for other in ({}, {"seed": 0}, {"seed": 1}, {"seed": "1"})}
    assert len(folders) == 4
    assert {folder.parent for folder in folders} == {cache}


@pytest.mark.parametrize("name", ["pieces", "table", "index.json"])
@pytest.mark.parametrize("harm", ["gone", "short", "long", "changed"])
def test_a_damaged_store_is_told_and_made_again(name: str, harm: str):
    path = made().folder / name
    content = bytearray(path.read_bytes())
    if harm == "changed":
        content[len(content) // 2] ^= 1
    else:
        content = content[:-1] if harm == "short" else content + b"\0"
    path.write_bytes(content)
    if harm == "gone":
        path.unlink()
    said: list[str] = []
    store = made(say=said.append)
    if (name, harm) == ("pieces", "changed"):  # of many pieces each is checked when it is read
        with pytest.raises(AdapterError, match=r"test-\w+ is damaged \(row \d+\): delete it"):
            list(store)
        with pytest.raises(AdapterError, match=r"is damaged \(row \d+\)"):
            [store[i] for i in range(len(store))]
        shutil.rmtree(store.folder)
        store = made()
    else:
        assert said == [f"{store.folder} is damaged and is made again"]
    assert store.fresh
    assert list(store) == [piece for piece, _ in ROWS]
    assert not made().fresh


def test_what_fails_or_is_killed_leaves_nothing(cache: Path):
    def failing() -> Iterator[tuple[bytes, tuple[float, ...]]]:
        yield from ROWS
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(failing())
    assert not [path for path in cache.iterdir() if path.is_dir()]
    place = made().folder
    killed = cache / f".{place.name}-killed.part"
    killed.mkdir()
    shutil.rmtree(place)
    assert made().fresh
    assert not killed.exists(), "who makes it again sweeps what a killed process left"


def test_of_two_at_once_one_makes_it_and_the_other_waits():
    begun, waits, found = Event(), Event(), {}

    def slowly() -> Iterator[tuple[bytes, tuple[float, ...]]]:
        begun.set()
        assert waits.wait(60)
        yield from ROWS

    def heard(text: str) -> None:
        assert text == "waiting for another run that prepares the same rows"
        waits.set()

    first = Thread(target=lambda: found.update(first=made(slowly())))
    second = Thread(target=lambda: found.update(second=made(unreachable(), heard)))
    first.start()
    assert begun.wait(60)
    second.start()
    for thread in (first, second):
        thread.join(60)
    assert [found[name].fresh for name in ("first", "second")] == [True, False]
    assert list(found["first"]) == list(found["second"])


def test_a_cache_that_cannot_be_written_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "file"))
    with pytest.raises(AdapterError, match=r"could not be kept in .*file.rows: .*VENEER_CACHE names another folder"):
        made()
