"""Kill a training run again and again, resume it each time, and compare what it ends with.

    python killing.py RECIPE KILLS SEED

prints {"kills": …, "ends": {sha256 of the final adapter: how often}, "undisturbed": sha256}. One process imports all
that is needed and forks a child for each attempt, which so costs what a run costs and not what imports cost.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch


def attempt(
    recipe: str,
    output: Path,
    *more: str,
    at_write: int | None = None,
    first: Callable[[], None] = lambda: None,
    told: int | None = None,
    **environment: str,
) -> int:
    """Start a run in a child, or go on with it; the child's process id. What it says goes to a log, or is `told`."""
    child = os.fork()
    if child:
        return child
    with (output.parent / "log").open("a") as log:
        for number in (1, 2):
            os.dup2(log.fileno() if told is None else told, number)
        os.environ.update(environment)
        code = 1
        try:
            if at_write is not None:
                _kill_at_write(at_write)
            first()
            from veneer.cli import main

            sys.argv = ["veneer", "train", recipe, f"output={output}", "resume=auto", *more]
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    raise AssertionError("not reached")


def _kill_at_write(number: int) -> None:
    """Die at the so-manieth call that changes the disk, half of them before it is made and half after."""
    calls = 0

    def deadly(function):
        def call(*arguments, **named):
            nonlocal calls
            calls += 1
            if calls == number:
                if number % 2:
                    function(*arguments, **named)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **named)

        return call

    for name in ("replace", "fsync", "mkdir", "rename", "unlink", "rmdir"):
        setattr(os, name, deadly(getattr(os, name)))


def result_of(output: Path) -> str:
    """The sha256 of the adapter of the only run there."""
    (adapter,) = output.glob("*/adapter/*.safetensors")
    return hashlib.sha256(adapter.read_bytes()).hexdigest()


def ended(child: int) -> bool:
    """Whether the child came to its end; False where it was killed."""
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return False
    if os.WEXITSTATUS(status):
        raise RuntimeError("a run failed: see the log")
    return True


def is_finished(output: Path) -> bool:
    """Whether the run there came to its end: it may have been killed behind it."""
    return any(json.loads(path.read_text())["state"] == "finished" for path in output.glob("*/run.json"))


def ready(recipe: str) -> None:
    """Import all that a run needs, with nothing begun that a fork would break."""
    torch.set_num_threads(1)
    import matplotlib.figure  # noqa: F401

    from veneer.train.run import read_recipe

    if read_recipe(recipe)[0].task == "causal-lm":
        from veneer.train.language import speaker  # noqa: F401
    else:
        import diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion  # noqa: F401


def main(recipe: str, kills: int, seed: int) -> dict:
    """Half of the kills at random moments, half at calls that change the disk."""
    ready(recipe)
    folder = Path(recipe).parent
    began = time.perf_counter()
    assert ended(attempt(recipe, folder / "undisturbed"))
    lasts = time.perf_counter() - began
    draw, ends, done, number = random.Random(seed), Counter(), 0, 0
    while done < kills:
        output = folder / f"killed-{number}"
        number += 1
        while True:
            by_write = done % 2
            child = attempt(recipe, output, at_write=draw.randint(1, 60) if by_write else None)
            if not by_write:
                time.sleep(draw.uniform(0, lasts))
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            if ended(child):
                break
            done += 1
            if is_finished(output):
                break
        ends[result_of(output)] += 1
    return {"kills": done, "ends": ends, "undisturbed": result_of(folder / "undisturbed")}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
