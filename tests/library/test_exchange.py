"""What is pushed to a folder is an ordinary adapter, and pulled it is the same content with the same words."""

import json
import os
from dataclasses import replace

import pytest

from veneer import Adapter, AdapterError, library

OWN = {"tags": ["hat"], "triggers": ["a hat, red"], "licence": "mit", "note": "soft"}


def _content(name: str) -> object:
    return replace(library.get(name), name="", added="", origin={})


@pytest.mark.parametrize("kind", ["peft", "kohya"])
def test_there_and_back_it_is_the_same(kind, request, tmp_path, monkeypatch):
    made = request.getfixturevalue(kind)(name="made")
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"\x89PNG\r\n\x1a\n picture")
    library.add(made, "style", preview=picture, **OWN)
    before = _content("style")
    assert library.push("style", str(tmp_path / "stick")) == str(tmp_path / "stick" / "style")
    there = tmp_path / "stick" / "style"
    if kind == "peft":
        assert Adapter.load(there).config == Adapter.load(made).config
    else:
        assert (there / "style.safetensors").read_bytes() == made.read_bytes()
    assert (there / "preview.png").read_bytes() == picture.read_bytes()
    card = (there / "README.md").read_text()
    assert card.startswith("---\n")
    assert 'license: "mit"' in card
    assert str(tmp_path) not in (there / "veneer-library.json").read_text()  # where it lay is nobody's business
    assert str(tmp_path) not in card
    monkeypatch.setenv("VENEER_LIBRARY", str(tmp_path / "other"))
    entry = library.pull(str(there))
    assert (entry.name, entry.origin) == ("style", {"path": str(there)})
    assert _content("style") == before
    assert library.pull(str(there), "again").content == entry.content
    assert library.verify() == []
    with pytest.raises(AdapterError, match="already: --name gives another name, --force replaces it"):
        library.pull(str(there))
    assert library.pull(str(there), force=True).name == "style"


def test_a_plain_adapter_is_pulled_too(peft, kohya):
    assert library.pull(str(kohya())).name == "hat"
    assert library.pull(str(peft())).name == "peft-1"


def test_nothing_is_replaced_unasked_and_nothing_of_anybody_elses_ever(peft, tmp_path):
    library.add(peft(1), "a")
    there = tmp_path / "stick" / "a"
    library.push("a", str(tmp_path / "stick"))
    library.add(peft(2), "a", force=True)
    with pytest.raises(AdapterError, match=r"stick/a exists already; nothing was written \(--force replaces it\)"):
        library.push("a", str(tmp_path / "stick"))
    assert Adapter.load(there).tensors["0"]["A"][0, 0] == 1
    library.push("a", str(tmp_path / "stick"), force=True)
    assert Adapter.load(there).tensors["0"]["A"][0, 0] == 2
    assert os.listdir(tmp_path / "stick") == ["a"]
    (there / "mine.txt").touch()
    with pytest.raises(AdapterError, match=r"stick/a holds what no library sent, and is not replaced: mine.txt"):
        library.push("a", str(tmp_path / "stick"), force=True)
    (there / "mine.txt").unlink()
    (there / "veneer-library.json").unlink()
    with pytest.raises(AdapterError, match=r"is not replaced: README.md, adapter_config.json, adapter_model.saf"):
        library.push("a", str(tmp_path / "stick"), force=True)


def test_what_is_torn_on_the_way_is_refused(peft, tmp_path):
    library.add(peft(), "a")
    there = tmp_path / "stick" / "a"
    library.push("a", str(tmp_path / "stick"))
    weights = there / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(AdapterError, match=r"a is torn or changed since it was sent: adapter_model.safetensors; send"):
        library.pull(str(there), "b")
    weights.unlink()
    with pytest.raises(AdapterError, match=r"a is not whole: missing adapter_model.safetensors"):
        library.pull(str(there), "b")
    assert [entry.name for entry in library.listed()] == ["a"]


@pytest.mark.parametrize(
    ("key", "value"),
    [("name", "../../x"), ("files", {"../secret": "0" * 64}), ("file", "/etc/passwd"), ("content", "..")],
)
def test_a_strangers_folder_leads_nowhere_else(peft, tmp_path, key, value):
    library.add(peft(), "a")
    library.push("a", str(tmp_path / "stick"))
    sheet = tmp_path / "stick" / "a" / "veneer-library.json"
    sheet.write_text(json.dumps(json.loads(sheet.read_text()) | {key: value}))
    with pytest.raises(AdapterError, match=f"veneer-library.json is not an entry of a library: {key} should be"):
        library.pull(str(sheet.parent), "b")


def test_a_damaged_adapter_is_not_sent(peft, tmp_path, place):
    entry = library.add(peft(), "a")
    (place / "content" / entry.content / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterError, match=r"'a' is damaged: changed or torn: 'adapter_config.json'; see `veneer"):
        library.push("a", str(tmp_path / "stick"))
    assert not (tmp_path / "stick").exists()


def test_where_to_must_be_plain(peft, tmp_path, monkeypatch):
    library.add(peft(), "a")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        AdapterError, match=r"'stick' is neither a folder nor a repository .* a new folder would be ./s"
    ):
        library.push("a", "stick")
    (tmp_path / "stick").mkdir()
    library.push("a", "stick")
    assert (tmp_path / "stick" / "a").is_dir()
    assert library.push("a", "stick/new") == "stick/new/a"  # no repository, as stick is a folder
    (tmp_path / "file").touch()
    with pytest.raises(AdapterError, match=r"file/a cannot be written: .*File exists"):
        library.push("a", str(tmp_path / "file"))
    with pytest.raises(AdapterError, match="stock: there is no such file or folder; did you mean 'stick'"):
        library.pull("stock")
