"""Many at once, killed at any moment, a full disk, a library that may only be read: in real processes."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")

MEMORY = Path("/dev/shm")


@pytest.fixture(autouse=True)
def place(place, monkeypatch):
    """In memory where there is such a folder: processes die there as anywhere, and no disk is waited for."""
    if not os.access(MEMORY, os.W_OK):
        yield place
        return
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        os.chmod(folder, 0o755)  # for the test in which somebody else looks
        monkeypatch.setenv("VENEER_LIBRARY", f"{folder}/library")
        yield Path(folder) / "library"


BEGIN = """
import os, random, signal, sys, time
import torch
from veneer import AdapterError, library
torch.set_num_threads(1)
contents = sys.argv[1:]
place = library.folder()
for content in contents:  # what children need is loaded once
    library.add(content, "first", force=True)
library.remove("first")

def whole():
    faults = library.verify()
    assert faults == [], faults
    assert os.listdir(place / "unfinished") == [], os.listdir(place / "unfinished")
    entries = library.listed()
    kept = set(os.listdir(place / "content"))
    assert kept == {entry.content for entry in entries}, (kept, entries)
    assert len(os.listdir(place / "entries")) == len(entries)
    return {entry.name: entry for entry in entries}

def child(work):
    process = os.fork()
    if process:
        return process
    try:
        os._exit(work() or 0)
    except AdapterError as error:
        os._exit(3 if "already" in str(error) else 4)
    finally:
        os._exit(5)
"""


def run(program: str, *contents: Path, **settings: object) -> str:
    command = [sys.executable, "-c", BEGIN + program, *map(str, contents)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, **settings)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_eight_at_once_with_names_and_contents_of_their_own_and_in_common(peft, kohya):
    program = """
def at_once(*works):
    processes = [child(work) for work in works]
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    print(*sorted(codes), sep="")

def adding(content, name, **settings):
    return lambda: library.add(contents[content % len(contents)], name, **settings) and 0

def both(i):
    library.add(contents[0], f"d{i}")
    library.remove(f"d{i}")

at_once(*(adding(i, f"a{i}") for i in range(8)))  # other names; a content for two of them each
assert len(whole()) == 8
at_once(*(adding(i, "c") for i in range(8)))  # one name: one has it
assert len(whole()) == 9
at_once(*(adding(i, "c", force=True) for i in range(8)))  # and the last has it
at_once(*(lambda i=i: both(i) for i in range(8)))  # a content that is taken away while others add it
assert len(whole()) == 9
at_once(*(lambda i=i: library.remove(f"a{i}") for i in range(8)))
assert list(whole()) == ["c"]
"""
    contents = [peft(1), peft(2), kohya("k1", 1), kohya("k2", 2)]
    said = run(program, *contents)
    assert said.split() == ["0" * 8, "0" + "3" * 7, "0" * 8, "0" * 8, "0" * 8]


def test_killed_at_random_moments_it_is_whole_and_what_was_told_is_true(peft, kohya):
    program = """
rng, told, total = random.Random(0), {}, 0
library.add(contents[0], "n0")
began = time.monotonic()
library.add(contents[0], "n0", force=True)
usual = time.monotonic() - began  # on this disk, as busy as it is
for kill in range(24):
    reader, writer = os.pipe()

    def work():
        chance = random.Random(kill)
        while True:
            name, content = f"n{chance.randrange(4)}", chance.randrange(len(contents))
            adding = chance.random() < 0.6
            os.write(writer, f"begin {name}\\n".encode())
            if adding:
                key = library.add(contents[content], name, force=True).content
            else:
                key = "-"
                try:
                    library.remove(name)
                except AdapterError:
                    pass
            os.write(writer, f"done {name} {key}\\n".encode())

    process = child(work)
    time.sleep(rng.random() * 6 * usual)
    os.kill(process, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -9
    os.close(writer)
    with os.fdopen(reader) as lines:
        for line in lines:
            said, name, *key = line.split()
            told[name] = key[0] if key else None
            total += bool(key)
    there = {name: entry.content for name, entry in whole().items()}
    for name, key in told.items():
        if key is not None:  # else it was being changed
            assert there.get(name, "-") == key, (kill, name, key, there)
    told = {name: there.get(name, "-") for name in told}
print(total)
"""
    assert int(run(program, *(peft(i) for i in range(3)), kohya())) > 5


# A change, killed at each step that writes, leaves what was there before, or what would be there after.
EACH_STEP = """
STEPS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}
def killed_at(last, work):
    count = 0
    def step(event, arguments):
        nonlocal count
        # what is written, not what is read
        if event in STEPS and not (event == "open" and arguments[2] & 3 == 0):
            count += 1
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)
    def hooked():
        sys.addaudithook(step)
        work()
    return os.waitstatus_to_exitcode(os.waitpid(child(hooked), 0)[1])

