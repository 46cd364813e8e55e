"""The runs of a folder: what each came to."""

import time
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
    best: float | None  # the lowest held-out loss
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
    losses = [record["eval_loss"] for record in measured if "eval_loss" in record]
    files = [path.stat() for path in folder.rglob("*") if path.is_file()]
    state = facts.get("state", "cut short")
    if state in ("running", "interrupted"):
        state = "running" if is_held(folder) else "cut short"
    return Summary(
        folder.name,
        folder,
        state,
        steps[-1]["step"] if steps else 0,
        int(facts.get("planned", 0)),
        {key: value for key, value in (measured[-1] if measured else {}).items() if key != "step"},
        min(losses, default=None),
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


def differing(folders: list[Path]) -> dict[str, list[Any]]:
    """The keys of the recipes that are not the same in all of these runs, with each run's value."""
    asked = [facts_of(folder).get("asked", {}) for folder in folders]
    keys = dict.fromkeys(key for own in asked for key in own)
    values = {key: [own.get(key) for own in asked] for key in keys}
    return {key: own for key, own in values.items() if any(value != own[0] for value in own)}


def when(seconds: float) -> str:
    """A moment, for people."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
