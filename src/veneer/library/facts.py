"""What an adapter's own files say of it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from veneer.core.adapter import examine, read_config
from veneer.core.errors import AdapterError
from veneer.safe.stored import read_bytes, read_header, read_tensors

_MOST, _LONGEST = 100, 500  # trigger words that a stranger's file is believed, and characters of a text
_BASES = ("ss_sd_model_name", "ss_base_model_version", "modelspec.architecture")
_TRIGGERS = ("modelspec.trigger_phrase", "trigger_words", "ss_trigger_words")
_LICENCES = ("modelspec.license", "license")


def facts(adapter: Path) -> dict[str, Any]:
    """An entry's `format`, `method`, `base`, `triggers` and `licence`, as far as the file or folder says them.

    Raises `AdapterError` for what is no adapter.
    """
    if adapter.is_dir():
        if wrong := examine(adapter).faults:
            raise AdapterError("\n".join(wrong))
        config = read_config(adapter)
        method = f"{config.peft_type} with DoRA" if config.use_dora else config.peft_type
        return {"format": "peft", "method": method, "base": config.base_model_name_or_path or ""}
    header, about = read_header(adapter)
    _, wrong = read_tensors(adapter, header)
    if wrong or not header:
        raise AdapterError(f"{adapter}: {'; '.join(wrong) or 'it holds no tensors'}")
    return {
        "format": adapter.suffix.removeprefix("."),
        "base": _first(about, _BASES),
        "triggers": words(_first(about, _TRIGGERS).split(",")),
        "licence": _first(about, _LICENCES),
    }


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
    """The texts, each once, without blanks around them."""
    return list(dict.fromkeys(text.strip()[:_LONGEST] for text in texts if isinstance(text, str) and text.strip()))[
        :_MOST
    ]


def _first(about: dict[str, str], keys: Iterable[str]) -> str:
    """The first of the values that says something."""
    values = (about.get(key) for key in keys)
    return next(
        (value[:_LONGEST] for value in values if isinstance(value, str) and value.strip(" \n") and value != "None"), ""
    )
