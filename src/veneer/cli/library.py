"""`veneer library`: the adapters of this machine, by name."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from veneer.library import Entry

app = typer.Typer(help="The adapters of this machine, by name.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="The name of an adapter of the library.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command()
def add(
    source: Annotated[str, typer.Argument(metavar="FILE_OR_RUN", help="An adapter's file or folder, or a run's.")],
    name: Annotated[
        str | None, typer.Option(help="What to call it; the file's or folder's own name, if not said.")
    ] = None,
    tag: Annotated[list[str] | None, typer.Option(help="A word to find it by; may be repeated.")] = None,
    trigger: Annotated[list[str] | None, typer.Option(help="A word that calls it up; may be repeated.")] = None,
    licence: Annotated[str, typer.Option(help="Its licence.")] = "",
    preview: Annotated[Path | None, typer.Option(metavar="PICTURE", help="A picture of what it does.")] = None,
    note: Annotated[str, typer.Option(help="A word of your own on it.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Give it the name, if another adapter has it.")] = False,
) -> None:
    """Keep an adapter under a name, which then stands for it in every command."""
    from veneer import library

    entry = library.add(
        source,
        name,
        tags=tag or (),
        triggers=trigger or (),
        licence=licence,
        preview=preview,
        note=note,
        force=force,
        report=_say,
    )
    print(entry.name)


@app.command("list")
def listing(as_json: Json = False) -> None:
    """List all adapters."""
    from veneer import library

    _show(library.listed(), as_json)


@app.command()
def search(
    words: Annotated[
        list[str], typer.Argument(help="Words of names, tags, trigger words or bases; all must be there.")
    ],
    as_json: Json = False,
) -> None:
    """Find adapters."""
    from veneer import library

    _show(library.search(words), as_json)


@app.command()
def show(name: Name, as_json: Json = False) -> None:
    """Say all that is known of an adapter."""
    from veneer import library

    entry = library.get(name)
    values = _row(entry)
    if as_json:
        print(json.dumps(values, indent=2))
        return
    from veneer.cli.terminal import size

    values |= {"size": size(entry.size)}
    for key, value in values.items():
        if isinstance(value, dict):
            value = "\n".join(f"{name}  {text}" for name, text in value.items())
        text = ", ".join(value) if isinstance(value, list) else str(value or "")
        if text:
            print(f"{key:9}", text.replace("\n", f"\n{'':10}"))


@app.command()
def remove(name: Name) -> None:
    """Take an adapter out of the library; its content goes if no other name has the same."""
    from veneer import library

    library.remove(name, _say)


@app.command()
def verify(
    repair: Annotated[bool, typer.Option("--repair", help="Move aside what nothing refers to; index anew.")] = False,
) -> None:
    """Read and hash everything again; exit code 1 when something is wrong."""
    from veneer import library

    faults = library.verify(repair, _say)
    for fault in faults:
        print(f"{fault.where}: {fault.what}\n    {fault.advice}")
    if faults:
        raise typer.Exit(1)
    print(f"whole: {len(library.listed())} adapters in {library.folder()}")


@app.command()
def push(
    name: Name,
    to: Annotated[str, typer.Argument(help="A folder (a stick, a share), or a repository: owner/name.")],
    force: Annotated[bool, typer.Option("--force", help="Replace what is there under that name.")] = False,
) -> None:
    """Send an adapter to a folder or to the Hugging Face hub."""
    from veneer import library

    print(library.push(name, to, force, _say))


@app.command()
def pull(
    start: Annotated[str, typer.Argument(metavar="FROM", help="A folder, a file, or owner/name of the hub.")],
    name: Annotated[str | None, typer.Option(help="What to call it; as it is called there, if not said.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Give it the name, if another adapter has it.")] = False,
) -> None:
    """Take an adapter from a folder or from the Hugging Face hub."""
    from veneer import library

    print(library.pull(start, name, force, _say).name)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _row(entry: "Entry") -> dict[str, Any]:
    """What is known of one adapter, and where it and its picture are."""
    from veneer import library

    return asdict(entry) | {"path": str(library.path_of(entry)), "preview": str(library.preview_of(entry) or "")}


def _show(entries: "list[Entry]", as_json: bool) -> None:
    from veneer import library

    if broken := library.unreadable():
        _say(f"entries that cannot be read: {len(broken)}; `veneer library verify` says more")
    if as_json:
        print(json.dumps([_row(entry) for entry in entries], indent=2))
    elif entries:
        _print_table(entries)
    else:
        _say(f"no such adapter in {library.folder()}" if library.listed() else f"{library.folder()} is empty")


def _print_table(entries: "list[Entry]") -> None:
    """Print one line for each adapter."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from veneer.cli.terminal import size

    rows = {
        "name": [entry.name for entry in entries],
        "base": [_short(entry.base) or entry.family for entry in entries],
        "method": [entry.method for entry in entries],
        "format": [entry.format for entry in entries],
        "size": [size(entry.size) for entry in entries],
        "tags": [", ".join(entry.tags) for entry in entries],
        "trigger words": [", ".join(entry.triggers) for entry in entries],
        "licence": [entry.licence for entry in entries],
        "added": [entry.added[:10] for entry in entries],
    }
    said = {heading: cells for heading, cells in rows.items() if any(cells)}
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in said:
        whole = heading in ("name", "method", "format", "size", "added")
        table.add_column(heading, overflow="fold", no_wrap=whole, min_width=max(map(len, heading.split())))
    for row in zip(*said.values(), strict=True):
        table.add_row(*map(Text, row))
    Console().print(table)


def _short(base: str) -> str:
    """A hub id as it is; of a folder of this machine, its name."""
    return Path(base).name if Path(base).is_absolute() else base
