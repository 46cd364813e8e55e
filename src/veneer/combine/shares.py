"""How much of each adapter goes into each layer: a number, numbers by pattern, or the WebUI's block weights."""

import math
from collections.abc import Iterable, Mapping
from functools import cache

from veneer.combine.blocks import Blocks
from veneer.core.errors import AdapterError, listed, named, shown, unmatched
from veneer.safe.expression import Expression, Path

Weight = float | Mapping[str, float] | Blocks
OTHERS = ""  # the pattern of the layers that no other one matches


def shares(weight: Weight, paths: Iterable[str], whose: str) -> dict[str, float]:
    """The weight of each layer.

    A mapping holds expressions, each for the layers whose path ends with it, as in `rank_pattern` (`attn1\\..*`, or
    `unet\\..*`): the first one that matches counts, and "" is for all others. Raises `AdapterError` for what is no
    number, for expressions that match nothing and for layers that none matches.
    """
    paths = list(paths)
    if isinstance(weight, Blocks):
        return weight.shares(paths, whose)
    if not isinstance(weight, Mapping):
        return dict.fromkeys(paths, _number(weight, whose))
    numbers = {pattern: _number(value, f"{whose}: {shown(pattern)}") for pattern, value in weight.items()}
    expressions = {pattern: Expression(pattern) for pattern in numbers if pattern != OTHERS}
    path_of, found, idle = cache(Path), dict[str, float](), set(expressions)
    for path in paths:
        matching = [pattern for pattern, one in expressions.items() if one.tail(path_of(path))]
        idle.difference_update(matching)
        if matching or OTHERS in numbers:
            found[path] = numbers[matching[0] if matching else OTHERS]
    if idle:
        raise AdapterError(f"{whose}: weights: {unmatched(sorted(idle), 'layer', paths)}")
    if missing := [path for path in paths if path not in found]:
        raise AdapterError(
            f"{whose}: no pattern gives a weight to {listed(missing, say=named)}; say {{'': weight}} too"
        )
    return found


def _number(value: object, whose: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise AdapterError(f"{whose}: a weight should be a finite number, found {shown(value)}")
    return float(value)
