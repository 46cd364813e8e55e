"""Looks for what a config names among a model's modules, and keeps every fault that it finds."""

import re
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping
from functools import cache
from typing import Any

from torch import nn

from veneer.core.config import LoraConfig
from veneer.core.errors import AdapterError, listed, nearest, shown, unmatched
from veneer.core.expression import Expression, Path
from veneer.core.kinds import kind_of
from veneer.core.roles import ROLES

Place = tuple[str, str]  # a layer's path, and the parameter that is adapted by its name; "" where it is the layer


class Search:
    """Looks for what a config names among the modules, and keeps every fault that it finds."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.modules, self.faults = modules, list[str]()
        self.kinds = {path: kind_of(module) for path, module in modules.items()}
        self.path = cache(Path)

    def fault(self, what: str, problems: Iterable[str]) -> None:
        """Keep the problems with what a field of the config names, each once, if there are any."""
        if problems := list(dict.fromkeys(problems)):
            self.faults.append(f"{what}: " + listed(problems, say=str, between="\n", rest="\nand {} more"))

    def stop(self) -> None:
        """Raise what was found."""
        if self.faults:
            raise AdapterError("\n".join(self.faults))

    def matching(self, names: str | list[str], what: str, among: Iterable[str] | None = None) -> list[str]:
        """The paths (all, or `among` those) that an expression matches whole, or that end with one of the names."""
        among = list(self.modules if among is None else among)
        if isinstance(names, str):
            return self._expression(names, what, among)
        hint = f"; the linear layers end with {listed(self.last_parts())}"
        wanted = joined(self.named(names, what, among, hint=hint))
        return [path for path in among if path in wanted]

    def named(
        self,
        names: Iterable[str],
        what: str,
        among: Iterable[str],
        noun: str = "module",
        hint: str = "",
        in_a_word: bool = False,
        optional: Container[str] = (),
    ) -> dict[str, list[str]]:
        """For each name, once, the paths that are the name or end with a dot and it; or just end with it, `in_a_word`.

        A name without any is a fault, and what is `optional` is then left out.
        """
        found: dict[str, list[str]] = {name: [] for name in names}
        for path in among if found else ():
            end = path
            while end:
                if end in found:
                    found[end].append(path)
                end = end[1:] if in_a_word else end.partition(".")[2]
        self.missing(what, [name for name in found if not (found[name] or name in optional)], among, noun, hint)
        return {name: paths for name, paths in found.items() if paths or name not in optional}

    def missing(self, what: str, names: list[str], among: Iterable[str], noun: str, hint: str = "") -> None:
        """Keep the fault of names that match nothing."""
        if names:
            known = dict.fromkeys(".".join(path.split(".")[-parts:]) for parts in (1, 2, 0) for path in among)
            self.faults.append(f"{what}: {unmatched(names, noun, known)}{hint}")

    def last_parts(self) -> list[str]:
        """The last parts of the linear layers' paths, each once, in the model's order."""
        is_linear = ROLES["all-linear"]
        return list(dict.fromkeys(path.rpartition(".")[2] for path in self.modules if is_linear(path, self)))

    def _expression(self, text: str, what: str, among: list[str]) -> list[str]:
        """Containers and layers without parameters are passed over."""
        try:
            expression = Expression(text)
            matches = [path for path in among if expression.whole(self.path(path))]
        except AdapterError as error:
            self.faults.append(f"{what}: {error}")
            return []
        if not matches:
            suffix = any(path.endswith(f".{text}") for path in among)
            hint = f"; for every layer whose path ends with it, give a list: [{text!r}]" if suffix else ""
            hint = hint or nearest(text, [*ROLES, *self.last_parts()])
            self.faults.append(
                f"{what}={shown(text)} is a regular expression for the whole path and matches none{hint}"
            )
        return [path for path in matches if self.kinds[path] or _is_bare(self.modules[path])]

    def in_layers(self, paths: list[str], config: LoraConfig) -> list[str]:
        """Those paths that stand in one of `layers_to_transform`, numbered under `layers_pattern` (or any list)."""
        wanted = config.layers_to_transform
        if wanted is None or not paths:
            return paths
        patterns = config.layers_pattern or r"[^.]+"
        try:
            expressions = [Expression(text) for text in ([patterns] if isinstance(patterns, str) else patterns)]
            number = {path: _number(self.path(path), expressions) for path in paths}
        except AdapterError as error:
            self.faults.append(f"layers_pattern: {error}")
            return paths
        asked = {wanted} if isinstance(wanted, int) else set(wanted)
        there = sorted({i for i in number.values() if i is not None})
        if missing := sorted(asked - set(there)):
            span = f"{there[0]} to {there[-1]}" if there else f"no numbered layers under {shown(patterns)}"
            self.faults.append(f"layers_to_transform: no targeted layer is in {shown(missing)}; there are {span}")
        return [path for path in paths if number[path] in asked]

    def own_numbers(self, places: Iterable[Place], config: LoraConfig) -> dict[Place, dict[str, Any]]:
        """The `r` and `lora_alpha` of the places that a pattern matches; the first one counts."""
        places, own, missing = list(places), defaultdict[Place, dict[str, Any]](dict), dict[str, None]()
        for name, patterns in (("r", config.rank_pattern), ("lora_alpha", config.alpha_pattern)):
            if len(patterns) > 4 * len(places) + 16:
                self.faults.append(f"{len(patterns)} patterns for {name}, of {len(places)} layers, are too many")
                continue
            for key, value in patterns.items():
                try:
                    expression = Expression(key)
                    matches = [place for place in places if self._ends_with(expression, *place)]
                except AdapterError as error:
                    self.faults.append(f"rank_pattern, alpha_pattern: {error}")
                    continue
                missing |= {} if matches else {key: None}
                for place in matches:
                    own[place].setdefault(name, value)
        self.missing("rank_pattern, alpha_pattern", list(missing), dict(places), "adapted layer")
        return own

    def _ends_with(self, expression: Expression, path: str, part: str) -> bool:
        names = [f"{path}.{part}", path] if part else [path]
        return any(expression.tail(self.path(name)) for name in names)


def joined(found: Mapping[str, Iterable[str]]) -> set[str]:
    """All that was found, whatever name it was found by."""
    return {path for paths in found.values() for path in paths}


def _number(path: Path, expressions: list[Expression]) -> int | None:
    """The number that follows an expression's first match, as PEFT reads it: 3 in `model.layers.3.experts.1`."""
    for expression in expressions:
        for end in sorted(expression.ends(path, path.names)):
            if match := re.compile(r"\.(\d+)(?:\.|$)").match(path.text, end):
                return int(match[1])
    return None


def _is_bare(module: nn.Module) -> bool:
    return next(module.children(), None) is None and next(module.parameters(), None) is not None
