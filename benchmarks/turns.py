"""Processes that take turns, a step each, so that what else the machine does meets all of them alike."""

import contextlib
import multiprocessing
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


class Process:
    """A process at the other end of a pipe; its work is called with `Turns` before its inputs, and what it returns is
    the last thing that it says.
    """

    def __init__(self, work: Callable[..., Any], *inputs: Any, name: str = "") -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.name = name or work.__name__
        self.process = context.Process(target=_work, args=(other, work, inputs), daemon=True)
        self.process.start()
        other.close()

    def take(self) -> Any:
        """What it says next. Ends the run when it fails."""
        try:
            said, failed = self.pipe.recv(), None
        except EOFError:
            self.process.join()
            said, failed = None, f"died (exit code {self.process.exitcode}: -9 is usually too little memory)"
        if isinstance(said, dict) and "failure" in said:
            failed = said["failure"]
        if failed:
            raise SystemExit(f"{self.name}: {failed}")
        return said

    def turn(self) -> Any:
        """Let it take a turn."""
        with contextlib.suppress(BrokenPipeError):  # it is dead, which `take` says
            self.pipe.send("go")
        return self.take()


class Turns:
    """Ends a turn with what came of it, and waits for the next; a turn is a step, or what comes before the first."""

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.began, self.computed = pipe, time.perf_counter(), time.process_time()

    def __call__(self, **record: float) -> None:
        from veneer.train.record import peak_memory

        wait()
        seconds, computed = time.perf_counter() - self.began, time.process_time() - self.computed
        self.pipe.send({**record, "seconds": seconds, "cpu seconds": computed, "peak": peak_memory()})
        self.pipe.recv()
        self.began, self.computed = time.perf_counter(), time.process_time()


def wait() -> None:
    """Until the device has done all that it was given."""
    import torch

    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def _work(pipe: Connection, work: Callable[..., Any], inputs: tuple[Any, ...]) -> None:
    try:
        pipe.send(work(Turns(pipe), *inputs))
    except BaseException:
        pipe.send({"failure": traceback.format_exc()})
