"""Let the disk be full from some call on that changes it, and let the run go on later; compare what it ends with.

    python filling.py RECIPE FIRST EVERY [OVERRIDE …]

Every so-manieth call of a run is tried, from the first one on, with its own cache, until a run ends before it. Prints
{"tried": …, "wrong": [what did not end with one sentence], "ends": {sha256: how often}, "undisturbed": sha256}.

Nothing can be written from that call on: files have no room (RLIMIT_FSIZE), and, every second time, the call itself is
refused (ENOSPC). Renaming, and files without bytes, go on as they do on a disk that is full.
"""

import errno
import json
import os
import resource
import sys
from collections import Counter
from functools import partial
from pathlib import Path

from killing import attempt, ended, ready, result_of

CHANGING = ("os.rename", "os.mkdir", "os.remove", "os.rmdir")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def full_at(number: int) -> None:
    """Let the disk be full from this call on, of those that open a file to write, flush, rename or add a folder."""
    calls = 0
    flush = os.fsync

    def counted(what: str) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            if number % 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), what)

    def hook(event: str, arguments: tuple) -> None:
        if event in CHANGING or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING):
            counted(str(arguments[0]))

    def fsync(descriptor: int) -> None:
        counted(os.readlink(f"/proc/self/fd/{descriptor}"))
        flush(descriptor)

    os.fsync = fsync
    sys.addaudithook(hook)


def fault(code: int, said: str) -> str | None:
    """What is wrong with how a run on a full disk ended, if anything is."""
    lines = said.strip().splitlines() or [""]
    if code != 2 or "Traceback" in said or not lines[-1].startswith("error: "):
        return f"exit code {code}: {said[-1500:]}"
    if os.sep not in lines[-1]:
        return f"no file is named: {lines[-1]}"
    return None


def main(recipe: str, first: int, every: int, *more: str) -> dict:
    ready(recipe)
    folder = Path(recipe).parent
    assert ended(attempt(recipe, folder / "undisturbed", *more, VENEER_CACHE=str(folder / "cache-undisturbed")))
    ends, wrong, number = Counter(), [], first
    while True:
        output, cache = folder / f"full-{number}", str(folder / f"cache-{number}")
        reading, told = os.pipe()
        child = attempt(recipe, output, *more, first=partial(full_at, number), told=told, VENEER_CACHE=cache)
        os.close(told)
        with os.fdopen(reading, errors="replace") as words:
            said = words.read()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == 0:
            break
        if problem := fault(code, said):
            wrong.append(f"call {number}: {problem}")
        assert ended(attempt(recipe, output, *more, VENEER_CACHE=cache))
        ends[result_of(output)] += 1
        number += every
    return {"tried": sum(ends.values()), "wrong": wrong, "ends": ends, "undisturbed": result_of(folder / "undisturbed")}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])))