def state():
    return {name: entry.content for name, entry in whole().items()}

def each_step(work, undo):
    undo()
    before = state()
    assert killed_at(0, work) == 0
    after, step = state(), 0
    assert after != before
    while True:
        undo()
        step += 1
        code = killed_at(step, work)
        now = state()
        assert now in (before, after), (step, now)
        if code == 0:
            break
        assert code == -9
    print(step)

def forget(*names):
    for name in names:
        if name in state():
            library.remove(name)
"""


def test_killed_at_each_step_it_is_as_before_or_as_after(peft):
    program = """
library.add(contents[0], "a")
each_step(lambda: library.add(contents[1], "b") and None, lambda: forget("b"))
each_step(lambda: library.add(contents[0], "c") and None, lambda: forget("c"))
each_step(lambda: library.add(contents[1], "a", force=True) and None, lambda: library.add(contents[0], "a", force=True))
forget("a")
each_step(lambda: library.remove("d"), lambda: library.add(contents[1], "d", force=True))
"""
    steps = [int(count) for count in run(EACH_STEP + program, peft(1), peft(2)).split()]
    assert len(steps) == 4
    assert all(count > 5 for count in steps)


def test_a_full_disk_is_one_error_and_nothing_is_half_done(peft):
    program = """
import resource
library.add(contents[0], "a")
before = {name: entry.content for name, entry in whole().items()}
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in (0, 100, 300, 500):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    for call in (lambda: library.add(contents[1], "b"), lambda: library.add(contents[1], "a", force=True)):
        try:
            call()
        except AdapterError as error:
            assert f"the library {place} cannot be changed" in str(error), error
            assert "File too large" in str(error), error
        else:
            raise AssertionError("nothing was refused")
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert {name: entry.content for name, entry in whole().items()} == before
"""
    run(program, peft(1), peft(2))


def test_a_library_that_may_only_be_read_is_read(peft, place, tmp_path):
    program = """
import filelock, platformdirs
assert library.verify() == []  # all that is needed is loaded while it may be
library.add(contents[0], "a")
library.listed()
os.utime(place / "entries" / "a.json", (0, 0))  # so that the index has something to take in
paths = [place, *place.rglob("*")]
for path in paths:
    path.chmod(0o555 if path.is_dir() else 0o444)
if os.getuid() == 0:
    os.setegid(65534)
    os.seteuid(65534)  # nobody, who may not do all that root may
assert [entry.name for entry in library.listed()] == ["a"]
assert [entry.name for entry in library.search(["smol"])] == ["a"]
assert library.find("a").is_dir()
assert library.verify() == []
for call in (lambda: library.add(library.find("a"), "b"), lambda: library.remove("a"), lambda: library.verify(True)):
    try:
        call()
    except AdapterError as error:
        assert "cannot be changed" in str(error), error
    else:
        raise AssertionError("it was changed")
os.seteuid(os.getuid())
for path in paths:
    path.chmod(0o755 if path.is_dir() else 0o644)
"""
    if os.getuid() == 0 and place.is_relative_to(tmp_path):
        pytest.skip("root's own folders, in which nobody else may look")
    run(program, peft())
