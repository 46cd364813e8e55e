"""Which layers a config means: names to layers, and nothing silently missed."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from torch import nn

from veneer.core.config import LoraConfig
from veneer.core.errors import AdapterError, listed, nearest, shown
from veneer.core.expression import Expression, Path
from veneer.core.kinds import kind_of
from veneer.core.kinds.layer import Adapters

# The layers that people adapt when they name none: mostly the attention's query and value, as in the LoRA paper.
_USUAL = {
    "q_proj v_proj": "bart clip cohere dinov2 gemma gemma2 gemma3_text gpt_neo gptj granite llama llama4 mbart mistral "
    "mixtral olmo2 opt phi qwen2 qwen3 smollm3 stablelm vit",
    "query value": "bert electra layoutlm roberta xlm-roberta",
    "query_key_value": "bloom falcon gpt_neox",
    "q v": "mt5 t5",
    "c_attn": "gpt2 gpt_bigcode",
    "q_lin v_lin": "distilbert",
    "query_proj value_proj": "deberta-v2",
    "in_proj": "deberta",
    "qkv_proj": "phi3",
    "Wqkv": "mpt",
}
DEFAULT_TARGETS = {family: names.split() for names, families in _USUAL.items() for family in families.split()}


@dataclass
class Target:
    """A layer to adapt, and the config as it reads for this layer."""

    layer: nn.Module
    config: LoraConfig


def select(model: nn.Module, config: LoraConfig) -> tuple[dict[str, Target], LoraConfig]:
    """The layers that `config` means, by path, and the config with `target_modules` spelled out.

    Raises one `AdapterError` for every entry, pattern or layer number that matches nothing, and for layers that no
    kind can adapt.
    """
    modules = base_modules(model)
    search = _Search(modules)
    names = config.target_modules if config.target_modules is not None else _usual(model, modules)
    if names == "all-linear":
        heads = _heads(model)
        named = [path for path, module in modules.items() if _is_linear(module) and module not in heads]
    else:
        named = search.matching(names, "target_modules")
    excluded = set(search.matching(config.exclude_modules or [], "exclude_modules"))
    chosen = search.in_layers([path for path in named if path not in excluded], config)
    if not chosen and not search.faults:
        search.faults.append(
            f"target_modules={shown(names)} leaves no layer of {type(model).__name__} to adapt; "
            f'its linear layers end with {listed(_last_parts(modules))}, or say "all-linear"'
        )
    _find_unadaptable(modules, chosen, search.faults)
    # a pattern for a layer whose name is misspelt is not wrong itself
    layers = modules if search.faults else {path: modules[path] for path in chosen}
    own = search.own_numbers(layers, config)
    if search.faults:
        raise AdapterError("\n".join(search.faults))
    # PEFT does not read an expression together with layer numbers
    spell = names == "all-linear" or (isinstance(names, str) and config.layers_to_transform is not None)
    resolved = replace(config, target_modules=_shortest(modules, chosen) if spell else names)
    return {
        path: Target(layer, replace(resolved, **own[path]) if own[path] else resolved) for path, layer in layers.items()
    }, resolved


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module of the base by path, leaving out what adapters added."""
    added = {inner for module in model.modules() if isinstance(module, Adapters) for inner in module.modules()}
    return {path: module for path, module in model.named_modules() if path and module not in added}


def _is_linear(module: nn.Module) -> bool:
    kind = kind_of(module)
    return kind is not None and kind.linear


def _heads(model: nn.Module) -> set[nn.Module]:
    """Output layers: transformers' output embeddings, and what stands outside of its backbone."""
    heads: set[nn.Module] = set()
    if output := getattr(model, "get_output_embeddings", lambda: None)():
        heads.add(output)
    backbone = getattr(model, "base_model", model)
    if isinstance(backbone, nn.Module) and backbone is not model:
        heads |= set(model.modules()) - set(backbone.modules())
    return heads


