"""`veneer export`: an adapter as a server takes it."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from veneer.cli.outcome import Force


def export(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="A file, a folder or a name of the library.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    target: Annotated[Literal["vllm"], typer.Option("--for", help="The server that is to read it.")],
    pad_rank: Annotated[
        bool, typer.Option("--pad-rank", help="Fill the rank up with zeros to the next that vLLM lists.")
    ] = False,
    force: Force = False,
) -> None:
    """Write an adapter as a server reads it, or say which of its rules fail and what to do."""
    from veneer import files, library
    from veneer.files import vllm

    written = vllm.export(files.read(library.find(adapter)), out, pad_rank=pad_rank, force=force)
    for note in written.notes:
        print(note)
    print(
        f"{written.path} ({target}, r={written.r}); serve it with: vllm serve BASE --enable-lora --max-lora-rank "
        f"{written.max_lora_rank} --lora-modules NAME={written.path}"
    )
