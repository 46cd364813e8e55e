"""`veneer evaluate`: the held-out figures of a run's adapter, and of its base, on other rows."""

from typing import Annotated

import typer


def evaluate(
    run: Annotated[str, typer.Argument(metavar="RUN_OR_ADAPTER", help="A run's folder, or an adapter's.")],
    data: Annotated[
        str | None,
        typer.Option("--data", help="A file or hub dataset with rows; the run's held-out ones, if not said."),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY.SUB=VALUE", help="Another value for a key of the recipe.")
    ] = None,
    base: Annotated[bool, typer.Option("--base/--no-base", help="Measure the base without the adapter too.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Measure an adapter on rows: loss, and what the task is judged by."""
    import json

    from veneer.cli.terminal import TerminalReporter
    from veneer.train.card import NAMES
    from veneer.train.evaluate import measured

    with TerminalReporter() as reporter:
        found = measured(run, data, overrides or (), base, reporter)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("", *found, box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for key in next(iter(found.values())):
        table.add_row(NAMES.get(key, key), *(f"{figures[key]:.3f}" for figures in found.values()))
    Console(highlight=False).print(table)
