"""`veneer train … --sweep KEY=V1,V2`: a run for every combination of values, and a table of what they came to."""

import re
from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING

from veneer.core.errors import AdapterError

if TYPE_CHECKING:
    from veneer.train.run import Result

_COMMAS = re.compile(r",(?![^\[{]*[\]}])")  # between values, and not inside of a list or mapping


def sweep(recipe: str, overrides: Sequence[str], axes: Sequence[str]) -> None:
    """Train all combinations, one after the other. Raises `AdapterError` for values that are none, before the first."""
    from veneer.cli.terminal import TerminalReporter
    from veneer.train import run

    combinations = [list(each) for each in product(*map(values_of, axes))]
    ready = [run.read_recipe(recipe, [*overrides, *own]) for own in combinations]
    results: list[run.Result] = []
    with TerminalReporter() as reporter:
        for number, (own, (settings, task)) in enumerate(zip(combinations, ready, strict=True), 1):
            reporter.say(f"run {number} of {len(combinations)}: {' '.join(own)}")
            results.append(run.run(settings, task, reporter))
            if results[-1].outcome.interrupted:
                break
    if all(result.run.writes for result in results):
        _show(combinations, results)


def values_of(axis: str) -> list[str]:
    """`train.lr=1e-4,3e-4` as an override for each value. Raises `AdapterError`."""
    key, equals, text = axis.partition("=")
    values = [value.strip() for value in _COMMAS.split(text)]
    if not key or not equals or not all(values) or len(set(values)) < len(values):
        raise AdapterError(f"--sweep {axis!r}: expected KEY=VALUE,VALUE,… with values that differ")
    return [f"{key}={value}" for value in values]


def _show(combinations: list[list[str]], results: "list[Result]") -> None:
    from rich.console import Console
    from rich.table import Table

    from veneer.cli.terminal import NAMES

    figures = list(dict.fromkeys(key for result in results for key in result.after))
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for heading in (
        *(own.partition("=")[0] for own in combinations[0]),
        *(NAMES.get(key, key) for key in figures),
        "run",
    ):
        table.add_column(heading, overflow="fold")
    best = _best(results)
    for own, result in zip(combinations, results, strict=False):
        values = [value.partition("=")[2] for value in own]
        measured = [f"{result.after[key]:.4f}" if key in result.after else "" for key in figures]
        table.add_row(*values, *measured, str(result.run.folder), style="bold" if result is best else None)
    console = Console(highlight=False)
    console.print(table)
    if best is not None:
        console.print(f"best: {best.run.folder}", markup=False, soft_wrap=True)


def _best(results: "list[Result]") -> "Result | None":
    measured = [result for result in results if result.judged_by in result.after]
    sign = -1 if any(result.higher_is_better for result in measured) else 1
    return min(measured, key=lambda result: sign * result.after[result.judged_by], default=None)
