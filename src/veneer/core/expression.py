"""Regular expressions that cannot hang: matching takes no more steps than a path is granted.

`re` tries one way after another, so that `(a|a)*b` on forty letters takes it years; and an adapter's config may come
from a stranger. Here all the positions that can be reached, a bit each, go through the expression together, and
nothing is tried twice. What this cannot say (back-references, conditions, flags, possessive repeats) is refused.
"""

import re
import warnings
from collections.abc import Callable, Iterable
from re import _constants as sre  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

from veneer.core.errors import AdapterError, shown

LONGEST = 10_000  # characters of all the expressions of a config that are not plain
_STEPS = 3_000  # for one path, by all the expressions of a config; six hundred characters of alternatives take 60
_PLAIN = re.compile(r"\^?(?:[\w-]|\\?\.)+")


class Path:
    """A module's path, and where each of its characters stands: bit i is the place before character i."""

    def __init__(self, text: str) -> None:
        self.text, self.end, self.steps = text, 1 << len(text), _STEPS
        self.all = 2 * self.end - 1
        self.places: dict[str, int] = {}
        for i, character in enumerate(text):
            self.places[character] = self.places.get(character, 0) | 1 << i
        self.names = 1 | self.places.get(".", 0) << 1  # where a module's name begins

    def where(self, accepts: Callable[[str], bool]) -> int:
        """The places of the characters that are accepted."""
        return sum(places for character, places in self.places.items() if accepts(character))


Step = Callable[[Path, int], int]  # the places before → the places after


class Expression:
    """A regular expression for module paths. Raises `AdapterError` when it is none, or needs backtracking."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._plain = re.findall(r"\\?.", text.removeprefix("^")) if is_plain(text) else None
        self._last = text.rpartition(".")[2].removeprefix("^")
        self._run = _nothing if self._plain else _parsed(text)

    def whole(self, path: Path) -> bool:
        """Whether it matches the whole path."""
        return bool(self.ends(path, 1) & path.end)

    def tail(self, path: Path) -> bool:
        """Whether it matches the path from the beginning of some name in it to the end, as PEFT's patterns do."""
        if self._plain is None:
            return bool(self.ends(path, path.names) & path.end)
        start = len(path.text) - len(self._plain)
        if start < 0 or not path.text.endswith(self._last) or (start and self.text[0] == "^"):
            return False
        return bool(path.names >> start & 1) and all(map(_stands_for, self._plain, path.text[start:]))

    def ends(self, path: Path, starts: int) -> int:
        """The places where a match that begins at one of `starts` can end."""
        if self._plain is not None:
            self._plain, self._run = None, _parsed(self.text)
        try:
            return self._run(path, starts)
        except _Exhausted:
            raise AdapterError(
                f"the expression {shown(self.text)} takes too long on {path.text}: simplify it"
            ) from None


def is_plain(text: str) -> bool:
    """Whether it is a name or a path, as nearly all patterns are: these need not be parsed."""
    return _PLAIN.fullmatch(text) is not None


def faulty(texts: Iterable[str]) -> bool:
    """Whether one of the texts is not an expression, or all of them together are too long."""
    texts = [text for text in texts if not is_plain(text)]
    if sum(map(len, texts)) > LONGEST:
        return True
    try:
        return not all(map(Expression, texts))
    except AdapterError:
        return True


class _Exhausted(Exception):
    """The path's steps are spent."""


def _stands_for(written: str, character: str) -> bool:
    return written in (character, ".") or (written == "\\." and character == ".")


def _nothing(path: Path, at: int) -> int:
    return 0


def _parsed(text: str) -> Step:
    if len(text) > LONGEST:
        raise AdapterError(f"an expression of {len(text)} characters is too long: at most {LONGEST}")
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = _parser.parse(text)
        if tree.state.flags & ~re.UNICODE:
            raise AdapterError(f"the expression {shown(text)} sets flags, which is not supported")
        return _sequence(tree)
    except (re.error, OverflowError, RecursionError) as error:
        raise AdapterError(f"{shown(text)} is not a regular expression: {error}") from None
    except KeyError as error:
        what = str(error.args[0]).lower().replace("_", " ")
        raise AdapterError(f"the expression {shown(text)} is not supported: it has a {what}") from None


def _sequence(nodes: Iterable[tuple[Any, Any]]) -> Step:
    steps = [_BUILD[operation](argument) for operation, argument in nodes]

    def run(path: Path, at: int) -> int:
        for step in steps:
            if not at:
                return 0
            path.steps -= 1
            if path.steps < 0:
                raise _Exhausted
            at = step(path, at)
        return at

    return run


def _one(accepts: Callable[[str], bool]) -> Step:
    return lambda path, at: (at & path.where(accepts)) << 1


def _literal(code: int) -> Step:
    character = chr(code)
    return lambda path, at: (at & path.places.get(character, 0)) << 1


