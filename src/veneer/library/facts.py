"""What an adapter's own files say of it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from veneer import files
from veneer.analyse.summary import Summary, summary
from veneer.core.errors import AdapterError
from veneer.files.folder import examine, faultless
from veneer.safe.stored import read_bytes, read_header

_MOST = 100  # trigger words that a stranger's file is believed


def facts(adapter: Path) -> dict[str, Any]:
    """An entry's `format`, `method`, `base`, `family`, `triggers` and `licence`, as far as a file or folder says them.

    Raises `AdapterError` for what is no adapter, or cannot be read without being told more.
    """
    if adapter.is_dir():
        format, held = "peft", faultless(examine(adapter))
    else:
        read_header(adapter)  # a pickle is refused, whatever its name
        held, format = files.recognised(adapter)
    told = summary(held, format, values=False)
    return {
        "format": format,
        "method": _method(told),
        "base": told.base.name or "",
        "family": told.base.family or "",
        "triggers": words(word for word, count in told.trigger_words.items() if count is None)[:_MOST],
        "licence": told.facts.get("licence", ""),
    }


def _method(told: Summary) -> str:
    """`LoRA, r 4 to 16`: the methods, the commonest first, and their ranks."""
    ranks = sorted(told.counts("rank"))
    said = f"r {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "") if ranks else ""
    return ", ".join(filter(None, [*told.counts("method"), said]))


def card(path: Path) -> dict[str, Any]:
    """An entry's `base`, `triggers` and `licence`, as far as the first lines of a model card say them."""
    try:
        first, *parts = read_bytes(path).decode("utf-8", "replace").split("---\n", 2)
    except AdapterError:
        return {}
    if first.strip() or len(parts) < 2:
        return {}
    values = loaded(parts[0])
    base = values.get("base_model")
    said = {
        "base": base[0] if isinstance(base, list) and base else base,
        "licence": values.get("license_name") or values.get("license"),
        "triggers": words([values.get("instance_prompt")]),
    }
    return {key: value for key, value in said.items() if value and isinstance(value, (str, list))}


def loaded(text: str) -> dict[Any, Any]:
    """The keys and values of a YAML text; none where it has none."""
    import yaml

    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def words(texts: Iterable[object]) -> list[str]:
    """The texts, each once and on one line."""
    lines = (" ".join(text.split()) for text in texts if isinstance(text, str))
    return list(dict.fromkeys(filter(None, lines)))
