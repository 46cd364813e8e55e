"""`veneer predict`: what an adapted model with a head says of texts or pictures."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from veneer.cli.lines import leave
from veneer.core.errors import AdapterError


def predict(
    adapter: Annotated[str, typer.Argument(metavar="RUN_OR_ADAPTER", help="A run's folder, or an adapter's.")],
    text: Annotated[
        list[str] | None, typer.Option("--text", help="A text, or the context of a question; may be repeated.")
    ] = None,
    pair: Annotated[
        str | None, typer.Option("--pair", "--question", help="The second text of a pair, or the question.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--input", metavar="FILE", help="Many texts: rows as the training had them.")
    ] = None,
    picture: Annotated[
        list[Path] | None, typer.Option("--picture", help="A picture's file, or a folder of them; may be repeated.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the predictions to this file; masks, into this folder.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base, if not the one that the adapter names.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the base: auto, bfloat16, float16 or float32.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
) -> None:
    """Say labels, tags or answers, and how probable they are: one JSON a line."""
    if sum((bool(text), bool(picture), file is not None)) != 1 or (pair is not None and not text):
        raise AdapterError(
            "predict needs --text TEXT (with --pair or --question), --input FILE or --picture FILE, one of the three"
        )
    if out is not None and (out.exists() or not out.parent.is_dir()):
        raise AdapterError(
            f"{out} {'exists already' if out.exists() else 'has no folder to be in'}; nothing was written"
        )
    from veneer import library

    folder = library.find(adapter)
    if picture:
        from veneer.train.vision.predictor import said_of_pictures

        said = said_of_pictures(folder, picture, base, dtype, device, out)
    else:
        said = _said_of_texts(folder, text or [], pair, file, base, dtype, device)
    lines = [json.dumps(own, ensure_ascii=False) + "\n" for own in said]
    leave(lines, None if out is None or out.is_dir() else out)


def _said_of_texts(
    adapter: Path, text: list[str], pair: str | None, file: Path | None, base: str | None, dtype: str, device: str
) -> list[dict[str, Any]]:
    from veneer.train.language.predictor import Predictor

    predictor = Predictor.load(adapter, base, dtype, device)
    documents = predictor.read(file) if file else [predictor.task.typed(own, pair) for own in text]
    said = predictor.said_of(documents)
    return [{"texts": document.texts, **own} for document, own in zip(documents, said, strict=True)]
