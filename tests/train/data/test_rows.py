"""Rows: every format gives the same rows, and every fault is one error with its place."""

import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from veneer.core.errors import AdapterError
from veneer.train.data.rows import draw, held_out, read_rows

ROWS = [{"q": "Où ?", "a": 'here,\nor "there"'}, {"q": "2+2", "a": "4"}]
JSON_LINES = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
TABLE = 'q{0}a\nOù ?{0}"here,\nor ""there"""\n2+2{0}4\n'


@pytest.mark.parametrize(
    ("name", "content", "second"),
    [
        ("t.jsonl", JSON_LINES.encode(), "line 3"),
        ("t.ndjson", JSON_LINES.encode("utf-8-sig"), "line 3"),
        ("t.jsonl.gz", gzip.compress(JSON_LINES.encode(), mtime=0), "line 3"),
        ("t.json", json.dumps(ROWS).encode(), "item 2"),
        ("t.json", json.dumps({"version": 1, "data": ROWS}, indent=1).encode("utf-8-sig"), "item 2"),
        ("t.csv", TABLE.format(",").encode(), "line 4"),
        ("t.csv", TABLE.format(",").replace("\n2", "\r\n\r\n2").encode("utf-8-sig"), "line 5"),
        ("t.TSV", TABLE.format("\t").encode(), "line 4"),
    ],
)
def test_every_format_gives_the_same_rows_with_their_places(tmp_path: Path, name: str, content: bytes, second: str):
    (tmp_path / name).write_bytes(content)
    rows = read_rows(str(tmp_path / name))
    for _ in range(2):  # rows may be gone through again
        assert [row.values for row in rows] == ROWS
    assert list(rows)[1].place == f"{name}, {second}"


def test_parquet_keeps_lists_and_numbers(tmp_path: Path):
    table = [{"n": 1, "messages": [{"role": "user", "content": "hi"}]}, {"n": None, "messages": []}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "t.parquet")
    rows = list(read_rows(str(tmp_path / "t.parquet")))
    assert [row.values for row in rows] == table
    assert rows[1].place == "t.parquet, row 2"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jsonl", b'{"a": 1}\n\n{"a": 1 "b": 2}', "t.jsonl, line 3: not valid JSON: Expecting ',' .* column 9"),
        ("t.jsonl", b'{"a": 1}\n[1, 2]\n', "t.jsonl, line 2: expected an object .* found list"),
        ("t.jsonl", b'{"a": 1}\n{"a": "caf\xe9"}\n', "t.jsonl, line 2: expected UTF-8, found the byte 0xe9"),
        ("t.jsonl", b"\xef\xbb\xbf\xff\n", "t.jsonl, line 1: expected UTF-8, found the byte 0xff"),
        ("t.jsonl", b"[" * 100_000, "t.jsonl, line 1: "),
        ("t.json", b'[\n{"a": 1},\n{"a" 1}]', "t.json, line 3: not valid JSON: Expecting ':' .* column 6"),
        ("t.json", b'{"a": 1}\n{"a": 2}', "t.json, line 2: .*Extra data.*named .jsonl"),
        ("t.json", b'{"a": [], "b": []}', "object that holds one list; found an object with 2 lists.*'a', 'b'"),
        ("t.json", b'"a"', "t.json: expected a list of objects, found str"),
        ("t.json", b'[{"a": 1}, 2]', "t.json, item 2: expected an object"),
        ("t.csv", b'a,b\n"1\n2",3\n4\n', "t.csv, line 4: expected 2 fields as in the header .* found 1"),
        ("t.csv", b"a,b\n1,2,3\n", "t.csv, line 2: expected 2 fields .* found 3"),
        ("t.csv", b'a,b\n1,2\n"3,4\n5,6\n', "t.csv, line 3: not a valid table: unexpected end of data"),
        ("t.csv", b"a,a\n1,2\n", "t.csv, line 1: expected a header of different names, found 'a', 'a'"),
        ("t.csv", b"a,b\n", "expected rows, found none"),
        ("t.csv", b"a,b\n1,\xff\n", "t.csv, line 2: expected UTF-8"),
        ("t.jsonl", b"", "expected rows, found none"),
        ("t.json", b" \n", "expected rows, found none"),
        ("t.parquet", b"PAR", "t.parquet: cannot be read as Parquet"),
        ("t.jsonl.gz", b"not packed", "cannot be read: Not a gzipped file"),
        ("t.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-9], "cannot be read: "),
        ("t.txt", b"words", r"cannot read \.txt; expected \.jsonl, "),
    ],
)
def test_a_fault_is_one_error_with_its_place(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AdapterError, match=message):
        list(read_rows(str(tmp_path / name)))


