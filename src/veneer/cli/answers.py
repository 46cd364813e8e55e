"""What an adapted language model answers, for `veneer generate`."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.cli.lines import leave
from veneer.core.errors import AdapterError

if TYPE_CHECKING:
    from veneer.train.language.speaker import Speaker


def answers(
    speaker: "Speaker",
    prompts: list[str],
    file: Path | None,
    out: Path | None,
    compare: bool,
    seed: int,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    beams: int = 1,
) -> None:
    """Answer what is asked, or the rows of a file: on the terminal, or one JSON a line in a file."""
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "num_beams": beams}
    if temperature:
        import torch

        torch.manual_seed(seed)
        options |= {"do_sample": True, "temperature": temperature}
    openings = speaker.read(file) if file else [speaker.opening(text) for text in prompts]
    if file is not None or out is not None:
        _answer_many(speaker, openings, out, compare, options)
    elif compare:
        _show_side_by_side(speaker, openings, options)
    elif beams > 1:
        print(*speaker.answers(openings, **options), sep="\n")
    else:
        for opening in openings:
            speaker.stream(opening, **options)


def refuse_taken(out: Path | None) -> None:
    """Raises `AdapterError` where the answers cannot be written."""
    if out is not None and (out.exists() or not out.parent.is_dir()):
        raise AdapterError(
            f"{out} {'exists already' if out.exists() else 'has no folder to be in'}; nothing was written"
        )


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
