"""What is put into the library is kept byte for byte, once, and found by its name."""

import json
import os
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
import torch

from veneer import Adapter, AdapterError, library
from veneer.library.content import SUMS


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != SUMS}


def everything(place: Path) -> dict[str, bytes]:
    """All of the library but what says nothing: the index, the lock."""
    files = (path for part in ("entries", "content", "unfinished", "lost") for path in (place / part).rglob("*"))
    return {str(path.relative_to(place)): path.read_bytes() for path in files if path.is_file()}


def test_a_folder_is_kept_byte_for_byte_and_found_by_its_name(peft):
    made = peft(name="my-style")
    entry = library.add(made)
    assert library.find("my-style") != made
    assert bytes_of(library.find("my-style")) == bytes_of(made)
    assert Adapter.load(library.find("my-style")).config == Adapter.load(made).config
    assert (entry.name, entry.method, entry.base) == ("my-style", "LoRA, r 2", "smollm2-135m")
    assert entry.files == {name: sha256(data).hexdigest() for name, data in bytes_of(made).items()}
    assert entry.size == sum(map(len, bytes_of(made).values()))
    assert entry.origin == {"path": str(made)}
    assert library.get("my-style") == entry == library.listed()[0]


def test_a_file_is_kept_byte_for_byte_and_says_what_it_is(kohya):
    made = kohya("Big hat", modelspec__trigger_phrase="big hat, b1g", ss_sd_model_name="base.safetensors")
    entry = library.add(made)
    assert entry.name == "Big-hat"
    assert library.find("Big-hat").read_bytes() == made.read_bytes()
    assert entry.triggers == ["big hat, b1g"]
    assert (entry.format, entry.method, entry.base) == ("kohya", "LoRA, r 2", "base.safetensors")


def test_the_name_of_a_content_is_the_hash_of_the_list_of_its_hashes(peft, place):
    entry = library.add(peft(), "a")
    sums = "".join(f"{key}  {name}\n" for name, key in sorted(entry.files.items()))
    assert entry.content == sha256(sums.encode()).hexdigest()
    assert (place / "content" / entry.content / SUMS).read_text() == sums


def test_equal_contents_are_kept_once_and_go_with_their_last_name(peft, kohya, place):
    first, second = library.add(peft(), "a"), library.add(shutil.copytree(peft(), peft().parent / "copy"), "b")
    assert first.content == second.content
    assert library.add(kohya("x"), "c").content == library.add(kohya("y"), "d").content  # whatever it was called
    assert len(list((place / "content").iterdir())) == 2
    library.remove("a")
    assert library.find("b").is_dir()
    for name in "bcd":
        library.remove(name)
    assert library.listed() == []
    assert everything(place) == {}


def test_replacing_keeps_the_new_one_alone(peft, place):
    library.add(peft(1), "a", tags=["old"])
    before = everything(place)
    with pytest.raises(AdapterError, match="already"):
        library.add(peft(2), "a")
    assert everything(place) == before
    new = library.add(peft(2), "A", force=True)
    assert library.listed() == [new]
    assert bytes_of(library.find("a")) == bytes_of(peft(2))
    assert len(list((place / "content").iterdir())) == 1


def test_what_is_said_goes_before_what_the_files_say(kohya, peft):
    made = peft(name="carded")
    (made / "README.md").write_text(
        "---\nlicense: mit\nbase_model: [a/b]\ninstance_prompt: sks\ntags: [x]\n---\n\n# It\n", encoding="utf-8"
    )
    entry = library.add(made)
    assert (entry.licence, entry.base, entry.triggers, entry.tags) == ("mit", "a/b", ["sks"], [])
    entry = library.add(made, "b", tags=["t", "t", " ", "t\n"], triggers=["y"], licence="own", note="of mine")
    assert (entry.licence, entry.triggers, entry.tags, entry.note) == ("own", ["y"], ["t"], "of mine")


