"""The commands, put together."""

from typing import Annotated

import typer

from veneer import __version__
from veneer.cli import (
    combine,
    convert,
    evaluate,
    export,
    extract,
    generate,
    inspect,
    library,
    merge,
    models,
    predict,
    pull,
    recipes,
    resize,
    runs,
    train,
)

app = typer.Typer(
    name="veneer",
    help="Low-rank adapters (LoRA and its family) on any PyTorch model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"veneer {__version__}")
        raise typer.Exit


@app.callback()
def _veneer(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    pass


app.command()(train.train)
app.command()(generate.generate)
app.command()(predict.predict)
app.command()(evaluate.evaluate)
app.command()(inspect.inspect)
app.command()(merge.merge)
app.command()(convert.convert)
app.command()(combine.combine)
app.command()(extract.extract)
app.command()(resize.resize)
app.command()(export.export)
app.command()(models.models)
app.command()(pull.pull)
app.add_typer(library.app, name="library")
app.add_typer(recipes.app, name="recipes")
app.add_typer(runs.app, name="runs")
