"""The one exception of the package, and the words that its messages share."""

from collections.abc import Iterable
from difflib import get_close_matches


class AdapterError(ValueError):
    """Bad input: says what, where, what was expected, what was found and what to do."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """`; did you mean 'q_proj'?` for the closest of `choices`, or nothing when none is close."""
    close = get_close_matches(str(word), [str(choice) for choice in choices], n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def listed(items: Iterable[object], most: int = 8) -> str:
    """`'a', 'b', 'c' and 4 more`: a list that stays readable when it is long."""
    names = [repr(item) for item in items]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "nothing") + more
