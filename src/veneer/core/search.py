"""Looks for what a config names among a model's modules, and keeps every fault that it finds."""

import re
from collections.abc import Iterable
from functools import cache
from typing import Any

from torch import nn

from veneer.core.config import LoraConfig
from veneer.core.errors import AdapterError, listed, nearest, shown, unmatched
from veneer.core.expression import Expression, Path
from veneer.core.kinds import kind_of
from veneer.core.methods import method
from veneer.core.roles import ROLES

Place = tuple[str, str]  # a layer's path, and the parameter that is adapted by its name; "" where it is the layer


class Search:
    """Looks for what a config names among the modules, and keeps every fault that it finds."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.modules, self.faults = modules, list[str]()
        self.path = cache(Path)

    def matching(self, names: str | list[str], what: str) -> list[str]:
        """The paths that an expression matches whole, or those that are or end with one of the names."""
        return self._expression(names, what) if isinstance(names, str) else self._names(names, what)

    def _names(self, names: list[str], what: str) -> list[str]:
        found = ending_with(names, self.modules)
        if missing := [name for name in found if not found[name]]:
            ends = last_parts(self.modules)
            said = unmatched(missing, "module", [*ends, *self.modules])
            self.faults.append(f"{what}: {said}; the linear layers end with {listed(ends)}")
        wanted = {path for paths in found.values() for path in paths}
        return [path for path in self.modules if path in wanted]

    def _expression(self, text: str, what: str) -> list[str]:
        """Containers and layers without parameters are passed over."""
        try:
            expression = Expression(text)
            matches = [path for path in self.modules if expression.whole(self.path(path))]
        except AdapterError as error:
            self.faults.append(f"{what}: {error}")
            return []
        if not matches:
            suffix = any(path.endswith(f".{text}") for path in self.modules)
            hint = f"; for every layer whose path ends with it, give a list: [{text!r}]" if suffix else ""
            hint = hint or nearest(text, [*ROLES, *last_parts(self.modules)])
            self.faults.append(
                f"{what}={shown(text)} is a regular expression for the whole path and matches none{hint}"
            )
        return [path for path in matches if kind_of(self.modules[path]) or _is_bare(self.modules[path])]

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

    def own_numbers(self, places: list[Place], config: LoraConfig) -> dict[Place, dict[str, Any]]:
        """The `r` and `lora_alpha` that the first matching pattern gives each place."""
        own: dict[Place, dict[str, Any]] = {place: {} for place in places}
        missing: dict[str, None] = {}
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
        if missing:
            ends = [path.rpartition(".")[2] for path, _ in places]
            self.faults.append(f"rank_pattern, alpha_pattern: {unmatched(missing, 'adapted layer', ends)}")
        return own

    def named_layers(self, chosen: list[str], config: LoraConfig) -> dict[str, list[str]]:
        """For each of the method's options that name layers, which of the chosen ones it means."""
        among = Search({path: self.modules[path] for path in chosen})
        options = method(config.peft_type).options
        found = {
            name: among.matching(config.options[name], f"{name} among the adapted layers")
            for name, option in options.items()
            if option.layers
        }
        self.faults += among.faults if chosen else []
        return found

    def _ends_with(self, expression: Expression, path: str, part: str) -> bool:
        names = [f"{path}.{part}", path] if part else [path]
        return any(expression.tail(self.path(name)) for name in names)


def ending_with(names: Iterable[str], paths: Iterable[str]) -> dict[str, list[str]]:
    """For each name, the paths that are the name or end with a dot and the name."""
    found: dict[str, list[str]] = {name: [] for name in names}
    for path in paths:
        end = path
        while end:
            if end in found:
                found[end].append(path)
            end = end.partition(".")[2]
    return found


def _number(path: Path, expressions: list[Expression]) -> int | None:
    """The number that follows an expression's first match, as PEFT reads it: 3 in `model.layers.3.experts.1`."""
    for expression in expressions:
        ends = expression.ends(path, path.names)
        for end in range(ends.bit_length()):
            if ends >> end & 1 and (match := re.compile(r"\.(\d+)(?:\.|$)").match(path.text, end)):
                return int(match[1])
    return None


def _is_bare(module: nn.Module) -> bool:
    return next(module.children(), None) is None and next(module.parameters(), None) is not None


def last_parts(modules: dict[str, nn.Module]) -> list[str]:
    """The last parts of the linear layers' paths, each once, in the model's order."""
    is_linear = ROLES["all-linear"]
    return list(dict.fromkeys(path.rpartition(".")[2] for path in modules if is_linear(path, modules)))
