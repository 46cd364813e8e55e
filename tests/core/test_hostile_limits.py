"""The worst that a folder can hold: refused at once, in little memory, and nothing of it is run."""

import json
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from veneer import LoraConfig, get_peft_model

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MORE_MEMORY = 512 << 20  # what loading may map beyond what importing torch has

# Loads each folder as the library's user would, with a limit on memory, and says what came of it.
LOADER = """
import json, resource, sys, time, warnings
from torch import nn
from veneer import AdapterError, PeftModel
warnings.simplefilter("ignore")
model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
page = resource.getpagesize()
size = lambda: int(open("/proc/self/statm").read().split()[0]) * page
resource.setrlimit(resource.RLIMIT_AS, (size() + int(sys.argv[1]),) * 2)
said = {}
for folder in sys.argv[2:]:
    start = time.process_time()
    try:
        PeftModel.from_pretrained(model, folder)
        text = "loaded"
    except AdapterError as error:
        text = str(error)
    said[folder] = (text, time.process_time() - start, [type(module).__name__ for module in model.modules()])
print(json.dumps(said))
"""


def _sparse(path: Path, size: int, start: bytes = b"") -> None:
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.write(start)
        file.truncate(size)


def _header(entries: object, length: int | None = None) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


def _factors(rank: int) -> dict[str, dict[str, object]]:
    """A header that is in order, for tensors of that rank."""
    start, entries = 0, {}
    for name, shape in (("0.lora_A", [rank, 6]), ("0.lora_B", [5, rank])):
        end = start + 4 * shape[0] * shape[1]
        entries[f"base_model.model.{name}.weight"] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
        start = end
    return entries


def _vast(folder: Path, rank: int) -> None:
    start = _header(_factors(rank))
    _sparse(folder / WEIGHTS, len(start) + 4 * 11 * rank, start)
    _config(folder, r=rank)


def _wide(folder: Path) -> None:
    entries = _factors(2)
    A, B = entries.values()
    A.update(shape=[2, 8 * 10**9], data_offsets=[0, 64 * 10**9])
    B.update(data_offsets=[64 * 10**9, 64 * 10**9 + 40])
    start = _header(entries)
    _sparse(folder / WEIGHTS, len(start) + 64 * 10**9 + 40, start)


