"""What an adapter was trained on, as its folder says it, and a base with that task's head."""

import json
from pathlib import Path
from typing import Any

import torch

from veneer.core.errors import AdapterError
from veneer.train.record import USAGE
from veneer.train.settings import checked
from veneer.train.tasks import task_named


def base_with_head(adapter: Path, place: Path, dtype: str | None, device: torch.device) -> Any:
    """The base in `place` with a head for what the adapter was trained on, as the task's `bare` makes it; None for one
    that needs no head.
    """
    build = head_task(adapter)
    if build is None:
        return None
    schema: Any = build.settings.model_fields["data"].annotation
    data = checked(schema, {"path": "-", **usage_of(adapter).get("data", {})}, str(adapter / USAGE))
    return build.bare(data, place, dtype, device)


def head_task(adapter: Path) -> type[Any] | None:
    """The task that the adapter was trained on, if it is one of a model with a head, for texts or for pictures."""
    name = usage_of(adapter).get("task")
    task = task_named(name) if name is not None else None
    return task if hasattr(task, "bare") else None


def usage_of(folder: Path) -> dict[str, Any]:
    path = folder / USAGE
    try:
        usage = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is damaged: {error}") from error
    return usage if isinstance(usage, dict) else {}
