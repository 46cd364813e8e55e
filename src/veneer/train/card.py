"""The model card that lies beside an adapter."""

import json
import shlex
from collections import defaultdict
from typing import Any

from veneer import __version__
from veneer.train.record import stamp
from veneer.train.task import Task

NAMES = {  # of figures, for people
    "eval_loss": "held-out loss",
    "bleu": "BLEU",
    "rouge_l": "ROUGE-L",
    "chrf": "chrF",
    "f1": "F1",
    "matthews": "Matthews",
    "pearson": "Pearson",
    "spearman": "Spearman",
    "exact_match": "exact match",
    "mean_iou": "mean IoU",
    "pixel_accuracy": "pixel accuracy",
    "distance": "distance to the style",
    "shape": "shape kept",
    "edges": "edges kept",
}

ASKED = {"prompt", "seed"}  # of a sample: what the model was asked
_CARD = """---
base_model: {base}
library_name: {library}
pipeline_tag: {pipeline}
tags: [lora, veneer]
---

# {name}

A low-rank adapter for `{base}`, trained with veneer {version} on {date}.

| | |
|---|---|
{rows}

## Use

```
veneer {command}
veneer merge ADAPTER --out DIR
```

In Python, {python}

How the data of its training was read (`veneer.json` says the same, and `veneer {verb}` reads it there):

```json
{usage}
```
{samples}"""


def card(
    task: Task, name: str, base: str, rows: list[tuple[str, str]], usage: dict[str, Any], samples: list[dict[str, str]]
) -> str:
    """README.md of an adapter: what it is, what it was measured at, how it is used, what it answers."""
    drawn = [sample for sample in samples if set(sample) <= ASKED]  # nothing was answered that a card could show
    first = {key: shlex.quote(text) for key, text in (drawn[0] if drawn else {}).items()}
    command = task.asking.format_map(defaultdict(lambda: '"…"', {"seed": 0} | first, adapter="ADAPTER"))
    return _CARD.format(
        name=name,
        base=base,
        pipeline=task.pipeline,
        library=task.library,
        python=task.python,
        command=command,
        verb=command.partition(" ")[0],
        version=__version__,
        date=stamp(),
        rows="\n".join(f"| {key} | {value} |" for key, value in rows),
        usage=json.dumps(usage["data"], indent=2, ensure_ascii=False),
        samples="".join(_sample(task.sampled, sample) for sample in samples[:1] if sample not in drawn),
    )


def _sample(what: str, sample: dict[str, str]) -> str:
    """What was asked, and beside each other all that is said of it but the reference."""
    (_, asked), *others = sample.items()
    said = {key: _cell(text) for key, text in others if key != "reference"}
    lines = (" | ".join(cells) for cells in (said, ["---"] * len(said), said.values()))
    return f"\n## {what}\n\n{_quoted(asked)}\n\n" + "".join(f"| {line} |\n" for line in lines)


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}" for line in text.splitlines())


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split()) or " "
