"""Looks for what a config names among a model's modules, and keeps every fault that it finds."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch import nn

from veneer.core.config import LoraConfig
from veneer.core.errors import AdapterError, listed, nearest, shown, unmatched
from veneer.core.kinds import kind_of
from veneer.core.kinds.dense import AdaptedAttention
from veneer.core.ranges import OF_A_METHOD
from veneer.safe.expression import Expression, Path

Place = tuple[str, str]  # a layer's path, and the parameter that is adapted by its name; "" where it is the layer


class Search:
    """Looks for what a config names among the modules, and keeps every fault that it finds."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.modules, self.path = modules, cache(Path)
        self.kind: Callable[[str], Any] = cache(lambda path: kind_of(modules[path]))  # that of a layer, or None
        self.faults = defaultdict[str, list[str]](list)  # by the field of the config that is at fault

    def fault(self, field: str, said: str) -> None:
        """Keep what is wrong with a field of the config."""
        self.faults[field].append(said)

    def refuse(self, field: str, path: str, reason: str | None) -> None:
        """Keep why the field cannot mean that layer, if there is a reason."""
        if reason:
            self.fault(field, f"{path} is a {type(self.modules[path]).__name__} {reason}")

    def stop(self) -> None:
        """Raise all that was kept."""
        if self.faults:
            told = {field: listed(dict.fromkeys(own), say=str, between="\n") for field, own in self.faults.items()}
            raise AdapterError("\n".join(f"{field}: {said}" for field, said in told.items()))

    @contextmanager
    def _keeping(self, field: str) -> Iterator[None]:
        try:
            yield
        except AdapterError as error:
            self.fault(field, str(error))

    def matching(self, names: str | list[str], field: str, among: Iterable[str] | None = None) -> list[str]:
        """The paths (all, or `among` those) that an expression matches whole, or that end with one of the names."""
        among = self.modules if among is None else among
        return self._expression(names, field, among) if isinstance(names, str) else [*self.named(names, field, among)]

    def named(
        self, names: Iterable[str], field: str, among: Iterable[str], what: str = "module", in_a_word: bool = False
    ) -> dict[str, str]:
        """The paths that are one of the names or end with a dot and it (or just with it, `in_a_word`), each with the
        first such name; a name of no path is a fault.
        """
        order = {name: i for i, name in reversed(list(enumerate(names)))}
        found, missing = {}, dict.fromkeys(reversed(order))
        for path in among if order else ():
            if ends := [end for end in _ends(path, in_a_word) if end in order]:
                found[path] = min(ends, key=order.__getitem__)
                for end in ends:
                    missing.pop(end, None)
        if missing:
            hint = f"; {self.known()}" if what == "module" else ""
            self.fault(field, unmatched(missing, what, _tails(among)) + hint)
        return found

    def known(self) -> str:
        """What may have been meant: how the paths of linear layers end, and those of parameters that are stacks."""
        stacks = dict.fromkeys(
            f"{path.rpartition('.')[2]}.{name}"
            for path, module in self.modules.items()
            for name, own in ({} if self.kind(path) else module._parameters).items()
            if own is not None and own.ndim == 3
        )
        more = f", and for target_parameters there are {listed(stacks)}" if stacks else ""
        return f"the linear layers end with {listed(self.last_parts())}{more}"

    def last_parts(self) -> list[str]:
        """The last parts of the linear layers' paths, each once, in the model's order."""
        return list(dict.fromkeys(path.rpartition(".")[2] for path in self.modules if _is_linear(path, self)))

    def _expression(self, text: str, field: str, among: Iterable[str]) -> list[str]:
        """Containers and layers without parameters are passed over."""
        with self._keeping(field):
            expression = Expression(text)
            matches = [path for path in among if expression.whole(self.path(path))]
            if not matches:
                suffix = any(path.endswith(f".{text}") for path in among)
                hint = f"; for every layer whose path ends with it, give a list: [{text!r}]" if suffix else ""
                hint = hint or nearest(text, [*ROLES, *self.last_parts()])
                self.fault(field, f"{shown(text)} is a regular expression for the whole path and matches none{hint}")
            return [path for path in matches if self.kind(path) or _is_bare(self.modules[path])]
        return []

    def in_layers(self, paths: list[str], config: LoraConfig) -> list[str]:
        """Those paths that stand in one of `layers_to_transform`, numbered under `layers_pattern` (or any list)."""
        wanted, patterns = config.layers_to_transform, config.layers_pattern or r"[^.]+"
        if wanted is None or not paths:
            return paths
        with self._keeping("layers_pattern"):
            expressions = [Expression(text) for text in ([patterns] if isinstance(patterns, str) else patterns)]
            number = {path: _number(self.path(path), expressions) for path in paths}
            asked = {wanted} if isinstance(wanted, int) else set(wanted)
            there = sorted({i for i in number.values() if i is not None})
            if missing := sorted(asked - set(there)):
                span = f"{there[0]} to {there[-1]}" if there else f"no numbered layers under {shown(patterns)}"
                self.fault("layers_to_transform", f"no targeted layer is in {shown(missing)}; there are {span}")
            return [path for path in paths if number[path] in asked]
        return paths

    def own_fields(self, places: Iterable[Place], config: LoraConfig) -> dict[Place, dict[str, Any]]:
        """The fields of the config that places have for themselves: a method by `method_pattern`, `r` and `lora_alpha`
        by theirs, and what the method says of them.
        """
        names = {place: {place[0], ".".join(filter(None, place))} for place in places}
        own = defaultdict[Place, dict[str, Any]](dict)
        for field, name in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
            for place, value in self._patterned(names, field, getattr(config, field)).items():
                own[place][name] = value
        entries = self._patterned(names, "method_pattern", config.method_pattern)
        groups = defaultdict[str, list[Place]](list)
        for place in names:
            groups[repr(entries.get(place))].append(place)
        for group in groups.values():
            meant, entry = config, entries.get(group[0])
            if entry is not None:
                meant = config.with_method(entry)
                for place in group:
                    own[place] |= {name: getattr(meant, name) for name in OF_A_METHOD}
            placed = meant.method.placed(meant, self, list(dict.fromkeys(path for path, _ in group)))
            for place in group if placed else ():
                own[place] |= placed.get(place[0], {})
        return own

    def _patterned(self, names: dict[Place, set[str]], field: str, patterns: dict[str, Any]) -> dict[Place, Any]:
        """What the patterns give the places that they match; the first one counts."""
        if len(patterns) > 4 * len(names) + 16:
            self.fault(field, f"{len(patterns)} patterns, of {len(names)} layers, are too many")
            return {}
        found, missing, homes = dict[Place, Any](), [], defaultdict[str, list[Place]](list)
        for place, paths in names.items():
            for path in paths:
                homes[path].append(place)
        for key, value in patterns.items():
            with self._keeping(field):
                expression = Expression(key)
                if expression.only:  # a file may name each of its thousand layers
                    matches = homes.get(expression.only, [])
                else:
                    matches = [at for at, paths in names.items() if any(map(expression.tail, map(self.path, paths)))]
                missing += [] if matches else [key]
                for place in matches:
                    found.setdefault(place, value)
        if missing:
            self.fault(field, unmatched(missing, "adapted layer", _tails([path for path, _ in names])))
        return found


