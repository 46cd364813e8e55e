"""`veneer models`: the base models that can be had by name."""

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

from veneer import zoo


def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the base models that can be had by name, and which of them are here."""
    rows = [_row(base) for base in zoo.CATALOGUE.values()]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    _print_table(rows)
    for row in rows:
        if row["here"]:
            print(f"{row['name']} is in {row['folder']}")
    print("`veneer pull NAME` fetches one; a base may also be a folder or a hub id (owner/name)")


def _row(base: zoo.Base) -> dict[str, Any]:
    """What is known of one base: the catalogue's entry, and whether and where it is here."""
    here = zoo.is_here(base.name)
    return asdict(base) | {"here": here, "folder": str(zoo.folder_of(base.name)) if here else None}


def _print_table(rows: list[dict[str, Any]]) -> None:
    """Print one line for each base."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("name", "what it is", "parameters", "download", "licence", "here"):
        table.add_column(heading, no_wrap=True, justify="right" if heading in ("parameters", "download") else "left")
    for row in rows:
        download = f"{row['wheel']['download_bytes'] / 1e6:.0f} MB" if row["wheel"] else "shipped"
        sizes = f"{row['parameters'] / 1e6:.0f}M", download
        table.add_row(row["name"], row["summary"], *sizes, row["licence"], "yes" if row["here"] else "no")
    Console().print(table)
