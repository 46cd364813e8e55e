"""Which layers a config means: names to layers, and nothing silently missed."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor, nn

from veneer.core.config import LoraConfig
from veneer.core.errors import AdapterError, listed, shown, unmatched
from veneer.core.kinds import kind_of
from veneer.core.kinds.dense import AdaptedParameters
from veneer.core.kinds.layer import AdaptedLayer, Adapters
from veneer.core.kinds.module import AdaptedModule
from veneer.core.methods import method
from veneer.core.methods.copy import Copy
from veneer.core.methods.tokens import Tokens
from veneer.core.reclass import is_fixed, mixin_of
from veneer.core.roles import ROLES
from veneer.core.search import Place, Search, ending_with, last_parts
from veneer.core.tied import tie
from veneer.core.trained import clashes, inside, other_biases, saved_modules, token_tables, with_heads
from veneer.core.update import Update

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
    """A layer to adapt, as which kind, and the config as it reads for each part of this layer."""

    layer: nn.Module
    kind: type[AdaptedLayer]
    configs: dict[str, LoraConfig]
    own: Callable[[Tensor], Update] | None = None  # makes what is trained here, where it is not the config's method
    rows: list[int] | None = None  # of a table that are trained by themselves
    tied_to: str | None = None  # the path of the layer whose change this one has, as it has its weight

    def matrices(self) -> dict[str, Tensor]:
        """What of the layer changes, by part."""
        return self.kind.matrices(self.layer)

    def bias(self) -> Tensor | None:
        """The layer's bias, where it is trained beside the method."""
        trains = self.own is None and self.kind.biased and self.config.bias != "none"
        return getattr(self.layer, "bias", None) if trains else None

    def parameters(self) -> set[str]:
        """The names of what changes."""
        parts = {part: own for part, own in self.matrices().items() if part in self.configs or "" in self.configs}
        return set(self.kind.values(self.layer, parts))

    @property
    def config(self) -> LoraConfig:
        return next(iter(self.configs.values()))


def select(model: nn.Module, config: LoraConfig, fresh: bool = False) -> tuple[dict[str, Target], LoraConfig]:
    """The layers that `config` means, by path, and the config with `target_modules` spelled out.

    A `fresh` adapter has the heads of its task, and is warned of where it changes a shared weight in one layer alone.
    Raises `AdapterError` for every entry, pattern or layer number that matches nothing, and for layers that no kind can
    adapt.
    """
    modules = base_modules(model)
    search = Search(modules)
    saved, config = saved_modules(modules, with_heads(config) if fresh else config, search.faults)
    tables = token_tables(model, modules, config, search.faults)
    if config.target_modules == [] or (config.target_parameters and config.target_modules is None):
        chosen: list[str] = []
        resolved = config
    else:
        chosen, resolved = _select_modules(model, search, config)
    chosen = [path for path in chosen if path not in saved and not inside(path, saved)]
    places = [(path, "") for path in chosen] + _matching_parameters(search, config)
    kinds = {place: AdaptedParameters if place[1] else kind_of(modules[place[0]]) for place in places}
    _find_unadaptable(search, config, kinds, saved)
    options, wrong = method(config.peft_type).placed(config, modules, list({path: None for path, _ in places}))
    search.faults += wrong
    # a pattern for a layer whose name is misspelt is not wrong itself
    own = search.own_numbers([(path, "") for path in modules] if search.faults else places, config)
    named = search.named_layers(chosen, config)
    if search.faults:
        raise AdapterError("\n".join(search.faults))
    targets: dict[str, Target] = {}
    for path, part in places:
        kind = kinds[path, part]
        assert kind is not None
        target = targets.setdefault(path, Target(modules[path], kind, {}))
        # checked before, for all layers at once
        meant = {name: path in paths for name, paths in named.items()}
        target.configs[part] = copy(resolved)
        options_here = {**options.get(path, resolved.options), **meant}
        vars(target.configs[part]).update({**own[path, part], "options": options_here})
    alone = _add_trained(modules, targets, saved, tables, resolved)
    if alone and fresh:
        advice = "merging will need untie=True; ensure_weight_tying=True changes both"
        warnings.warn(f"{'; '.join(alone)}: {advice}", stacklevel=6)
    return targets, resolved


def _add_trained(
    modules: dict[str, nn.Module],
    targets: dict[str, Target],
    saved: Iterable[str],
    tables: dict[str, list[int]],
    config: LoraConfig,
) -> list[str]:
    """What is trained beside the method, and the layers that follow; returns what is changed in one layer alone."""
    twice = [path for path in tables if path in targets or path in saved]
    targets |= {path: Target(modules[path], AdaptedModule, {"": config}, Copy) for path in saved}
    for path, ids in tables.items():
        kind = kind_of(modules[path])
        assert kind is not None
        targets[path] = Target(modules[path], kind, {"": config}, partial(Tokens, ids=ids), ids)
    biases, problems = other_biases(modules, config, {path: target.kind for path, target in targets.items()})
    targets |= {path: Target(modules[path], AdaptedModule, {"bias": config}, Copy) for path in biases}
    alone, unfollowed = tie(modules, targets, config.ensure_weight_tying)
    more = {path: target.layer for path, target in targets.items() if target.own or target.tied_to is not None}
    hooked = {path: _not_free(layer) for path, layer in more.items()}
    problems += [f"{path} is a {type(more[path]).__name__} {reason}" for path, reason in hooked.items() if reason]
    problems += [f"{path} is changed in two ways: target it in one" for path in twice]
    problems += [*unfollowed, *clashes(modules, {path: target.kind for path, target in targets.items()})]
    if problems:
        raise AdapterError(_told(problems))
    return alone