def _ends(path: str, in_a_word: bool) -> Iterator[str]:
    while path:
        yield path
        path = path[1:] if in_a_word else path.partition(".")[2]


def _tails(paths: Iterable[str]) -> list[str]:
    """What a misspelt name may have meant: the last parts of the paths, their last two, and the whole."""
    return list(dict.fromkeys(".".join(path.split(".")[-parts:]) for parts in (1, 2, 0) for path in paths))


def _number(path: Path, expressions: list[Expression]) -> int | None:
    """The number that follows an expression's first match, as PEFT reads it: 3 in `model.layers.3.experts.1`."""
    for expression in expressions:
        for end in sorted(expression.ends(path, path.names)):
            if match := re.compile(r"\.(\d+)(?:\.|$)").match(path.text, end):
                return int(match[1])
    return None


def _is_bare(module: nn.Module) -> bool:
    return next(module.children(), None) is None and next(module.parameters(), None) is not None


# What families call the modules that hold the layers of a role: (their own names, the ends of their classes' names)
_ATTENTION = (re.compile(r"(.*_)?(attn|attention)\d*"), ("Attention",))
_FEED_FORWARD = (
    re.compile(r"(.*_)?(mlp|ff|ffn|feed_forward)"),
    ("MLP", "FeedForward", "FFN", "Intermediate", "Output", "ActDense", "Mlp"),
)
_DIRECT = {"fc1", "fc2", "linear1", "linear2"}  # OPT and nn.TransformerEncoderLayer keep these in the block itself


def _is_linear(path: str, search: Search) -> bool:
    return getattr(search.kind(path), "linear", False)


def _stands_in(path: str, search: Search, names: re.Pattern[str], classes: tuple[str, ...]) -> bool:
    while path := path.rpartition(".")[0]:
        if names.fullmatch(path.rpartition(".")[2]) or type(search.modules[path]).__name__.endswith(classes):
            return True
    return False


def _is_attention(path: str, search: Search) -> bool:
    linear = _is_linear(path, search)
    return _stands_in(path, search, *_ATTENTION) if linear else search.kind(path) is AdaptedAttention


def _is_feed_forward(path: str, search: Search) -> bool:
    holder, _, name = path.rpartition(".")
    routes = hasattr(search.modules.get(holder), "experts")  # what stands beside experts says which of them run
    if not _is_linear(path, search) or _is_attention(path, search) or routes:
        return False
    return name in _DIRECT or _stands_in(path, search, *_FEED_FORWARD)


ROLES: dict[str, Callable[[str, Search], bool]] = {
    "all-linear": _is_linear,
    "attention": _is_attention,
    "feed-forward": _is_feed_forward,
    "norm": lambda path, search: getattr(search.kind(path), "norm", False),
}
