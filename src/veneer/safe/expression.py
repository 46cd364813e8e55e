"""Regular expressions that cannot hang: matching takes no more steps than a path is granted.

`re` tries one way after another, so that `(a|a)*b` on forty letters takes it years; and an adapter's config may come
from a stranger. Here `re` parses, and says where single characters stand; what repeats, branches and lookarounds can
reach goes on together, as a set of places, and nothing is tried twice. What this cannot say (back-references,
conditions, flags, possessive repeats) is refused.
"""

import re
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from itertools import groupby
from re import _compiler, _parser  # type: ignore[attr-defined]
from re import _constants as sre  # type: ignore[attr-defined]
from typing import Any

from veneer.core.errors import AdapterError, shown

LONGEST = 10_000  # characters of all the expressions of a config that are not plain
_STEPS = 2_000  # for one path, by all the expressions of a config; six hundred characters of alternatives take 60
_WIDEST = 1_000  # characters of a range, each of which `re` looks at
_PLAIN = re.compile(r"\^?(?:[\w-]|\\?\.)+")  # a name or a path, as nearly all patterns are: these need not be parsed
_EXACT = re.compile(r"\^(?:[\w-]|\\\.)+")  # one path alone
_WIDTHS = {sre.LITERAL: 1, sre.NOT_LITERAL: 1, sre.ANY: 1, sre.IN: 1, sre.AT: 0, sre.FAILURE: 0}


Places = set[int]


class Path:
    """A module's path, and what is known of its places: i is the place before character i."""

    def __init__(self, text: str) -> None:
        self.text, self.steps = text, _STEPS
        self.found: dict[str, Places] = {}
        self.names = {match.end() for match in re.finditer(r"^|\.", text)}  # where a module's name begins


Step = Callable[[Path, Places], Places]  # the places before → the places after


class Expression:
    """A regular expression for module paths. Raises `AdapterError` when it is none, or needs backtracking."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._plain = re.findall(r"\\?.", text.removeprefix("^")) if _PLAIN.fullmatch(text) else None
        self._walk = None if self._plain else _parsed(text)
        self.only = text[1:].replace("\\", "") if _EXACT.fullmatch(text) else None  # the one path whose tail it is

    def whole(self, path: Path) -> bool:
        """Whether it matches the whole path."""
        return len(path.text) in self.ends(path, {0})

    def tail(self, path: Path) -> bool:
        """Whether it matches the path from the beginning of some name in it to the end, as PEFT's patterns do."""
        if self._plain is None:
            return len(path.text) in self.ends(path, path.names)
        start = len(path.text) - len(self._plain)
        if start not in path.names or (start and self.text[0] == "^"):
            return False
        letters = zip(self._plain, path.text[start:], strict=True)
        return all(written in (letter, ".", "\\" + letter) for written, letter in letters)

    def ends(self, path: Path, starts: Places) -> Places:
        """The places where a match that begins at one of `starts` can end."""
        try:
            self._walk = self._walk or _parsed(self.text)
            return self._walk(path, starts)
        except (TimeoutError, RecursionError):
            raise AdapterError(f"{shown(self.text)} takes too long on {path.text}: simplify it") from None


def faulty(texts: Iterable[str]) -> bool:
    """Whether one of the texts is not an expression, or all of them together are too long."""
    texts = [text for text in texts if not _PLAIN.fullmatch(text)]
    try:
        return sum(map(len, texts)) > LONGEST or not all(map(Expression, texts))
    except AdapterError:
        return True


def _parsed(text: str) -> Step:
    if len(text) > LONGEST:
        raise AdapterError(f"an expression of {len(text)} characters is too long: at most {LONGEST}")
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = _parser.parse(text)
        if tree.state.flags & ~re.UNICODE:
            raise NotImplementedError("sets flags")
        return _sequence(tree)
    except NotImplementedError as error:
        raise AdapterError(f"the expression {shown(text)} is not supported: it {error}") from None
    except (re.error, OverflowError, RecursionError) as error:
        raise AdapterError(f"{shown(text)} is not a regular expression: {error}") from None


def _sequence(nodes: Iterable[tuple[Any, Any]]) -> Step:
    steps: list[Step] = []
    for is_run, grouped in groupby(nodes, lambda node: node[0] in _WIDTHS):
        group = list(grouped)
        steps += [_run(group)] if is_run else [_step(*node) for node in group]

    def walk(path: Path, at: Places) -> Places:
        for step in steps:
            if not at:
                break
            path.steps -= 1
            if path.steps < 0:
                raise TimeoutError
            at = step(path, at)
        return at

    return walk


def _run(nodes: list[tuple[Any, Any]]) -> Step:
    """Characters and anchors, one after the other: `re` finds them, once in a path, by a lookahead."""
    ranges = [ends for operation, items in nodes if operation is sre.IN for kind, ends in items if kind is sre.RANGE]
    if any(last - first > _WIDEST for first, last in ranges):
        raise NotImplementedError(f"has a range of more than {_WIDEST} characters")
    ahead = (sre.ASSERT, (1, _parser.SubPattern(_parser.State(), nodes)))
    pattern = _compiler.compile(_parser.SubPattern(_parser.State(), [ahead]), re.UNICODE.value)
    key, width = repr(nodes), sum(_WIDTHS[operation] for operation, _ in nodes)

    def walk(path: Path, at: Places) -> Places:
        if key not in path.found:
            path.found[key] = {match.start() for match in pattern.finditer(path.text)}
            path.steps -= len(path.found[key])
        return {place + width for place in at & path.found[key]}

    return walk


def _step(operation: Any, argument: Any) -> Step:
    if operation is sre.BRANCH:
        branches = [_sequence(branch) for branch in argument[1]]
        return lambda path, at: set().union(*(branch(path, at) for branch in branches))
    if operation is sre.SUBPATTERN:
        if argument[1] or argument[2]:
            raise NotImplementedError("sets flags")
        return _sequence(argument[3])
    if operation in (sre.MAX_REPEAT, sre.MIN_REPEAT):
        return partial(_repeat, argument[0], argument[1], _sequence(argument[2]))
    if operation not in (sre.ASSERT, sre.ASSERT_NOT):
        raise NotImplementedError(f"has a {str(operation).lower().replace('_', ' ')}")
    direction, inner = argument
    if direction < 0 and len(set(inner.getwidth())) > 1:
        raise NotImplementedError("has a look-behind of no fixed width")
    return partial(_look, direction, operation is sre.ASSERT, _sequence(inner))


def _repeat(least: int, most: int, body: Step, path: Path, at: Places) -> Places:
    # a path of n characters is walked in n steps: of more repeats some are empty, and any number of them is
    for _ in range(min(least, len(path.text) + 1)):
        at = body(path, at)
    new = at
    for _ in range(min(most - least, len(path.text))):
        new = body(path, new) - at
        if not new:
            break
        at = at | new
    return at


def _look(direction: int, wanted: bool, body: Step, path: Path, at: Places) -> Places:
    if direction < 0:
        holds = body(path, set(range(len(path.text) + 1)))
    else:
        holds = {place for place in at if body(path, {place})}
    return at & holds if wanted else at - holds