def test_search_asks_for_every_word_in_names_tags_triggers_and_bases(kohya, peft):
    library.add(peft(), "red-house", tags=["Building"])
    library.add(kohya(), "hat", triggers=["RED hat"])
    found = {word: [entry.name for entry in library.search(word.split())] for word in (
        "red", "RED buil", "smollm2", "hat", "red_house", "%", "", "red nothing"
    )}  # fmt: skip
    assert found == {
        "red": ["hat", "red-house"],
        "RED buil": ["red-house"],
        "smollm2": ["red-house"],
        "hat": ["hat"],
        "red_house": [],
        "%": [],
        "": ["hat", "red-house"],
        "red nothing": [],
    }


def test_a_trainers_own_files_and_pickles_stay_behind(peft):
    made = peft()
    for name in ("optimizer.pt", "training_args.bin", ".hidden", "tokenizer.json"):
        (made / name).write_bytes(b"x")
    (made / "checkpoint-1").mkdir()
    said: list[str] = []
    entry = library.add(made, "a", report=said.append)
    assert entry.files.keys() == {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
    assert said == ["left out, as no part of the adapter: checkpoint-1, optimizer.pt, training_args.bin"]


def test_links_are_followed_and_kept_as_files(peft, kohya, tmp_path):
    made, linked = peft(), tmp_path / "linked"
    linked.mkdir()
    for path in made.iterdir():  # as the hub's cache is made
        (linked / path.name).symlink_to(path)
    (tmp_path / "whole").symlink_to(made, target_is_directory=True)
    contents = {library.add(path, f"a{i}").content for i, path in enumerate((made, linked, tmp_path / "whole"))}
    assert len(contents) == 1
    assert not any(path.is_symlink() for path in library.find("a1").iterdir())
    (tmp_path / "link.safetensors").symlink_to(kohya())
    assert not library.find(library.add(tmp_path / "link.safetensors").name).is_symlink()


def _torn(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-8])
    return path


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda peft, kohya: peft().with_name("nothing"), "nothing: there is no such file or folder"),
        (lambda peft, kohya: _torn(kohya()), "hat.safetensors is not a whole safetensors file"),
        (
            lambda peft, kohya: _torn(peft() / "adapter_model.safetensors").parent,
            r"made/peft-1/adapter_model.saf.* whole",
        ),
        (lambda peft, kohya: kohya().rename(kohya().with_suffix(".pt")), r"hat.pt is a pickle.*never kept"),
        (lambda peft, kohya: kohya().rename(kohya().with_suffix(".txt")), r"hat.txt is no adapter: expected"),
        (lambda peft, kohya: [kohya("a"), kohya("b")][0].parent, "made has several files, name one: a.saf.*, b.saf"),
        (lambda peft, kohya: Path("/dev/null"), "/dev/null is neither a file nor a folder"),
    ],
)
def test_what_is_no_adapter_is_refused_and_leaves_nothing(peft, kohya, place, make, words):
    path = make(peft, kohya)
    with pytest.raises(AdapterError, match=words):
        library.add(path)
    assert everything(place) == {}


def test_a_name_that_says_nothing_gives_way_to_the_folders(peft, kohya):
    made = kohya("pytorch_lora_weights").rename(
        peft(name="style").parent / "style" / "pytorch_lora_weights.safetensors"
    )
    assert library.add(made).name == "style"
    assert library.add(peft(name="style/adapter") / "adapter_model.safetensors", "a").files.keys() == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    alone = kohya("hat").parent / "downloads"
    alone.mkdir()
    kohya("hat").rename(alone / "hat.safetensors")
    assert library.add(alone).name == "hat"  # the one that is in it


