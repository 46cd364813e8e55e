"""The runs of a folder: what each came to."""

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.core.errors import AdapterError, nearest
from veneer.train.record import facts_of, is_held, read_metrics


@dataclass
class Summary:
    """What a run came to."""

    name: str
    folder: Path
    state: str  # running, cut short, failed, finished
    steps: int
    planned: int
    figures: dict[str, float]  # the last held-out figures
    best: float | None  # the best of the figure that judges
    judged_by: str
    higher_is_better: bool
    bytes: int  # of the whole folder
    seconds: float
    changed: float  # when something was last written, in seconds since 1970


def summary(folder: Path) -> Summary:
    """One run. Raises `AdapterError` where the folder is none."""
    facts = facts_of(folder)
    if not facts:
        siblings = [str(path) for path in folder.parent.glob("*/") if path != folder]
        what = "is no run: it has no run.json" if folder.is_dir() else "does not exist"
        raise AdapterError(f"{folder} {what}{nearest(str(folder), siblings)}")
    records = read_metrics(folder)
    steps = [record for record in records if "loss" in record]
    measured = [record for record in records if "loss" not in record]
    judged_by, higher = str(facts.get("judged_by", "eval_loss")), facts.get("higher_is_better") is True
    judged = [record[judged_by] for record in measured if judged_by in record]
    files = _files(folder)
    state = str(facts.get("state", "cut short"))
    if state in ("running", "interrupted"):
        state = "running" if is_held(folder) else "cut short"
    return Summary(
        folder.name,
        folder,
        state,
        steps[-1]["step"] if steps else 0,
        planned if isinstance(planned := facts.get("planned"), int) else 0,
        {key: value for key, value in (measured[-1] if measured else {}).items() if key != "step"},
        max(judged, default=None) if higher else min(judged, default=None),
        judged_by,
        higher,
        sum(file.st_size for file in files),
        steps[-1].get("seconds", 0.0) if steps else 0.0,
        max((file.st_mtime for file in files), default=0.0),
    )


def summaries(parent: Path) -> list[Summary]:
    """All runs of a folder, the newest last. Raises `AdapterError` where there is no such folder."""
    if not parent.is_dir():
        raise AdapterError(f"{parent} does not exist: `veneer train` makes it, or name the folder of your runs")
    found = [summary(path) for path in parent.iterdir() if path.is_dir() and facts_of(path)]
    return sorted(found, key=lambda run: run.changed)


def best_of(runs: Sequence[Summary]) -> Summary | None:
    """The run that is best by the figure that judges it."""
    judged = [run for run in runs if run.judged_by in run.figures]
    higher = any(run.higher_is_better for run in judged)
    return min(judged, key=lambda run: run.figures[run.judged_by] * (-1 if higher else 1), default=None)


def _files(folder: Path) -> list[os.stat_result]:
    """Those of the folder; a run at work may take one away at any time."""
    found = list[os.stat_result]()
    for path in folder.rglob("*"):
        with suppress(OSError):
            if path.is_file():
                found.append(path.stat())
    return found


def differing(folders: list[Path]) -> dict[str, list[Any]]:
    """The keys of the recipes that are not the same in all of these runs, with each run's value."""
    asked = [facts_of(folder).get("asked", {}) for folder in folders]
    keys = dict.fromkeys(key for own in asked for key in own)
    values = {key: [own.get(key) for own in asked] for key in keys}
    return {key: own for key, own in values.items() if any(value != own[0] for value in own)}


def when(seconds: float) -> str:
    """A moment, for people."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
