"""The one exception of the package, and the words that its messages share."""

import re
import reprlib
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from itertools import islice
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 200
_SHORT.maxlist = _SHORT.maxdict = _SHORT.maxtuple = _SHORT.maxset = 20


class AdapterError(ValueError):
    """Bad input: says what, where, what was expected, what was found and what to do."""


def shown(value: object) -> str:
    """`repr` for a message: short and printable, whatever a stranger wrote."""
    return _SHORT.repr(value)


def named(name: str) -> str:
    """The name itself where it is short and printable, as names are; else as `shown` has it."""
    return name if len(name) <= 200 and name.isprintable() else shown(name)


def nearest(word: str, choices: Iterable[str]) -> str:
    """`; did you mean 'q_proj'?` for the closest of `choices`, or nothing when none is close."""
    if len(str(word)) > 200:
        return ""
    close = get_close_matches(str(word), [str(choice) for choice in islice(choices, 1000)], n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def listed(items: Iterable[Any], most: int = 8, say: Callable[[Any], str] = shown, between: str = ", ") -> str:
    """`'a', 'b', 'c', and 4 more`: a list that stays readable when it is long."""
    items = list(items)
    more = [f"and {len(items) - most} more"] if len(items) > most else []
    return between.join([*map(say, items[:most]), *more]) or "nothing"


def unmatched(names: Iterable[str], what: str, known: Iterable[str]) -> str:
    """What is said of names that match nothing; `known` would."""
    known = list(known)
    return listed(names, say=lambda name: f"{shown(name)} matches no {what}{nearest(name, known)}", between="; ")


def collapsed(names: Iterable[str], most: int = 100) -> str:
    """Every name, with runs that differ only in numbers told once: `layers.*.q_proj.A (30)`."""
    runs: dict[str, list[str]] = {}
    for name in names:
        runs.setdefault(re.sub(r"(?<![^.])\d+(?=\.|$)", "*", name), []).append(name)
    told = {run: named(own[0]) if len(own) == 1 else f"{named(run)} ({len(own)})" for run, own in runs.items()}
    return listed(told.values(), most, str)
