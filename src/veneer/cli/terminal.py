"""What a person sees of a run: a live line on a terminal, plain lines elsewhere."""

import sys
import time
from collections import deque
from types import TracebackType

from rich.console import Console
from rich.status import Status

from veneer.train.card import NAMES
from veneer.train.record import peak_memory
from veneer.train.task import Reporter

LINE_EVERY = 10.0  # seconds between two lines where there is no terminal


class TerminalReporter(Reporter):
    """Progress on stderr; stdout stays for results."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self._status: Status | None = None
        self._last_line = 0.0
        self._recent: deque[tuple[float, float]] = deque(maxlen=20)  # (seconds, what went through) of the last steps

    def __enter__(self) -> "TerminalReporter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def say(self, text: str) -> None:
        self._end()
        self.console.print(text, markup=False, soft_wrap=True)

    def progress(self, what: str, done: int, total: int) -> None:
        if done >= total:
            self._end()
        else:
            self._live(f"{what}: {done} of {total}")

    def measured(self, record: dict[str, float]) -> None:
        figures = ", ".join(f"{NAMES.get(key, key)} {value:.3f}" for key, value in record.items() if key != "step")
        self.say(f"after step {record['step']}: {figures}")

    def step(self, record: dict[str, float], steps: int, unit: str) -> None:
        done = int(record["step"])
        self._recent.append((record["seconds"], record[unit]))
        a_step = record["seconds"] / done
        text = (
            f"step {done}/{steps}  loss {record['loss']:.3f}  {_rate(self._a_second())} {unit}/s  "
            f"{_clock((steps - done) * a_step)} left  {peak_memory() / 1e9:.1f} GB"
        )
        self._live(text, last=done == steps)

    def _a_second(self) -> float:
        (first, _), (last, _) = self._recent[0], self._recent[-1]
        if last == first:
            return self._recent[-1][1] / max(last, 1e-9)
        return sum(amount for _, amount in list(self._recent)[1:]) / (last - first)

    def _live(self, text: str, last: bool = False) -> None:
        if self.console.is_terminal:
            if self._status is None:
                self._status = self.console.status(text)
                self._status.start()
            self._status.update(text)
        now = time.monotonic()
        if last or (not self.console.is_terminal and now - self._last_line >= LINE_EVERY):
            self._last_line = now
            self._end()
            print(text, file=sys.stderr, flush=True)

    def _end(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(count: float) -> str:
    """Bytes for people: 4.9 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("not reached")
