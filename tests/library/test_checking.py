"""Whatever befalls a library on the disk is told by name, with what mends it; what can be mended is."""

import json
import os
import re
import shutil
import sqlite3
from contextlib import closing

import pytest

from veneer import AdapterError, library

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def kept(peft, place):
    """The content of one entry, `a`, beside a whole one, `b`."""
    entry = library.add(peft(1), "a")
    library.add(peft(2), "b")
    assert library.verify() == []
    return place / "content" / entry.content


def _write(path, data):
    path.write_bytes(data)


HARMS = {
    "torn": (lambda kept: _write(kept / WEIGHTS, (kept / WEIGHTS).read_bytes()[:-1]), f"changed or torn: '{WEIGHTS}'"),
    "changed": (lambda kept: _write(kept / WEIGHTS, (kept / WEIGHTS).read_bytes()[:-1] + b"!"), "changed or torn: "),
    "missing": (lambda kept: (kept / WEIGHTS).unlink(), f"missing: '{WEIGHTS}'"),
    "gone": (lambda kept: shutil.rmtree(kept), "missing"),
    "strange": (lambda kept: _write(kept / "x", b""), "does not belong there: 'x'"),
    "linked": (
        lambda kept: ((kept / WEIGHTS).rename(kept.parent.parent / "w"), (kept / WEIGHTS).symlink_to("../../w")),
        "changed or torn: ",
    ),
    "no list": (lambda kept: (kept / "SHA256SUMS").unlink(), "SHA256SUMS is missing or torn"),
    "no list of ours": (lambda kept: _write(kept / "SHA256SUMS", b"\xff"), "SHA256SUMS is missing or torn"),
    "a list of another": (
        lambda kept: _write(kept / "SHA256SUMS", (kept / "SHA256SUMS").read_bytes() * 2),
        "SHA256SUMS is changed",
    ),
    "a list that leads out": (
        lambda kept: _write(kept / "SHA256SUMS", f"{'0' * 64}  ../../.lock\n".encode()),
        "SHA256SUMS is missing or torn",
    ),
    "a file in its place": (lambda kept: (shutil.rmtree(kept), kept.touch()), "is no folder"),
}


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("repair", [False, True])
def test_a_harmed_content_is_told_and_made_good_by_adding_it_again(kept, peft, harm, repair):
    hurt, words = HARMS[harm]
    hurt(kept)
    (fault,) = library.verify(repair=repair)
    assert fault.where == "a"
    assert f"content {kept.name[:12]}: {words}" in fault.what
    assert f"veneer library add {peft(1)} --name a --force" in fault.advice
    library.add(peft(1), "a", force=True)
    assert library.verify() == []
    if harm == "linked":
        assert (kept.parent.parent / "w").is_file()  # what a link leads to is nobody's business


def test_a_content_that_is_gone_is_told_when_it_is_asked_for(kept):
    shutil.rmtree(kept)
    with pytest.raises(AdapterError, match=r"the content of 'a' is missing: .* see `veneer library verify`"):
        library.find("a")
    library.remove("a")
    assert library.verify() == []


def test_orphans_are_told_and_moved_out_of_the_way(kept, place):
    (place / "entries" / "a.json").unlink()
    (place / "content" / "junk").mkdir()
    told = {fault.where: fault for fault in library.verify()}
    assert told.keys() == {f"content/{kept.name}", "content/junk"}
    assert "orphaned: no entry refers to it" in told["content/junk"].what
    assert f"veneer library add {kept} --name NAME" in told[f"content/{kept.name}"].advice
    assert library.verify(repair=True) == library.verify() == []
    assert sorted(os.listdir(place / "lost")) == sorted([kept.name, "junk"])
    assert library.add(place / "lost" / kept.name, "a").content == kept.name
    (place / "entries" / "a.json").unlink()
    assert library.verify(repair=True) == []
    assert len(os.listdir(place / "lost")) == 3  # nothing there is written over


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text[:-20], "is not valid JSON"),
        (lambda text: "[]", "expected a JSON object"),
        (lambda text: text.replace('"name": "a"', '"name": "../a"'), "name should be a name, found '../a'"),
        (lambda text: text.replace('"content": "', '"content": "../'), "content should be a sha256"),
        (lambda text: text.replace('"file": ""', '"file": "../.lock"'), "file should be the name of a file"),
        (lambda text: text.replace('"name": "a"', '"name": "z"'), "is the entry of 'z': expected 'z.json'"),
        (lambda text: json.dumps(json.loads(text) | {"files": {"../x": "0" * 64}}), "files should be"),
        (lambda text: json.dumps(json.loads(text) | {"tags": "x", "size": -1}), "size should be .*; .*tags should be"),
    ],
)
def test_a_damaged_entry_is_told_and_harms_no_other(kept, place, change, words):
    path = place / "entries" / "a.json"
    path.write_text(change(path.read_text()))
    assert [entry.name for entry in library.listed()] == ["b"]
    assert library.unreadable() == ["a.json"]
    with pytest.raises(AdapterError):
        library.find("a")
    entry, orphan = library.verify()
    assert entry.where == "entries/a.json"
    assert re.search(words, entry.what)
    assert orphan.where == f"content/{kept.name}"
    library.remove("b")
    assert kept.is_dir()  # an entry that cannot be read may need any content
    assert library.verify(repair=True) == []
    assert {"a.json", kept.name} <= {*os.listdir(place / "lost")}


def test_an_entry_that_says_other_than_its_content_is_told(kept, place):
    path = place / "entries" / "a.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"files": {"x": "0" * 64}}))
    (fault,) = library.verify()
    assert (fault.where, fault.what) == ("a", "its entry names other files than its content has")


def test_keys_of_a_newer_version_are_passed_over(kept, place):
    path = place / "entries" / "a.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"stars": 5}))
    assert library.get("a").name == "a"
    assert library.verify() == []


def test_what_killed_processes_left_is_no_fault_and_goes(kept, place):
    (place / "entries" / "a.json").unlink()
    (place / "entries" / ".b.json.0.part").touch()
    (place / "unfinished" / f"{kept.name}.pending").touch()
    (place / "unfinished" / "draft").mkdir()
    assert library.verify() == []
    assert os.listdir(place / "unfinished") == []
    assert sorted(os.listdir(place / "entries")) == ["b.json"]
    assert not kept.exists()


def test_an_index_that_lies_costs_no_content(kept, place):
    _old(place)
    library.listed()
    with closing(sqlite3.connect(place / "index-1.sqlite")) as index, index:
        index.execute("UPDATE entries SET content = ?", ["0" * 64])
    (place / "unfinished" / f"{kept.name}.pending").touch()
    assert library.verify() == []
    assert kept.is_dir()


def _old(place):
    """Let no entry be so young that it is read again."""
    for path in (place / "entries").iterdir():
        os.utime(path, (0, 0))