def _config(folder: Path, **values: object) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def _instead(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return change


def _many(folder: Path) -> None:
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    text = _header({f"base_model.model.{i}.lora_A.weight": entry for i in range(15_000)})
    (folder / WEIGHTS).write_bytes(text)


NAMES = [f"q{i}_proj" for i in range(100_000)]
WORST: dict[str, tuple[Callable[[Path], object], str]] = {
    "2^63 bytes of header": (lambda f: (f / WEIGHTS).write_bytes(_header({}, 2**63)), "another kind of file"),
    "a vast header": (lambda f: _sparse(f / WEIGHTS, 1 << 35, _header({}, 1 << 34)), "another kind of file"),
    "a terabyte": (lambda f: _vast(f, 2**40 // 44), "too large: expected at most 68719476736 bytes"),
    "sixteen gigabytes": (lambda f: _vast(f, 2**28), "r should be a whole number from 1 to 1048576, found 268435456"),
    "64 gigabytes that do not fit": (_wide, WEIGHTS),
    "a rank of the config alone": (lambda f: _config(f, r=2**20), r"0.A expected (1048576, 6) found (2, 6)"),
    "a rank beyond all numbers": (lambda f: _config(f, r=10**4000), "r should be a whole number from 1"),
    "a scale beyond all numbers": (lambda f: _config(f, lora_alpha=10**400), "lora_alpha should be a finite number"),
    "many tensors": (_many, "unexpected: *.A (14999)"),
    "1 GB of config": (lambda f: _sparse(f / CONFIG, 1 << 30), "too large: expected at most 4194304 bytes"),
    "deep config": (lambda f: (f / CONFIG).write_text('{"a":' * 800_000), "not valid JSON"),
    "deep values": (lambda f: (f / CONFIG).write_text('{"r":' + "[" * 900 + "]" * 900 + "}"), "r should be a whole"),
    "digits": (lambda f: (f / CONFIG).write_text('{"r": ' + "9" * 4_000_000 + "}"), "not valid JSON"),
    "a long key": (lambda f: _config(f, **{"x" * 4_000_000: 1, "r": 0}), "r should be a whole"),
    "keys that are given twice": (lambda f: (f / CONFIG).write_text('{"r": 2, "r": 3}'), "keys are given twice: 'r'"),
    "an endless expression": (lambda f: _config(f, target_modules="(((.?0?)*)*)*(?=(((.?.?)*)*)*)!"), "matches none"),
    "a large class": (lambda f: _config(f, target_modules="(?i)" + "[\0-\U0010ffff]" * 999), "sets flags"),
    "many names": (lambda f: _config(f, target_modules=NAMES), "'q0_proj' matches no module"),
    "many patterns": (lambda f: _config(f, alpha_pattern=dict.fromkeys(NAMES, 1)), "100000 patterns, of 1 layers"),
    "many expressions": (lambda f: _config(f, rank_pattern={f"{name}$": 1 for name in NAMES}), "rank_pattern should"),
    "many unknown keys": (lambda f: _config(f, r=0, **dict.fromkeys(NAMES, 1)), "and r should be"),
    "a pipe for a config": (_instead(CONFIG, os.mkfifo), "which is no plain file"),
    "a pipe for weights": (_instead(WEIGHTS, os.mkfifo), "which is no plain file"),
    "a folder for weights": (_instead(WEIGHTS, os.mkdir), "which is no plain file"),
    "an endless device": (_instead(WEIGHTS, lambda p: p.symlink_to("/dev/zero")), "which is no plain file"),
    "a log that never ends": (_instead(CONFIG, lambda p: p.symlink_to("/proc/kmsg")), f"{CONFIG} "),
    "a link in a circle": (_instead(CONFIG, lambda p: p.symlink_to(p)), CONFIG),
    "a way out": (_instead(WEIGHTS, lambda p: p.symlink_to("../../../../etc/passwd")), "is not a"),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    get_peft_model(model, LoraConfig(r=2, target_modules=["0"])).save_pretrained(tmp_path / "good")
    return tmp_path / "good"


def _load(folders: list[Path]) -> list[tuple[str, float, list[str]]]:
    run = [sys.executable, "-c", LOADER, str(MORE_MEMORY), *map(str, folders)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout).values())


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_the_worst_is_refused_at_once_and_in_little_memory(folder, tmp_path):
    folders = []
    for i, (spoil, _) in enumerate(WORST.values()):
        folders.append(tmp_path / str(i))
        folders[-1].mkdir()
        for name in (WEIGHTS, CONFIG):
            (folders[-1] / name).write_bytes((folder / name).read_bytes())
        spoil(folders[-1])
    wrong = {}
    for name, (text, seconds, kinds) in zip(WORST, _load(folders), strict=True):
        expected = WORST[name][1].removeprefix("and ")
        if expected not in text or seconds > 1 or len(text) > 5000 or kinds != ["Sequential", "Linear", "Linear"]:
            wrong[name] = (text[:300], len(text), seconds, kinds)
    assert wrong == {}
    assert _load([folder])[0][0] == "loaded"  # in as little memory


class _Runs:
    """A pickle that makes a folder where it is opened."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self.mark,)


def test_no_pickle_is_opened(folder, tmp_path):
    text = pickle.dumps(_Runs(str(tmp_path / "it ran")))
    for name in (WEIGHTS, CONFIG):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(text)
        assert "not" in _load([folder])[0][0]
        (folder / name).write_bytes(before)
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(text)
    assert "a .bin is a pickle, which could run code, and is never opened" in _load([folder])[0][0]
    assert not (tmp_path / "it ran").exists()
    pickle.loads(text)
    assert (tmp_path / "it ran").exists()
