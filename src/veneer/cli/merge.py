"""`veneer merge`: an adapter into its base, as an ordinary transformers folder."""

from pathlib import Path
from typing import Annotated

import typer


def merge(
    adapter: Annotated[str, typer.Argument(metavar="RUN_OR_ADAPTER", help="A run's folder, or an adapter's.")],
    out: Annotated[Path, typer.Option("--out", help="The folder to write; it must not exist yet.")],
    base: Annotated[str | None, typer.Option(help="The base, if not the one that the adapter names.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of the merged weights: bfloat16, float16 or float32; the base's own, if not said."),
    ] = None,
) -> None:
    """Write base and adapter as one ordinary model folder, which loads without veneer."""
    from veneer.train.language.speaker import write_merged

    print(write_merged(adapter, out, base, dtype))
