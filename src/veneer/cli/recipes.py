"""`veneer recipes`: what is shipped, what it says, and a copy to edit."""

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from veneer import recipes
from veneer.core.errors import AdapterError

app = typer.Typer(help="The shipped recipes.", no_args_is_help=False)


@app.callback(invoke_without_command=True)
def listing(context: typer.Context) -> None:
    """List the shipped recipes (also: show NAME, copy NAME FILE, keys)."""
    if context.invoked_subcommand is not None:
        return
    width = max(map(len, recipes.names()))
    for name in recipes.names():
        print(f"{name:{width}}  {recipes.summary(name)}")
    print("\n`veneer train NAME` runs one; `veneer recipes copy NAME FILE` gives you a copy to edit", file=sys.stderr)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A shipped recipe, or a file.")],
    whole: Annotated[bool, typer.Option("--resolved", help="With every key and default spelled out.")] = False,
) -> None:
    """Print a recipe."""
    if not whole:
        print(recipes.find(name).read_text(encoding="utf-8"), end="")
        return
    from veneer.train.run import read_recipe
    from veneer.train.settings import as_yaml, resolved

    print(as_yaml(resolved(read_recipe(name)[0])), end="")


@app.command()
def copy(
    name: Annotated[str, typer.Argument(help="A shipped recipe.")],
    file: Annotated[Path, typer.Argument(help="Where the copy goes.")],
) -> None:
    """Write a recipe to a file of yours; nothing is overwritten."""
    source = recipes.find(name)
    # the data of a shipped recipe stays where it is: name it in full
    text = re.sub(r"(?<=: )recipe:", f"{source.parent}/", source.read_text(encoding="utf-8"))
    try:
        with file.open("x", encoding="utf-8") as target:
            target.write(text)
    except FileExistsError:
        raise AdapterError(f"{file} exists already; nothing was written") from None
    except OSError as error:
        raise AdapterError(f"{file} cannot be written: {error.strerror}") from error
    print(file)


@app.command()
def keys(
    task: Annotated[str, typer.Argument(help="The task whose keys are listed.")] = "causal-lm",
) -> None:
    """List every key that a recipe may have, with its default and meaning."""
    from rich.console import Console
    from rich.table import Table

    from veneer.train.settings import described
    from veneer.train.tasks import task_named

    table = Table("key", "default", "meaning", box=None, pad_edge=False, padding=(0, 2, 1, 0))
    for key, default, text in described(task_named(task).settings):
        table.add_row(key, default, text)
    Console().print(table)
