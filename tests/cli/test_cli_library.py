"""`veneer library …`, through the real entry point."""

import json
import re
import shutil

import pytest
import torch

from veneer import Adapter, LoraConfig


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("VENEER_LIBRARY", str(tmp_path / "library"))
    monkeypatch.setenv("COLUMNS", "160")
    return tmp_path / "library"


@pytest.fixture
def made(tmp_path):
    tensors = {"A": torch.ones(2, 6), "B": torch.ones(5, 2)}
    config = LoraConfig(r=2, target_modules=["0"], base_model_name_or_path="smollm2-135m")
    return Adapter(config, {"0": tensors}).save(tmp_path / "made" / "my-style")


def test_an_adapter_from_adding_to_removing(veneer, made, tmp_path):
    assert veneer("library", "list").out == ""
    said = veneer("library", "add", made, "--tag", "hat", "--tag", "red", "--trigger", "a hat", "--licence", "mit")
    assert (said.code, said.out) == (0, "my-style\n")
    table = veneer("library", "list").out.splitlines()
    headings = ["name", "base", "method", "format", "size", "tags", "trigger words", "licence", "added"]
    assert re.split("  +", table[0].strip()) == headings
    assert all(
        word in table[1] for word in ("my-style", "smollm2-135m", "LoRA, r 2", "peft", "hat, red", "a hat", "mit")
    )
    (row,) = json.loads(veneer("library", "list", "--json").out)
    assert (row["name"], row["tags"], row["path"]) == ("my-style", ["hat", "red"], str(_path(tmp_path, row)))
    assert json.loads(veneer("library", "search", "RED", "hat", "--json").out) == [row]
    assert veneer("library", "search", "blue").out == ""
    shown = veneer("library", "show", "my-style").out
    assert f"content   {row['content']}\n" in shown
    assert f"origin    path  {made}\n" in shown
    assert json.loads(veneer("library", "show", "my-style", "--json").out) == row
    said = veneer("library", "verify")
    assert (said.code, said.out) == (0, f"whole: 1 adapters in {tmp_path / 'library'}\n")
    assert veneer("library", "remove", "my-style").code == 0
    assert veneer("library", "list", "--json").out == "[]\n"


def _path(tmp_path, row):
    return tmp_path / "library" / "content" / row["content"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("add", "nowhere/x"), "nowhere/x: there is no such file or folder"),
        (("add", "MADE"), "'my-style' is in the library already: --name gives another name, --force replaces it"),
        (("add", "MADE", "--name", "../x"), "'../x' cannot be the name of an adapter"),
        (("add", "MADE", "--name", "y", "--preview", "no.png"), "preview no.png cannot be read"),
        (("show", "my-stile"), "'my-stile' is not a name of the library"),
        (("remove", "x\ny"), r"'x\ny' is not a name of the library"),
        (("push", "my-style", "stick"), "a new folder would be ./stick"),
        (("pull", "stick"), "stick: there is no such file or folder"),
    ],
)
def test_mistakes_are_told_and_change_nothing(veneer, made, arguments, words):
    veneer("library", "add", made)
    before = veneer("library", "list", "--json").out
    said = veneer("library", *[str(made) if word == "MADE" else word for word in arguments])
    assert said.code == 2
    assert said.out == ""
    assert words in said.err
    assert "Traceback" not in said.err
    assert veneer("library", "list", "--json").out == before
    assert veneer("library", "verify").code == 0


def test_force_and_names(veneer, made):
    for arguments in ((), ("--force",), ("--name", "Other")):
        assert veneer("library", "add", made, *arguments).code == 0
    assert [row["name"] for row in json.loads(veneer("library", "list", "--json").out)] == ["my-style", "Other"]


def test_pushed_and_pulled_through_a_folder(veneer, made, tmp_path):
    veneer("library", "add", made, "--note", "soft")
    said = veneer("library", "push", "my-style", tmp_path / "stick")
    assert (said.code, said.out) == (0, f"{tmp_path / 'stick' / 'my-style'}\n")
    assert veneer("library", "push", "my-style", tmp_path / "stick").code == 2
    assert veneer("library", "pull", tmp_path / "stick" / "my-style", "--name", "back").out == "back\n"
    said = veneer("library", "pull", tmp_path / "stick")
    assert (said.code, f"name one: {tmp_path / 'stick' / 'my-style'}" in said.err) == (2, True)
    rows = json.loads(veneer("library", "list", "--json").out)
    assert [(row["name"], row["note"]) for row in rows] == [("back", "soft"), ("my-style", "soft")]
    assert rows[0]["content"] == rows[1]["content"]


def test_what_is_damaged_is_told_with_an_exit_code(veneer, made, place):
    veneer("library", "add", made)
    (row,) = json.loads(veneer("library", "list", "--json").out)
    (place / "entries" / "my-style.json").write_text("{")
    said = veneer("library", "verify")
    assert said.code == 1
    assert f"content/{row['content']}: orphaned: no entry refers to it\n    --repair moves it to lost/" in said.out
    assert "entries that cannot be read: 1; `veneer library verify` says more" in veneer("library", "list").err
    assert veneer("library", "verify", "--repair").code == 0
    assert veneer("library", "add", place / "lost" / row["content"], "--name", "my-style").code == 0
    shutil.rmtree(place / "content" / row["content"])
    said = veneer("library", "verify", "--repair")
    assert said.code == 1
    assert said.out.startswith(f"my-style: content {row['content'][:12]}: missing\n    `veneer library add ")


def test_a_run_is_added_and_answers_by_its_name(veneer, recipe, tmp_path):
    assert veneer("train", recipe).code == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert veneer("library", "add", run, "--name", "inns").out == "inns\n"
    row = json.loads(veneer("library", "show", "inns", "--json").out)
    assert row["origin"] == {"run": str(run)}
    assert row["sample"].startswith("name: Inn")
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "veneer.json"} <= row["files"].keys()
    asked = ("--prompt", "name: Inn 1", "--max-new-tokens", 4)
    by_name, by_path = veneer("generate", "inns", *asked), veneer("generate", run, *asked)
    assert (by_name.code, by_name.out) == (0, by_path.out)
    assert by_name.out
