"""How a command is told adapters and their weights: `NAME`, or `NAME:WEIGHT`."""

import math
from pathlib import Path

from veneer.core.errors import AdapterError, shown


def weighted(text: str) -> tuple[str, float]:
    """The adapter's name and its weight, 1 if not said; a path that is there may have a colon in it.

    Raises `AdapterError` for a weight that is no finite number.
    """
    name, colon, said = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, 1.0
    try:
        weight = float(said)
    except ValueError:
        weight = math.nan
    if not name or not math.isfinite(weight):
        raise AdapterError(f"expected ADAPTER or ADAPTER:WEIGHT, a finite number, found {shown(text)}")
    return name, weight
