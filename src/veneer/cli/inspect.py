"""`veneer inspect`: what an adapter file is, and whether it can be trusted."""

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.core.errors import AdapterError, collapsed

if TYPE_CHECKING:
    from rich.console import Console

    from veneer.analyse.summary import Summary

READ_UP_TO = 100e6  # bytes whose values are read without being asked: a second
_WIDE = 400  # columns where there is no terminal
_MOST_TEXT = 400  # characters of a value that are shown


def inspect(
    adapter: Annotated[str, typer.Argument(metavar="FILE_OR_FOLDER_OR_NAME", help="In any format, or of the library.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: every layer, all metadata.")] = False,
    values: Annotated[
        bool | None,
        typer.Option(
            "--values/--no-values", help="Read the values too: norms, dead layers, NaN.", show_default="small"
        ),
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="A line for each layer.")] = False,
    metadata: Annotated[bool, typer.Option("--metadata", help="All that the file says of itself.")] = False,
    format: Annotated[
        str | None, typer.Option("--from", help="The format of the file, where it could be several.")
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="The alpha, for formats that do not hold it.")] = None,
) -> None:
    """Say what an adapter is: format, base, method, ranks, layers, trigger words, and what is suspicious.

    Exit code 2 where the file is unfit for use.
    """
    from veneer import files, library
    from veneer.analyse.summary import size_of, summary

    path = library.find(adapter)
    held, name = files.recognised(path, format, alpha=alpha)
    read = size_of(held) <= READ_UP_TO if values is None else values
    found = summary(held, name, read)
    if as_json:
        print(json.dumps({"path": str(path), **found.to_dict()}, indent=2, ensure_ascii=False))
    else:
        _print(str(path) if str(path) == adapter else f"{adapter}  {path}", found, layers, metadata)
    if found.faults:
        raise AdapterError("\n".join([f"{path} is unfit for use:", *found.faults]))


def _print(title: str, found: "Summary", layers: bool, metadata: bool) -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = _WIDE
    console.print(title, style="bold", soft_wrap=True)
    _print_pairs(console, _outline(found))
    _print_roles(console, found)
    if found.facts and not metadata:
        _print_pairs(console, found.facts)
    if metadata:
        _print_pairs(console, dict(sorted(found.metadata.items())))
    if layers:
        _print_layers(console, found)
    for doubt in found.doubts:
        console.print(f"suspicious: {doubt}", style="yellow", soft_wrap=True)
    if found.values is None:
        console.print(f"values were not read ({_size(found.bytes)}): --values reads them, for norms and NaN")


def _outline(found: "Summary") -> dict[str, str]:
    """Label → what is said first of the file."""
    base = found.base
    saved = (*found.saved("saved whole"), *found.saved("token rows"))
    told = {
        "format": found.format,
        "base": " · ".join(filter(None, (base.family and f"{base.family} ({base.because})", base.name))) or "not said",
        "method": _counted(found.counts("method")),
        "rank": _counted(found.counts("rank")),
        "alpha": _counted(found.counts("alpha")),
        "scale": _counted(found.counts("scale")),
        "layers": f"{len(found.layers):,}" + _among(found.counts("part")),
        "parameters": f"{found.parameters:,}",
        "size": f"{_size(found.bytes)}, {', '.join(found.dtypes)}",
        "saved whole": collapsed(saved) if saved else "",
        "trigger words": ", ".join(word + (f" ({n})" if n else "") for word, n in found.trigger_words.items()),
    }
    if found.values:
        told["‖ΔW‖"] = _figure(found.values.among(found.layers))
        largest = found.values.largest(3)
        told["largest"] = "\n".join(f"{_figure(found.values.norms[path])}  {path}" for path in largest)
    return {label: text for label, text in told.items() if text}


def _print_pairs(console: "Console", pairs: Mapping[str, str]) -> None:
    """Lines of `label  text`; long values of strangers are cut."""
    width = max(map(len, pairs), default=0)
    for label, text in pairs.items():
        shown = text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]}…"
        for number, line in enumerate(shown.split("\n")):
            console.print(f"{'' if number else _plain(label):{width}}  {_plain(line)}", soft_wrap=True)
    console.print()


def _print_roles(console: "Console", found: "Summary") -> None:
    parts = [part for part in found.counts("part") if part]
    several = parts if len(parts) > 1 else []
    headings = ["role", "layers", *several, "rank", "alpha", *(["‖ΔW‖"] if found.values else [])]
    rows = []
    for role in found.roles:
        own = found.with_role(role)
        counts = found.counts("part", own)
        row = [role, str(len(own)), *(str(counts.get(part, "")) for part in several)]
        row += [_range(found.counts(name, own)) for name in ("rank", "alpha")]
        rows.append(row + ([_figure(found.values.among(layer.path for layer in own))] if found.values else []))
    _print_table(console, headings, rows)


def _print_layers(console: "Console", found: "Summary") -> None:
    headings = ["layer", "role", "method", "rank", "alpha", "scale", "shape", *(["‖ΔW‖"] if found.values else [])]
    rows = []
    for path, layer in found.layers.items():
        shape = "×".join(map(str, layer.shape or ()))
        row = [path, layer.role, layer.method, *map(_figure, (layer.rank, layer.alpha, layer.scale)), shape]
        rows.append(row + ([_figure(found.values.norms.get(path))] if found.values else []))
    _print_table(console, headings, rows)


def _print_table(console: "Console", headings: list[str], rows: Iterable[list[str]]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in headings:
        justify: Any = "left" if heading in ("role", "layer", "method") else "right"
        table.add_column(heading, justify=justify, overflow="fold", no_wrap=heading == "role")
    for row in rows:
        table.add_row(*map(_plain, row))
    console.print(table)
    console.print()


def _plain(text: str) -> str:
    """Without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _counted(counts: Mapping[Any, int]) -> str:
    """`16`, or `16 (180), 8 (12)`: values and how many layers have them, the commonest first."""
    if len(counts) < 2:
        return "".join(map(_figure, counts))
    told = [f"{_figure(value)} ({count})" for value, count in list(counts.items())[:6]]
    return ", ".join(told) + (f", … {_range(counts)}" if len(counts) > 6 else "")


def _among(parts: Mapping[str, int]) -> str:
    told = [f"{part} {count:,}" for part, count in parts.items() if part]
    return f" ({', '.join(told)})" if told else ""


def _range(values: Iterable[float]) -> str:
    ends = sorted(values)
    return "" if not ends else _figure(ends[0]) if ends[0] == ends[-1] else f"{_figure(ends[0])}–{_figure(ends[-1])}"


def _figure(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