def _accepts(items: list[tuple[Any, Any]]) -> Callable[[str], bool]:
    """Whether a character is in the class `[…]`."""
    negated = items[0][0] is sre.NEGATE
    tests = [_MEMBER[kind](argument) for kind, argument in items[negated:]]
    return lambda character: any(test(character) for test in tests) != negated


def _branch(argument: tuple[Any, list[Any]]) -> Step:
    branches = [_sequence(branch) for branch in argument[1]]

    def run(path: Path, at: int) -> int:
        after = 0
        for branch in branches:
            after |= branch(path, at)
        return after

    return run


def _group(argument: tuple[Any, int, int, Any]) -> Step:
    _, added, removed, inner = argument
    if added or removed:
        raise KeyError("flag")
    return _sequence(inner)


def _repeat(argument: tuple[int, Any, Any]) -> Step:
    least, most, inner = argument
    least, most = int(least), int(most)
    body = _sequence(inner)

    def run(path: Path, at: int) -> int:
        # a path of n characters is walked in n steps: of more repeats some are empty, and any number of them is
        for _ in range(min(least, len(path.text) + 1)):
            at = body(path, at)
        new = at
        for _ in range(min(most - least, len(path.text))):
            new = body(path, new) & ~at
            if not new:
                break
            at |= new
        return at

    single = _single(inner)
    if single is None or least > 1 or most < _ANY_NUMBER:
        return run
    return lambda path, at: _flood(path, body(path, at) if least else at, path.where(single))


_ANY_NUMBER = int(sre.MAXREPEAT)


def _single(nodes: Any) -> Callable[[str], bool] | None:
    """What the expression accepts where it is for one character: `.` or a class."""
    ((operation, argument), *more) = list(nodes) or [(None, None)]
    if more or operation not in (sre.ANY, sre.IN):
        return None
    return _not_newline if operation is sre.ANY else _accepts(argument)


def _flood(path: Path, at: int, accepted: int) -> int:
    """Every place that accepted characters lead to, in log(n) doublings."""
    shift = 1
    while shift <= len(path.text):
        at |= (at & accepted) << shift
        accepted &= accepted >> shift
        shift *= 2
    return at


def _look(argument: tuple[int, Any], wanted: bool) -> Step:
    direction, inner = argument
    body = _sequence(inner)
    if direction < 0:
        least, most = inner.getwidth()
        if least != most:
            raise KeyError("look-behind of no fixed width")
        return lambda path, at: at & (body(path, path.all) if wanted else ~body(path, path.all))
    return lambda path, at: sum(
        1 << i for i in range(at.bit_length()) if at >> i & 1 and bool(body(path, 1 << i)) == wanted
    )


def _at(where: Any) -> Step:
    places = _PLACES[where]
    return lambda path, at: at & places(path)


def _boundaries(path: Path) -> int:
    """Where a word begins or ends."""
    words = path.where(_is_word)
    return words ^ (words << 1)


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def _not_newline(character: str) -> bool:
    return character != "\n"


def _line_end(path: Path) -> int:
    return path.end | (path.end >> 1 if path.text.endswith("\n") else 0)


_PLACES: dict[Any, Callable[[Path], int]] = {
    sre.AT_BEGINNING: lambda path: 1,
    sre.AT_BEGINNING_STRING: lambda path: 1,
    sre.AT_END: _line_end,
    sre.AT_END_STRING: lambda path: path.end,
    sre.AT_BOUNDARY: _boundaries,
    sre.AT_NON_BOUNDARY: lambda path: path.all & ~_boundaries(path),
}
_CATEGORIES: dict[Any, Callable[[str], bool]] = {
    sre.CATEGORY_DIGIT: str.isdecimal,
    sre.CATEGORY_NOT_DIGIT: lambda character: not character.isdecimal(),
    sre.CATEGORY_SPACE: str.isspace,
    sre.CATEGORY_NOT_SPACE: lambda character: not character.isspace(),
    sre.CATEGORY_WORD: _is_word,
    sre.CATEGORY_NOT_WORD: lambda character: not _is_word(character),
}
_MEMBER: dict[Any, Callable[[Any], Callable[[str], bool]]] = {
    sre.LITERAL: lambda code: lambda character: ord(character) == code,
    sre.RANGE: lambda ends: lambda character: ends[0] <= ord(character) <= ends[1],
    sre.CATEGORY: lambda category: _CATEGORIES[category],
}
_BUILD: dict[Any, Callable[[Any], Step]] = {
    sre.LITERAL: _literal,
    sre.NOT_LITERAL: lambda code: _one(lambda character: ord(character) != code),
    sre.ANY: lambda _: _one(_not_newline),
    sre.IN: lambda items: _one(_accepts(items)),
    sre.BRANCH: _branch,
    sre.SUBPATTERN: _group,
    sre.MAX_REPEAT: _repeat,
    sre.MIN_REPEAT: _repeat,
    sre.ASSERT: lambda argument: _look(argument, True),
    sre.ASSERT_NOT: lambda argument: _look(argument, False),
    sre.AT: _at,
    sre.FAILURE: lambda _: _nothing,
}
