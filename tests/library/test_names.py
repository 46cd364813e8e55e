"""The same name works wherever an adapter is asked for, and a name is never a path."""

import shutil
from pathlib import Path

import pytest

from veneer import AdapterError, library
from veneer.library.entry import name_of


def test_a_path_wins_over_a_name_and_a_separator_means_a_path(peft, tmp_path, monkeypatch):
    library.add(peft(1), "style")
    monkeypatch.chdir(tmp_path)
    kept = library.find("style")
    assert kept.is_relative_to(tmp_path / "library")
    with pytest.raises(AdapterError, match=r"style: there is no such file or folder"):
        library.find("./style")
    shutil.copytree(peft(2), "style")
    assert library.find("style") == Path("style")
    assert library.find("./style") == Path("style")


def test_the_nearest_name_is_told(peft, place):
    with pytest.raises(AdapterError, match=r"'x' is neither a file or folder nor a name of the library .* is empty"):
        library.find("x")
    assert not place.exists()
    library.add(peft(), "my-style")
    with pytest.raises(AdapterError, match="did you mean 'my-style'"):
        library.find("my-stile")
    for call in (library.get, library.remove):
        with pytest.raises(AdapterError, match=r"'my-stile' is not a name of the library .* did you mean 'my-style'"):
            call("my-stile")


@pytest.mark.parametrize("name", ["Style", "style", "STYLE"])
def test_names_that_differ_in_capitals_are_one(peft, name):
    library.add(peft(), "Style")
    assert library.get(name).name == "Style"
    with pytest.raises(AdapterError, match="is in the library already: --name gives another name, --force replaces"):
        library.add(peft(2), name)


HOSTILE = [
    "",
    "../x",
    "a/b",
    "a\\b",
    ".",
    "..",
    ".hidden",
    "a\nb",
    "a\0b",
    "a" * 101,
    "é" * 51,
    "a:0.7",
    "-x",
    "a b",
    "x.",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_refused(peft, place, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterError, match="cannot be the name of an adapter"):
        library.add(peft(), name)
    assert not place.exists()
    library.add(peft(), "a")
    for call in (library.get, library.remove, *([] if name in (".", "..") else [library.find])):
        with pytest.raises(AdapterError):
            call(name)
    assert [entry.name for entry in library.listed()] == ["a"]


@pytest.mark.parametrize("text", [*HOSTILE, "日本" * 60, "ΐ" * 50, "_", "+.+", "\ud800"])
def test_the_name_of_any_file_is_a_name(text, peft):
    assert library.add(peft(), name_of(text)).name
