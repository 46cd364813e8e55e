"""`veneer combine`: several adapters into one file."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli.outcome import Force, Format, Out, Precision, dtype_of, format_of, left, progress
from veneer.cli.weighted import weighted
from veneer.core.errors import AdapterError

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter


Adapters = Annotated[
    list[str], typer.Argument(metavar="ADAPTER[:WEIGHT]…", help="Files, folders or names of the library, as a:0.7.")
]
How = Annotated[
    str, typer.Option(help="linear (the exact sum), cat, svd, slerp, ties, dare_linear, dare_ties or magnitude_prune.")
]
Blocks = Annotated[
    list[str] | None,
    typer.Option(
        metavar="WEIGHTS",
        help="The WebUI's block weights: a preset (OUTD), 1,0,0.5,… or IN04=0.5,OUT03-OUT05=0; once for all adapters, "
        "or once for each.",
    ),
]


def combine(
    adapters: Adapters,
    out: Out,
    how: How = "linear",
    rank: Annotated[int | None, typer.Option(help="Of the result, where it is not the sum's own.")] = None,
    energy: Annotated[float | None, typer.Option(help="Or the share of Σ σ² that is kept.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Keep full matrices where changes are thinned out.")] = False,
    density: Annotated[float | None, typer.Option(help="The share of entries that is kept.")] = None,
    majority: Annotated[str, typer.Option(help="Of signs: total or frequency.")] = "total",
    seed: Annotated[int, typer.Option(help="Of what is dropped at random.")] = 0,
    blocks: Blocks = None,
    sdxl: Annotated[bool, typer.Option("--sdxl", help="Named blocks are SDXL's.")] = False,
    base: Annotated[str | None, typer.Option(help="The base model, where changes depend on it (DoRA).")] = None,
    format: Format = None,
    dtype: Precision = None,
    force: Force = False,
) -> None:
    """Combine adapters: the exact weighted sum, or in other ways, on the true changes of the weights."""
    from veneer import files, library
    from veneer.combine import measured
    from veneer.combine.sparse import HOWS

    named = [weighted(text) for text in adapters]
    paths = [library.find(name) for name, _ in named]
    name = format_of(out, format, paths, force)
    own = [files.read(path) for path in paths]
    told: dict[str, Any] = {"density": density, "majority": majority, "seed": seed, "rank": rank, "energy": energy}
    if how in HOWS and not full and rank is None and energy is None:
        told["rank"] = _largest_rank(own)
    result, errors = measured(
        own,
        _weights([weight for _, weight in named], blocks or [], sdxl),
        how,
        **told,
        base=_base(base),
        dtype=dtype_of(dtype),
        names=[name for name, _ in named],
        progress=progress("layers"),
    )
    left(result, errors, out, name, force)


def _weights(numbers: list[float], texts: list[str], is_sdxl: bool) -> list[Any]:
    from veneer.combine import blocks

    if not texts:
        return numbers
    if len(texts) not in (1, len(numbers)):
        raise AdapterError(f"--blocks: expected one for all or one for each of {len(numbers)}, found {len(texts)}")
    each = texts * len(numbers) if len(texts) == 1 else texts
    return [blocks(text, number, is_sdxl) for text, number in zip(each, numbers, strict=True)]


def _largest_rank(adapters: "list[Adapter]") -> int:
    from veneer.apart.changes import changes

    return max(change.config.r for adapter in adapters for change in changes(adapter).values())


def _base(name: str | None) -> Path | None:
    from veneer import zoo

    return None if name is None else zoo.resolve(name)
