"""`veneer train … --sweep KEY=V1,V2`: a run for every combination of values, and a table of what they came to."""

import re
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from veneer.cli.lines import speaks
from veneer.core.errors import AdapterError

if TYPE_CHECKING:
    from veneer.train.settings import Recipe
    from veneer.train.task import Reporter, Task

_COMMAS = re.compile(r",(?![^\[{]*[\]}])")  # between values, and not inside of a list or mapping
Came = Path | AdapterError  # a run's folder, or why there is nothing to compare


def sweep(recipe: str, overrides: Sequence[str], axes: Sequence[str], resume: bool) -> None:
    """Train all combinations, one after the other; what goes wrong in one does not end the others.

    With `resume` (or where the recipe says so) runs that came to their end are taken as they are, and one that was cut
    short goes on. Raises `AdapterError` for values that are none, before the first run, and in the end for runs that
    failed.
    """
    from veneer.cli.terminal import TerminalReporter
    from veneer.train import run
    from veneer.train.processes import join
    from veneer.train.task import Reporter

    keys = [axis.partition("=")[0] for axis in axes]
    if twice := {key for key in keys if keys.count(key) > 1}:
        raise AdapterError(f"--sweep: {', '.join(sorted(twice))} is said twice: name all of its values in one")
    combinations = [list(each) for each in product(*map(values_of, axes))]
    ready = [run.read_recipe(recipe, [*overrides, *own]) for own in combinations]
    came: list[Came] = []
    stopped_by = 0
    world = join(ready[0][0].device)  # once: processes that have parted do not find each other again
    try:
        with TerminalReporter() if speaks() else nullcontext(Reporter()) as reporter:
            for number, (own, (settings, task)) in enumerate(zip(combinations, ready, strict=True), 1):
                reporter.say(f"run {number} of {len(combinations)}: {' '.join(own)}")
                found, stopped_by = _trained(settings, task, reporter, resume)
                if isinstance(found, AdapterError) and (len(combinations) == 1 or world.size > 1):
                    raise found  # of several processes, one may be gone
                came.append(found)
                if stopped_by:
                    break
    finally:
        world.leave()
    if speaks():
        _show(combinations, came)
    _end(came, stopped_by)


def _trained(settings: "Recipe", task: "type[Task]", reporter: "Reporter", resume: bool) -> tuple[Came, int]:
    """What came of one combination, and the signal that stopped it."""
    from veneer.train import run
    from veneer.train.resume import begun_as

    earlier, state = begun_as(settings) if resume or settings.resume == "auto" else (None, "")
    if earlier and state == "finished":
        reporter.say(f"{earlier} came to its end before")
        return earlier, 0
    settings.resume = "never"  # of this recipe's name there are others
    try:
        result = run.run(settings, task, reporter, earlier or False)
    except AdapterError as error:
        reporter.say(f"error: {error}")
        return error, 0
    return result.run.folder, result.outcome.stopped_by


def _end(came: Sequence[Came], stopped_by: int) -> None:
    if stopped_by:
        raise typer.Exit(128 + stopped_by)
    if failed := [error for error in came if isinstance(error, AdapterError)]:
        raise AdapterError(f"{len(failed)} of {len(came)} runs failed; the first: {failed[0]}")


def values_of(axis: str) -> list[str]:
    """`train.lr=1e-4,3e-4` as an override for each value. Raises `AdapterError`."""
    key, equals, text = axis.partition("=")
    values = [value.strip() for value in _COMMAS.split(text)]
    if not key or not equals or not all(values) or len(set(values)) < len(values):
        raise AdapterError(f"--sweep {axis!r}: expected KEY=VALUE,VALUE,… with values that differ")
    return [f"{key}={value}" for value in values]


def _show(combinations: list[list[str]], came: Sequence[Came]) -> None:
    from rich.console import Console
    from rich.table import Table

    from veneer.train.card import NAMES
    from veneer.train.runs import best_of, summary

    found = [None if isinstance(own, AdapterError) else summary(own) for own in came]
    ended = [own for own in found if own and own.state == "finished"]
    figures = list(dict.fromkeys(key for own in ended for key in own.figures))
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    names = [own.partition("=")[0] for own in combinations[0]]
    for heading in (*names, *(NAMES.get(key, key) for key in figures), "run"):
        table.add_column(heading, overflow="fold")
    best = best_of(ended)
    for own, one in zip(combinations, found, strict=False):
        values = [value.partition("=")[2] for value in own]
        of_end = one.figures if one in ended and one else {}
        measured = [f"{of_end[key]:.4f}" if key in of_end else "" for key in figures]
        name = "failed" if one is None else one.name if one in ended else f"{one.name} ({one.state})"
        table.add_row(*values, *measured, name, style="bold" if one is best and best else None)
    console = Console(highlight=False)
    console.print(table)
    if best is not None:
        console.print(f"best: {best.folder}", markup=False, soft_wrap=True)
