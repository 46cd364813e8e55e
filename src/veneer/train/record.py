"""The run folder: what a run leaves behind. metrics.jsonl grows by lines, every other file is written whole."""

import json
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from veneer.core.errors import AdapterError
from veneer.safe.whole import to_disk, write_whole
from veneer.train.trackers import About, Tracker, trackers

USAGE = "veneer.json"  # beside an adapter: how it is used
METRICS, FACTS, LOCK = "metrics.jsonl", "run.json", ".lock"


class Run:
    """`<output>/<name>-<number>/`, held by one process at a time."""

    writes = True
    trackers: Sequence[Tracker] = ()

    def __init__(self, folder: Path) -> None:
        """Take hold of a run's folder. Raises `AdapterError` when another process has it."""
        self.folder = folder
        self.allowed: dict[str, Any] = {}  # what is noted of a run that goes on though something has changed
        self._lock = FileLock(folder / LOCK, timeout=0)
        try:
            self._lock.acquire()
        except Timeout:
            raise AdapterError(f"{folder} is the run of a process that is still at work") from None
        except OSError as error:
            raise AdapterError(f"{folder} cannot be written: {error.strerror or error}") from error

    @classmethod
    def fresh(cls, output: str, name: str) -> "Run":
        """Make the folder, with a number that no run has yet. Raises `AdapterError` when it cannot be written."""
        parent = Path(output).expanduser()
        try:
            parent.mkdir(parents=True, exist_ok=True)
            folder = _next_folder(parent, name)
        except OSError as error:
            raise AdapterError(f"output {parent}: cannot make the run's folder: {error.strerror or error}") from error
        try:
            return cls(folder)
        except AdapterError:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def release(self) -> None:
        """Let other processes have it."""
        with suppress(AdapterError):  # of a run that ends with an error of its own
            self.untrack()
        self._lock.release()

    def track(self, names: Sequence[str], recipe: Mapping[str, Any], step: int) -> None:
        """Tell what is measured from `step` on to the trackers of these names too."""
        identity = facts_of(self.folder).get("identity") or uuid.uuid4().hex[:12]
        self.note(identity=identity)
        self.trackers = trackers(names, About(self.folder, identity, recipe, step))

    def untrack(self) -> None:
        """Let the trackers write what they still hold."""
        ended, self.trackers = self.trackers, ()
        for tracker in ended:
            tracker.end()

    def discard(self) -> None:
        """Take the folder away again, for a run that could not begin."""
        self.release()
        shutil.rmtree(self.folder, ignore_errors=True)

    def note(self, **facts: Any) -> None:
        """Write down what is known of the run as a whole, beside what was."""
        self.write(FACTS, json.dumps({**facts_of(self.folder), **facts}, indent=2) + "\n")

    @property
    def adapter(self) -> Path:
        """Where the adapter is."""
        return self.folder / "adapter"

    def write(self, name: str, text: str) -> Path:
        """Write a text file of the run, whole or not at all."""
        with self._writing(name) as path:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole({path: lambda temporary: temporary.write_text(text, encoding="utf-8")})
        return path

    def draw(self, name: str, draw: Callable[[Path], object]) -> None:
        """Let `draw` make a picture of the run, which it writes whole or not at all."""
        with self._writing(name) as path:
            path.parent.mkdir(parents=True, exist_ok=True)
            draw(path)

    @contextmanager
    def _writing(self, name: str) -> Iterator[Path]:
        """The path of a file; it is the one that an `OSError` is about, which becomes an `AdapterError`."""
        path = self.folder / name
        try:
            yield path
        except OSError as error:
            raise AdapterError(f"cannot write {path}: {error.strerror or error}") from error

    def measure(self, record: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl, and tell the trackers."""
        with self._writing(METRICS) as path, path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(record) + "\n")
        for tracker in self.trackers:
            tracker.tell({key: value for key, value in record.items() if key != "step"}, record["step"])

    def flush(self) -> None:
        """Wait until what was measured is on the disk."""
        with self._writing(METRICS) as path:
            if path.exists():
                to_disk(path)

    def metrics(self) -> list[dict[str, Any]]:
        """What was measured so far."""
        return read_metrics(self.folder)

    def cut_back(self, step: int, measured: int) -> None:
        """Forget the steps after `step`, and the held-out figures after `measured`; and those of the end, which are of
        the best step where it is left.
        """
        kept, last = list[dict[str, Any]](), -1
        for record in self.metrics():
            if "loss" in record and record["step"] <= step:
                kept.append(record)
            elif "loss" not in record and last < record["step"] <= measured:
                kept.append(record)
                last = record["step"]
        self.write(METRICS, "".join(json.dumps(record) + "\n" for record in kept))


class Elsewhere(Run):
    """The same run in a process that writes nothing of it."""

    writes = False

    def __init__(self, folder: Path) -> None:
        self.folder, self.allowed = folder, {}

    def release(self) -> None:
        pass

    discard = flush = untrack = release

    def track(self, names: Sequence[str], recipe: Mapping[str, Any], step: int) -> None:
        pass

    def write(self, name: str, text: str) -> Path:
        return self.folder / name

    def draw(self, name: str, draw: Callable[[Path], object]) -> None:
        pass

    def measure(self, record: dict[str, Any]) -> None:
        pass

    def metrics(self) -> list[dict[str, Any]]:
        return []


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """What was measured in a run; a line that was cut off in its middle is none."""
    path, records = folder / METRICS, []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        with suppress(ValueError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict) and _is_record(record)]


def _is_record(record: dict[str, Any]) -> bool:
    numbers = all(isinstance(value, int | float) for value in record.values())
    return numbers and isinstance(record.get("step"), int)


def is_held(folder: Path) -> bool:
    """Whether a process is at work on the run."""
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except (Timeout, OSError) as error:
        return isinstance(error, Timeout)
    lock.release()
    return False


def facts_of(folder: Path) -> dict[str, Any]:
    """What is known of a run as a whole: its `state` and what it was made of; nothing where it does not say."""
    try:
        facts = json.loads((folder / FACTS).read_bytes())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def runs_named(output: str, name: str) -> list[Path]:
    """The folders of the runs of that name, the newest first."""
    parent = Path(output).expanduser()
    numbers = {path: _number(path, name) for path in (parent.iterdir() if parent.is_dir() else ())}
    return sorted((path for path, number in numbers.items() if number), key=lambda path: -numbers[path])


def _next_folder(parent: Path, name: str) -> Path:
    """The first `<name>-<number>` that is free, made now, so that two runs never share one."""
    number = max((_number(path, name) for path in parent.iterdir()), default=0) + 1
    while True:
        folder = parent / f"{name}-{number}"
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
            continue
        return folder


def _number(path: Path, name: str) -> int:
    match = re.fullmatch(rf"{re.escape(name)}-(\d+)", path.name)
    return int(match[1]) if match else 0


def peak_memory() -> int:
    """The most bytes that this process has held: of the CUDA device where one was used, else of main memory."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    if os.name == "nt":
        import psutil

        return int(getattr(psutil.Process().memory_info(), "peak_wset", 0))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def held_memory() -> int:
    """The bytes of main memory that this process holds now."""
    if sys.platform == "linux":
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import psutil

    return int(psutil.Process().memory_info().rss)


def stamp() -> str:
    """Now, for a model card."""
    return time.strftime("%Y-%m-%d", time.gmtime())