def test_a_missing_file_names_the_nearest_and_a_folder_its_files(tmp_path: Path):
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(AdapterError, match=r"no such file; did you mean 'train.jsonl'"):
        read_rows(str(tmp_path / "trian.jsonl"))
    with pytest.raises(AdapterError, match=r"is a folder, expected a file.*'train.jsonl'"):
        read_rows(str(tmp_path))
    with pytest.raises(AdapterError, match=r"no such file$"):
        read_rows(str(tmp_path / "nowhere" / "train.jsonl"))


def test_a_field_may_be_longer_than_the_csv_module_allows(tmp_path: Path):
    (tmp_path / "t.csv").write_text(f"text\n{'x' * 200_000}\n")
    (row,) = read_rows(str(tmp_path / "t.csv"))
    assert len(str(row.values["text"])) == 200_000


def test_a_hub_dataset_is_read_by_split_and_its_faults_are_one_error(monkeypatch: pytest.MonkeyPatch):
    import datasets

    asked = []

    def load_dataset(name: str, subset: str | None, split: str) -> datasets.Dataset:
        asked.append((name, subset, split))
        return datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = list(read_rows("owner/name", "validation"))
    assert read_rows("owner/name", "validation").content() != read_rows("owner/name", "test").content()
    del asked[1:]
    assert [row.values["text"] for row in rows] == ["a", "b"]
    assert (asked, rows[1].place) == ([("owner/name", None, "validation")], "owner/name (validation), row 2")
    assert read_rows("owner/name", "validation", "part").place(1) == "owner/name (part, validation), row 1"
    assert asked[-1] == ("owner/name", "part", "validation")

    def offline(name: str, subset: str | None, split: str) -> datasets.Dataset:
        raise ConnectionError("offline mode is enabled")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(AdapterError, match=r"owner/name: there is no such file, and the split 'train'.*offline mode"):
        read_rows("owner/name")


@pytest.mark.parametrize(("path", "module"), [("owner/name", "datasets"), ("t.parquet", "pyarrow")])
def test_an_absent_package_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, module: str):
    (tmp_path / "t.parquet").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(AdapterError, match=r"needs: pip install 'veneer\[train\]'"):
        list(read_rows(path))


def split(keys: list[str], share: float, seed: int) -> tuple[list[str], list[str]]:
    """(learned from, held out)."""
    held = held_out(np.array([draw(key, seed) for key in keys]), share)
    sides: tuple[list[str], list[str]] = ([], [])
    for key, away in zip(keys, held, strict=True):
        sides[int(away)].append(key)
    return sides


@given(st.lists(st.text(max_size=3), max_size=40), st.floats(0, 0.99), st.integers(0, 2**40), st.randoms())
def test_the_split_keeps_keys_together_whatever_the_order(keys, share, seed, random):
    kept, held = split(keys, share, seed)
    assert not set(kept) & set(held)
    assert Counter(kept) + Counter(held) == Counter(keys)
    assert [bool(kept), bool(held)] == [bool(keys), bool(share) and len(set(keys)) > 1]
    shuffled = random.sample(keys, len(keys))
    assert set(split(shuffled, share, seed)[1]) == set(held)


def test_the_split_has_about_the_share_and_the_seed_changes_it():
    items = [str(number) for number in range(5000)]
    first, second = (split(items, 0.1, seed)[1] for seed in (0, 1))
    assert 400 < len(first) < 600
    assert first != second
