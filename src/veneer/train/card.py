"""The model card that lies beside an adapter."""

import json
from typing import Any

from veneer import __version__
from veneer.train.record import stamp

_CARD = """---
base_model: {base}
library_name: peft
pipeline_tag: text-generation
tags: [lora, veneer]
---

# {name}

A low-rank adapter for `{base}`, trained with veneer {version} on {date}.

| | |
|---|---|
{rows}

## Use

```
veneer generate ADAPTER --prompt "…"
veneer merge ADAPTER --out DIR
```

In Python, on the base loaded with transformers, with veneer or with PEFT:

```python
model = PeftModel.from_pretrained(model, "ADAPTER")
```

How a prompt must be written for it (`veneer.json` says the same, and `veneer generate` reads it there):

```json
{usage}
```
{samples}"""


def card(
    name: str, base: str, rows: list[tuple[str, str]], usage: dict[str, Any], samples: list[dict[str, str]]
) -> str:
    """README.md of an adapter: what it is, what it was measured at, how it is used, what it answers."""
    shown = "".join(
        f"\n## An answer\n\n{_quoted(s['prompt'])}\n\n| base | adapted |\n|---|---|\n| {_cell(s['base'])} | "
        f"{_cell(s['adapted'])} |\n"
        for s in samples[:1]
    )
    return _CARD.format(
        name=name,
        base=base,
        version=__version__,
        date=stamp(),
        rows="\n".join(f"| {key} | {value} |" for key, value in rows),
        usage=json.dumps(usage["data"], indent=2, ensure_ascii=False),
        samples=shown,
    )


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}" for line in text.splitlines())


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split()) or " "