def _usual(model: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
    family = getattr(getattr(model, "config", None), "model_type", None)
    if family in DEFAULT_TARGETS:
        return DEFAULT_TARGETS[family]
    raise AdapterError(
        f"target_modules is not given and no usual choice is known for {family or type(model).__name__!r}; "
        f'say "all-linear" or name some of {listed(_last_parts(modules))}'
    )


def _last_parts(modules: dict[str, nn.Module]) -> list[str]:
    """The last parts of the linear layers' paths, each once, in the model's order."""
    return list(dict.fromkeys(path.rpartition(".")[2] for path, module in modules.items() if _is_linear(module)))


class _Search:
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
            ends = _last_parts(self.modules)
            hints = [f"{shown(name)} matches no module{nearest(name, [*ends, *self.modules])}" for name in missing[:8]]
            hints += [f"nor do {len(missing) - 8} more"] if len(missing) > 8 else []
            self.faults.append(f"{what}: {'; '.join(hints)}; the linear layers end with {listed(ends)}")
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
            hint = hint or nearest(text, ["all-linear", *_last_parts(self.modules)])
            said = f"{what}={shown(text)} is a regular expression for the whole path and matches none{hint}"
            self.faults.append(said)
        return [path for path in matches if kind_of(self.modules[path]) or _is_bare_layer(self.modules[path])]

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

    def own_numbers(self, layers: dict[str, nn.Module], config: LoraConfig) -> dict[str, dict[str, Any]]:
        """The `r` and `lora_alpha` that the first matching pattern gives each layer."""
        own: dict[str, dict[str, Any]] = {path: {} for path in layers}
        missing: dict[str, None] = {}
        for name, patterns in (("r", config.rank_pattern), ("lora_alpha", config.alpha_pattern)):
            if len(patterns) > 4 * len(layers) + 16:
                self.faults.append(f"{len(patterns)} patterns for {name}, of {len(layers)} layers, are too many")
                continue
            for key, value in patterns.items():
                try:
                    expression = Expression(key)
                    paths = [path for path in layers if expression.tail(self.path(path))]
                except AdapterError as error:
                    self.faults.append(f"rank_pattern, alpha_pattern: {error}")
                    continue
                missing |= {} if paths else {key: None}
                for path in paths:
                    own[path].setdefault(name, value)
        if missing:
            ends = [path.rpartition(".")[2] for path in layers]
            hints = [f"{shown(key)} matches no adapted layer{nearest(key, ends)}" for key in list(missing)[:8]]
            hints += [f"nor do {len(missing) - 8} more"] if len(missing) > 8 else []
            self.faults.append(f"rank_pattern, alpha_pattern: {'; '.join(hints)}")
        return own


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
    """The number that follows the last match of an expression: 3 in `model.layers.3.mlp`."""
    for expression in expressions:
        ends = expression.ends(path, path.names)
        for end in range(ends.bit_length() - 1, -1, -1):
            if ends >> end & 1 and (match := re.compile(r"\.(\d+)(?:\.|$)").match(path.text, end)):
                return int(match[1])
    return None


def _is_bare_layer(module: nn.Module) -> bool:
    return next(module.children(), None) is None and next(module.parameters(), None) is not None


def _find_unadaptable(modules: dict[str, nn.Module], chosen: list[str], faults: list[str]) -> None:
    problems = []
    for path in chosen:
        layer = modules[path]
        if kind_of(layer) is None:
            inner = [name for name, child in layer.named_modules() if kind_of(child)]
            hint = f"; it holds {listed(inner)}: name those" if inner else ""
            problems.append(f"{path} is a {type(layer).__name__}, which cannot be adapted{hint}")
        elif "forward" in vars(layer):
            problems.append(f"{path} has a forward put on the object by a hook: adapt the model before hooking it")
        elif hasattr(layer, "adapters") and not isinstance(layer.adapters, Adapters):
            problems.append(f"{path} already has something named 'adapters'")
    if problems:
        more = f"\nand {len(problems) - 8} more" if len(problems) > 8 else ""
        faults.append("target_modules: " + "\n".join(problems[:8]) + more)


def _shortest(modules: dict[str, nn.Module], chosen: list[str]) -> list[str]:
    """The last parts of the chosen paths, where they mean just these layers; else the whole paths."""
    ends = list(dict.fromkeys(path.rpartition(".")[2] for path in chosen))
    meant = {path for paths in ending_with(ends, modules).values() for path in paths}
    return ends if meant == set(chosen) else chosen
