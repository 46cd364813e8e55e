"""The names of labels, and their numbers."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from veneer.core.errors import AdapterError, listed, nearest


def written(label: Any) -> str:
    """A label as a name: 1, 1.0 and "1" are one, and so are true and "true"."""
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, float) and label.is_integer():
        return str(int(label))
    return str(label)


def numbered_names(counts: Mapping[str, int], wanted: Sequence[str] | None, own: Mapping[int, str]) -> list[str]:
    """The names of the labels in the order of their numbers: those that are `wanted`, else the order of the base's
    `own` head where it has the same names, else that of the alphabet, or of numbers.

    Raises `AdapterError` where names and rows do not agree.
    """
    if wanted is None:
        lower = {name.lower(): name for name in counts}
        if len(lower) == len(counts) and sorted(lower) == sorted(name.lower() for name in own.values()):
            return [lower[own[i].lower()] for i in sorted(own)]
        whole = all(name.removeprefix("-").isdigit() for name in counts)
        return sorted(counts, key=int) if whole else sorted(counts)
    if len(set(wanted)) < len(wanted):
        raise AdapterError(f"data.labels: expected different names, found {listed(wanted)}")
    numbers_of(wanted, counts)
    return list(wanted)


def numbers_of(names: Sequence[str], found: Iterable[str]) -> dict[str, int]:
    """The number of each label that is found: that of its name, or itself where the rows have numbers."""
    found = list(found)
    known = {name: number for number, name in enumerate(names)}
    strange = [name for name in found if name not in known]
    if not strange:
        return known
    if all(name.isdigit() and int(name) < len(names) for name in found):
        return {name: int(name) for name in found}
    told = listed(strange, say=lambda name: f"{name!r}{nearest(name, names)}")
    raise AdapterError(
        f"labels that are not known: {told}; expected {listed(names, 20)} (data.labels), or their numbers"
    )
