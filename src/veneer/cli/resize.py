"""`veneer resize`: an adapter of other ranks."""

from typing import Annotated

import typer

from veneer.cli.outcome import Force, Format, Out, Precision, dtype_of, format_of, left, progress
from veneer.core.errors import AdapterError


def resize(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="A file, a folder or a name of the library.")],
    out: Out,
    rank: Annotated[int | None, typer.Option(help="The rank; with one of the shares, the most there may be.")] = None,
    energy: Annotated[float | None, typer.Option(help="Keep this share of Σ σ².")] = None,
    frobenius: Annotated[float | None, typer.Option(help="Keep this share of ‖ΔW‖ (kohya's sv_fro).")] = None,
    cumulative: Annotated[float | None, typer.Option(help="Keep this share of Σ σ (kohya's sv_cumulative).")] = None,
    ratio: Annotated[float | None, typer.Option(help="Keep σ / σ₁ of at least this (1 / kohya's sv_ratio).")] = None,
    base: Annotated[str | None, typer.Option(help="The base model, where changes depend on it (DoRA).")] = None,
    format: Format = None,
    dtype: Precision = None,
    force: Force = False,
) -> None:
    """Write any adapter as a plain LoRA of another rank, the nearest there is, and say how near."""
    from veneer import combine, files, library, zoo

    if all(value is None for value in (rank, energy, frobenius, cumulative, ratio)):
        raise AdapterError("say how much to keep: --rank, --energy, --frobenius, --cumulative or --ratio")
    path = library.find(adapter)
    name = format_of(out, format, [path], force)
    result, errors = combine.resize(
        files.read(path),
        rank,
        ratio=ratio,
        energy=energy,
        cumulative=cumulative,
        frobenius=frobenius,
        base=None if base is None else zoo.resolve(base),
        dtype=dtype_of(dtype),
        progress=progress("layers"),
    )
    left(result, errors, out, name, force)