def test_a_run_gives_its_adapter_with_what_its_recipe_and_samples_say(peft, tmp_path):
    run = tmp_path / "runs" / "quickstart-3"
    shutil.copytree(peft(), run / "adapter")
    (run / "recipe.yaml").write_text("base: smollm2-360m\n")
    (run / "metrics.jsonl").write_text("{}\n")
    (run / "samples").mkdir()
    answers = [{"prompt": "name: Inn", "base": "?", "adapted": "The Inn is a pub."}, {"prompt": "b", "adapted": "c"}]
    (run / "samples" / "answers.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    (run / "samples" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n first")
    (run / "samples" / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n second")
    assert library.find(str(run)) == run / "adapter"
    entry = library.add(run)
    assert (entry.name, entry.base, entry.origin) == ("quickstart-3", "smollm2-360m", {"run": str(run)})
    assert entry.sample == "name: Inn\n\nThe Inn is a pub."
    assert library.preview_of(entry).read_bytes().endswith(b"second")
    assert bytes_of(library.find("quickstart-3")) == bytes_of(run / "adapter")


def test_a_preview_is_a_picture(kohya, tmp_path):
    made = kohya()
    beside = made.with_name("hat.preview.png")
    beside.write_bytes(b"no picture")
    assert library.add(made, "a").preview == ""
    with pytest.raises(AdapterError, match=r"hat.preview.png: expected a PNG, JPEG or WebP picture"):
        library.add(made, "b", preview=beside)
    beside.write_bytes(b"\xff\xd8\xff picture")
    entry = library.add(made, "c")
    assert library.preview_of(entry).name == "preview.jpg"
    assert library.preview_of(entry).read_bytes() == beside.read_bytes()
    library.remove("c")
    assert not library.preview_of(entry)
    assert library.verify() == []


def test_a_pickle_is_refused_whatever_its_name(kohya, place):
    made = kohya()
    torch.save({"x.lora_A": torch.ones(2, 2), "x.lora_B": torch.ones(2, 2)}, made)
    with pytest.raises(AdapterError, match=r"hat.safetensors is not a whole safetensors file"):
        library.add(made)
    assert everything(place) == {}


def test_what_a_strangers_file_says_steers_no_terminal(kohya):
    made = kohya(modelspec__trigger_phrase="a\x1b[31mb, \u202ec", ss_sd_model_name="x\0y")
    entry = library.add(made)
    assert entry.triggers == ["a\ufffd[31mb, \ufffdc"]
    assert entry.base == "x\ufffdy"
    assert library.get("hat") == entry


def test_the_index_is_only_a_cache(peft, place):
    old = place / "index-1.sqlite"
    entries = [library.add(peft(i), f"a{i}") for i in range(3)]
    for harm in (lambda: old.unlink(), lambda: old.write_bytes(b"no database" * 100), lambda: old.write_bytes(b"")):
        library.listed()
        harm()
        assert library.listed() == entries
    old.write_bytes(b"no database" * 100)
    assert [fault.where for fault in library.verify()] == ["index-1.sqlite"]
    library.remove("a0")
    assert library.verify() == []
    assert library.listed() == entries[1:]


def test_an_entry_changed_by_hand_is_seen_also_within_one_tick_of_the_clock(peft, place):
    library.add(peft(), "a")
    path = place / "entries" / "a.json"
    now = path.stat().st_mtime_ns
    for tag in ("old", "new"):  # of one length, in one file, at one time
        path.write_text(json.dumps(json.loads(path.read_text()) | {"tags": [tag]}))
        os.utime(path, ns=(now, now))
        assert library.search([tag])


def test_what_would_be_too_long_to_read_again_is_refused(peft, place):
    with pytest.raises(AdapterError, match=r"what is said of 'a' is too long: expected at most \d+ bytes"):
        library.add(peft(), "a", note="x" * 5_000_000)
    assert everything(place) == {}


def test_no_library_is_an_empty_one(place):
    assert library.listed() == library.search(["x"]) == library.verify() == library.unreadable() == []
    assert not place.exists()


def test_without_a_word_it_is_where_the_platform_keeps_data(monkeypatch):
    import platformdirs

    monkeypatch.delenv("VENEER_LIBRARY")
    assert library.folder() == platformdirs.user_data_path("veneer", appauthor=False) / "library"
    monkeypatch.setenv("VENEER_LIBRARY", "~/adapters")
    assert library.folder() == Path.home() / "adapters"


def test_a_list_loads_no_torch(peft, place):
    library.add(peft(), "a")
    os.utime(place / "entries" / "a.json", (0, 0))
    library.listed()
    program = "import sys; from veneer import library; print(library.search(['a'])[0].name, 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "a False\n"


def test_the_public_names_are_declared_once_each_way():
    assert sorted(library.__all__) == sorted(library._HOMES)
    assert all(getattr(library, name).__name__ == name for name in library.__all__)
    with pytest.raises(AttributeError, match=r"module .veneer.library. has no attribute .ad."):
        _ = library.ad
