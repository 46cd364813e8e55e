"""`veneer merge`: adapters into their base, as an ordinary folder of transformers or diffusers."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from veneer.cli.weighted import weighted
from veneer.core.errors import AdapterError, listed

if TYPE_CHECKING:
    from veneer.core.adapter import Adapter

_DTYPES = ("bfloat16", "float16", "float32")


def merge(
    adapters: Annotated[
        list[str],
        typer.Argument(metavar="ADAPTER[:WEIGHT]…", help="A run, an adapter of any format, or a name of the library."),
    ],
    out: Annotated[Path, typer.Option("--out", help="The folder to write; it must not exist yet.")],
    base: Annotated[
        str | None,
        typer.Option(help="The base, if not the one that the adapters name: a model, or a diffusers pipeline."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of the merged weights: bfloat16, float16 or float32; the base's own, if not said."),
    ] = None,
) -> None:
    """Write base and adapters as one ordinary model or pipeline folder, which loads without veneer."""
    if out.exists():
        raise AdapterError(f"{out} exists already; nothing was written (--out names another folder)")
    if dtype not in (None, *_DTYPES):
        raise AdapterError(f"dtype {dtype!r} is not one of {', '.join(_DTYPES)}")
    from veneer import files, library, zoo

    named = [(library.find(name), weight) for name, weight in map(weighted, adapters)]
    held = [(files.read(path), weight) for path, weight in named]
    place = zoo.resolve(base or base_of([adapter for adapter, _ in held]))
    try:
        _write(place, held, out, dtype, named[0][0])
    except OSError as error:
        raise AdapterError(f"{out} cannot be written: {error.strerror or error}") from error
    print(out)


def _write(place: Path, held: "Sequence[tuple[Adapter, float]]", out: Path, dtype: str | None, path: Path) -> None:
    from veneer.files.pipeline import is_pipeline, merge_pipeline
    from veneer.train.bases.loading import quiet

    if is_pipeline(place):
        with quiet():
            merge_pipeline(place, held, out, dtype)
        return
    from veneer.train.language.speaker import write_merged

    if parts := [part for adapter, _ in held for part in adapter.parts]:
        raise AdapterError(
            f"{place} is one model, and adapters are for a pipeline's {listed(dict.fromkeys(parts), say=str)}: "
            "give the pipeline's folder (--base)"
        )
    write_merged(place, held, out, dtype, path)


def base_of(adapters: "Sequence[Adapter]") -> str:
    """The base that the adapters name, all the same one. Raises `AdapterError`."""
    said = {adapter.config.base_model_name_or_path for adapter in adapters} - {None}
    if len(said) != 1:
        raise AdapterError(f"the adapters name {listed(said)} as their base: give --base")
    return str(said.pop())
