"""`veneer runs`: what was trained, how far it came, and how runs compare."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.core.errors import AdapterError, shown

if TYPE_CHECKING:
    from veneer.train.runs import Summary

app = typer.Typer(help="The runs of a folder.", no_args_is_help=False)


@app.callback(invoke_without_command=True)
def listing(
    context: typer.Context,
    folder: Annotated[Path, typer.Option("--in", help="The folder that holds the runs.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the runs: state, steps, best figure, size (also: show RUN, compare RUN RUN …)."""
    if context.invoked_subcommand is not None:
        return
    from veneer.train.runs import summaries

    found = summaries(folder)
    if as_json:
        print(json.dumps([_plain(run) for run in found], indent=2))
    elif not found:
        print(f"there is no run in {folder} yet")
    else:
        _print_table(found)


@app.command()
def show(context: typer.Context, run: Annotated[Path, typer.Argument(help="A run's folder, or its name.")]) -> None:
    """What one run was asked, what it came to, and what it keeps."""
    from veneer.train.card import NAMES
    from veneer.train.record import facts_of
    from veneer.train.runs import summary

    run = _place(context, run)
    found, facts = summary(run), facts_of(run)
    _print_table([found])
    print()
    for key, value in found.figures.items():
        print(f"{NAMES.get(key, key):14}{value:.4g}")
    if why := facts.get("why"):
        print(f"it ended with: {why}")
    kept = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    print(f"checkpoints   {', '.join(kept) or 'none'}")
    for change in _list(facts.get("inexact")):
        print(f"went on though {change}")
    made_of = facts.get("made_of")
    for key, value in (made_of if isinstance(made_of, dict) else {}).items():
        print(f"{key:14}{value}")
    if found.state in ("cut short", "failed"):
        print(f"to go on      veneer train {run} --resume")


@app.command()
def compare(
    context: typer.Context,
    runs: Annotated[list[Path], typer.Argument(help="The folders of two runs or more, or their names.")],
    out: Annotated[Path, typer.Option("--out", help="The picture.")] = Path("compare.png"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite the picture.")] = False,
) -> None:
    """Draw the curves of runs in one picture, and say what their recipes have different."""
    from rich.console import Console
    from rich.table import Table

    from veneer.train.drawing.curves import draw_together
    from veneer.train.record import read_metrics
    from veneer.train.runs import differing, summary

    if len(runs) < 2:
        raise AdapterError("compare needs two runs or more")
    if out.exists() and not force:
        raise AdapterError(f"{out} exists already; nothing was written (--force overwrites it, --out names another)")
    runs = [_place(context, run) for run in runs]
    found = [summary(run) for run in runs]
    _print_table(found)
    if other := differing(runs):
        table = Table("recipe", *(run.name for run in found), box=None, pad_edge=False, padding=(0, 3, 0, 0))
        for key, values in other.items():
            table.add_row(key, *map(shown, values))
        Console(highlight=False).print(table)
    names = [run.name if [o.name for o in found].count(run.name) == 1 else str(run.folder) for run in found]
    try:
        draw_together({name: read_metrics(run) for name, run in zip(names, runs, strict=True)}, out)
    except OSError as error:
        raise AdapterError(f"{out} cannot be written: {error.strerror or error}") from error
    print(out)


def _place(context: typer.Context, run: Path) -> Path:
    """The run's folder: where it is said to be, or of that name among the runs that are listed."""
    listed: Path = context.parent.params["folder"] / run if context.parent else run
    return listed if not run.exists() and listed.exists() else run


def _print_table(found: "list[Summary]") -> None:
    from rich.console import Console
    from rich.table import Table

    from veneer.cli.terminal import size
    from veneer.train.card import NAMES
    from veneer.train.runs import when

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    judges = {NAMES.get(run.judged_by, run.judged_by) for run in found}
    judge = judges.pop() if len(judges) == 1 else "best"
    for heading in ("run", "state", "steps", judge, "seconds", "size", "last written"):
        table.add_column(heading, overflow="fold", no_wrap=heading in ("steps", "last written"))
    for run in found:
        steps = f"{run.steps} of {run.planned}" if run.planned else str(run.steps)
        what = f"{NAMES.get(run.judged_by, run.judged_by)} " if judge == "best" else ""
        best = "" if run.best is None else f"{what}{run.best:.3f}"
        table.add_row(run.name, run.state, steps, best, f"{run.seconds:.0f}", size(run.bytes), when(run.changed))
    Console(highlight=False).print(table)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _plain(run: "Summary") -> dict[str, Any]:
    return asdict(run) | {"folder": str(run.folder)}
