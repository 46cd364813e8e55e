"""`veneer generate`: what an adapted language model answers."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli.lines import leave
from veneer.core.errors import AdapterError

if TYPE_CHECKING:
    from veneer.train.language.speaker import Speaker


def generate(
    adapter: Annotated[str, typer.Argument(metavar="RUN_OR_ADAPTER", help="A run's folder, or an adapter's.")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="What is asked; may be repeated.")] = None,
    file: Annotated[
        Path | None, typer.Option("--input", metavar="FILE.jsonl", help="Many prompts: rows as the training had them.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the answers to this file, one JSON a line.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Base and adapted model side by side.")] = False,
    base: Annotated[str | None, typer.Option(help="The base, if not the one that the adapter names.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token; higher is freer.")] = 0.0,
    beams: Annotated[
        int, typer.Option(min=1, help="Answers that are followed at once; the likeliest is given when it is whole.")
    ] = 1,
    seed: Annotated[int, typer.Option(help="Decides the draws where the temperature is above 0.")] = 0,
    dtype: Annotated[str, typer.Option(help="Of the base: auto, bfloat16, float16 or float32.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
) -> None:
    """Answer prompts with an adapted language model."""
    if bool(prompt) == (file is not None):
        raise AdapterError("generate needs --prompt TEXT or --input FILE, one of the two")
    if out is not None and (out.exists() or not out.parent.is_dir()):
        raise AdapterError(
            f"{out} {'exists already' if out.exists() else 'has no folder to be in'}; nothing was written"
        )
    from veneer.train.language.speaker import Speaker

    speaker = Speaker.load(adapter, base, dtype, device)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "num_beams": beams}
    if temperature:
        import torch

        torch.manual_seed(seed)
        options |= {"do_sample": True, "temperature": temperature}
    prompts = speaker.read(file) if file else [speaker.opening(text) for text in prompt or ()]
    if file is not None or out is not None:
        _answer_many(speaker, prompts, out, compare, options)
    elif compare:
        _show_side_by_side(speaker, prompts, options)
    elif beams > 1:
        print(*speaker.answers(prompts, **options), sep="\n")
    else:
        for opening in prompts:
            speaker.stream(opening, **options)


def _answer_many(
    speaker: "Speaker", prompts: list[Any], out: Path | None, compare: bool, options: dict[str, Any]
) -> None:
    def progress(done: int, total: int) -> None:
        print(f"{done} of {total} answers", file=sys.stderr)

    answers = speaker.answers(prompts, progress=progress, **options)
    others = speaker.answers(prompts, adapted=False, **options) if compare else [None] * len(prompts)
    lines = []
    for opening, text, other in zip(prompts, answers, others, strict=True):
        row = {"prompt": opening, "answer": text} | ({"base": other} if compare else {})
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    leave(lines, out)


def _show_side_by_side(speaker: "Speaker", prompts: list[Any], options: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("base", "adapted", show_lines=True)
    bases = speaker.answers(prompts, adapted=False, **options)
    for old, new in zip(bases, speaker.answers(prompts, **options), strict=True):
        table.add_row(old, new)
    Console(highlight=False).print(table)