def _select_modules(model: nn.Module, search: Search, config: LoraConfig) -> tuple[list[str], LoraConfig]:
    modules = search.modules
    names = config.target_modules if config.target_modules is not None else _usual(model, modules)
    role = ROLES.get(names) if isinstance(names, str) else None
    if role:
        heads = _heads(model)
        named = [path for path, module in modules.items() if module not in heads and role(path, modules)]
    else:
        named = search.matching(names, "target_modules")
    excluded = set(search.matching(config.exclude_modules or [], "exclude_modules"))
    chosen = search.in_layers([path for path in named if path not in excluded], config)
    if not chosen and not search.faults:
        search.faults.append(
            f"target_modules={shown(names)} leaves no layer of {type(model).__name__} to adapt; "
            f'its linear layers end with {listed(last_parts(modules))}, or say "all-linear"'
        )
    # PEFT does not read an expression together with layer numbers, and for some methods not these either, nor roles
    numbered = method(config.peft_type).peft_names.get("layers_to_transform", "") is not None
    spell = role is not None or (config.layers_to_transform is not None and (isinstance(names, str) or not numbered))
    return chosen, replace(config, target_modules=_shortest(modules, chosen) if spell and chosen else names)


def _matching_parameters(search: Search, config: LoraConfig) -> list[Place]:
    """Those that `target_parameters` names."""
    known = {
        f"{path}.{name}": (path, name)
        for path, module in (search.modules.items() if config.target_parameters else ())
        for name, parameter in module.named_parameters(recurse=False)
        if 1 <= parameter.ndim <= 3
    }
    matches = ending_with(config.target_parameters or [], known)
    if missing := [name for name in matches if not matches[name]]:
        ends = [".".join(full.rsplit(".", 2)[-2:]) for full in known]
        said = unmatched(missing, "parameter of one to three dimensions", ends)
        search.faults.append(f"target_parameters: {said}")
    found = {full for paths in matches.values() for full in paths}
    return [place for full, place in known.items() if full in found]


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module of the base by path, leaving out what adapters added."""
    added = {inner for module in model.modules() if isinstance(module, Adapters) for inner in module.modules()}
    return {path: module for path, module in model.named_modules() if path and module not in added}


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
        f'say "all-linear" or name some of {listed(last_parts(modules))}'
    )


def _find_unadaptable(
    search: Search, config: LoraConfig, kinds: Mapping[Place, type[AdaptedLayer] | None], saved: Iterable[str]
) -> None:
    asked = [
        ("target_parameters" if part else "target_modules", path, part, kind) for (path, part), kind in kinds.items()
    ]
    asked += [("modules_to_save", path, "", AdaptedModule) for path in saved]
    problems: dict[str, dict[str, None]] = {what: {} for what, *_ in asked}
    for what, path, part, kind in asked:
        layer = search.modules[path]
        name = type(layer).__name__
        if kind is None:
            inner = [name for name, child in layer.named_modules() if kind_of(child)]
            name += ","
            reason: str | None = "which cannot be adapted" + (
                f"; it holds {listed(inner)}: name those" if inner else ""
            )
        elif part and ((path, "") in kinds or (isinstance(layer, AdaptedLayer) and mixin_of(layer) is not kind)):
            reason = "that is adapted as a layer too: target it in one way only"
        else:
            reason = _not_free(layer) or kind.refusal(layer, config)
        if reason:
            problems[what][f"{path} is a {name} {reason}"] = None
    search.faults += [f"{what}: {_told(list(said))}" for what, said in problems.items() if said]


def _told(problems: list[str]) -> str:
    return "\n".join(problems[:8]) + (f"\nand {len(problems) - 8} more" if len(problems) > 8 else "")


def _not_free(layer: nn.Module) -> str | None:
    if "forward" in vars(layer):
        return "that has a forward put on the object by a hook: adapt the model before hooking it"
    if hasattr(layer, "adapters") and not isinstance(layer.adapters, Adapters):
        return "that already has something named 'adapters'"
    if not isinstance(layer, AdaptedLayer) and is_fixed(layer):
        return "of a class that Python cannot exchange: it inherits from something else before nn.Module"
    if any(hasattr(parameter, "full_tensor") for parameter in layer.parameters(recurse=False)):
        return "that is spread over processes already: adapt the model before fully_shard"
    return None


def _shortest(modules: dict[str, nn.Module], chosen: list[str]) -> list[str]:
    """The last parts of the chosen paths, where they mean just these layers; else the whole paths."""
    ends = list(dict.fromkeys(path.rpartition(".")[2] for path in chosen))
    meant = {path for paths in ending_with(ends, modules).values() for path in paths}
    return ends if meant == set(chosen) else chosen
