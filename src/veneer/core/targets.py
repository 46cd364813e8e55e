"""Which layers a config means: names to layers, and nothing silently missed."""

import warnings
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from veneer.core.config import LoraConfig
from veneer.core.errors import AdapterError, listed, shown
from veneer.core.kinds import kind_of
from veneer.core.kinds.dense import AdaptedModule, AdaptedParameters
from veneer.core.kinds.embedding import AdaptedEmbedding
from veneer.core.kinds.layer import AdaptedLayer, Adapters
from veneer.core.methods.beside import Copy, Tokens
from veneer.core.reclass import is_fixed
from veneer.core.search import ROLES, Place, Search
from veneer.core.trained import TASK_HEADS, inside, other_biases, refuse_clashes, saved_modules, tie, token_tables
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
    rows: list[int] | None = None  # of a table that are trained by themselves
    tied_to: str | None = None  # the path of the layer whose change this one has, as it has its weight

    @property
    def own(self) -> Callable[[Tensor], Update] | None:
        """Makes what is trained here, where it is not the config's method."""
        if self.rows:
            return partial(Tokens, ids=self.rows)
        return Copy if self.kind is AdaptedModule else None

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

    def refusal(self) -> str | None:
        """Why the layer cannot be adapted so, as the end of a sentence."""
        if self.kind is None:
            inner = [name for name, child in self.layer.named_modules() if kind_of(child)]
            return "which cannot be adapted" + (f"; it holds {listed(inner)}: name those" if inner else "")
        if self.rows and self.tied_to is None and not issubclass(self.kind, AdaptedEmbedding):
            return "which is no table that can be adapted"
        if reason := _not_free(self.layer) or self.kind.refusal(self.layer, LoraConfig() if self.own else self.config):
            return reason
        size = len(self.layer.get_parameter("weight")) if self.rows else 0
        beyond = [token for token in self.rows or [] if token >= size]
        return f"with {size} rows, and no {listed(beyond)}" if beyond else None


def select(model: nn.Module, config: LoraConfig, fresh: bool = False) -> tuple[dict[str, Target], LoraConfig]:
    """The layers that `config` means, by path, and the config with `target_modules` spelled out.

    A `fresh` adapter has the heads of its task, and is warned of where it changes a shared weight in one layer alone.
    Raises `AdapterError` for every entry, pattern or layer number that matches nothing, and for layers that no kind can
    adapt.
    """
    search = Search(base_modules(model))
    saved, kept = saved_modules(search, config, fresh)
    rows = token_tables(model, search, config)
    chosen, names = _select_modules(model, search, config)
    layers = [(path, "") for path in chosen if not (saved and (path in saved or inside(path, saved)))]
    places = layers + (parameters := _matching_parameters(search, config))
    # a pattern for a layer whose name is misspelt is not wrong itself
    own = search.own_fields(dict.fromkeys(search.modules, "").items() if search.faults else places, config)
    asked: list[Any] = [("target_modules", *place, search.kind(place[0]), None) for place in layers]
    asked += [("target_parameters", *place, AdaptedParameters, None) for place in parameters]
    asked += [("modules_to_save", path, "", AdaptedModule, None) for path in saved]
    asked += [("trainable_token_indices", path, "", search.kind(path), ids) for path, ids in rows.items()]
    targets: dict[str, Target] = {}
    for field, path, part, kind, ids in asked:
        target = Target(search.modules[path], kind, {part: config}, ids)
        if changes := own.get((path, part)) if ids is None and kind is not AdaptedModule else None:
            target.configs[part] = copy(config)
            vars(target.configs[part]).update(changes)  # checked before, for all layers at once
        first = targets.setdefault(path, target)
        first.configs |= target.configs
        twice = (first.kind, first.rows) != (kind, ids)
        again = "that is changed in two ways: target it in one way only" if twice else None
        search.refuse(field, path, target.refusal() or again)
    search.stop()
    config = replace(config, target_modules=names, modules_to_save=kept or None)
    for path in other_biases(search, config, targets):
        targets[path] = Target(search.modules[path], AdaptedModule, {"bias": config})
        search.refuse("bias", path, _not_free(search.modules[path]))
    alone = tie(search, targets, config.ensure_weight_tying)
    refuse_clashes(search, targets)
    search.stop()
    if alone and fresh:
        advice = "merging will need untie=True; ensure_weight_tying=True changes both"
        warnings.warn(f"{'; '.join(alone)}: {advice}", stacklevel=6)
    return targets, config


def _select_modules(model: nn.Module, search: Search, config: LoraConfig) -> tuple[list[str], str | list[str] | None]:
    """The layers that `target_modules` means, and what it says of them in a file."""
    names = config.target_modules
    if names == [] or (names is None and config.target_parameters):
        return [], names
    names = _usual(model, search) if names is None else names
    role = ROLES.get(names) if isinstance(names, str) else None
    if role:
        heads = _heads(model, search)
        named = [path for path, module in search.modules.items() if role(path, search) and module not in heads]
    else:
        named = search.matching(names, "target_modules")
    excluded = set(search.matching(config.exclude_modules or [], "exclude_modules"))
    chosen = search.in_layers([path for path in named if path not in excluded], config)
    if not chosen and not search.faults:
        said = f"{shown(names)} leaves no layer of {type(model).__name__} to adapt"
        search.fault("target_modules", f'{said}; say "all-linear", or {search.known()}')
    # PEFT does not read roles, nor an expression together with layer numbers, and for some methods no numbers at all
    spell = role is not None or config.layers_to_transform is not None
    return chosen, _shortest(search.modules, chosen) if spell and chosen else names


def _matching_parameters(search: Search, config: LoraConfig) -> list[Place]:
    """Those that `target_parameters` names."""
    known = {
        f"{path}.{name}": (path, name)
        for path, module in (search.modules.items() if config.target_parameters else ())
        for name in AdaptedParameters.names(module)
    }
    what = "parameter of one to three dimensions"
    return [known[full] for full in search.named(config.target_parameters or [], "target_parameters", known, what)]


def every_module(model: nn.Module) -> dict[str, nn.Module]:
    """What `named_modules` gives, in a third of its time."""
    found, seen = {"": model}, {model}

    def below(prefix: str, module: nn.Module) -> None:
        for name, child in module._modules.items():
            if child is not None and child not in seen:
                seen.add(child)
                found[prefix + name] = child
                below(f"{prefix}{name}.", child)

    below("", model)
    return found


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module of the base by path, leaving out what adapters added."""
    modules = every_module(model)
    added = {inner for module in modules.values() if isinstance(module, Adapters) for inner in module.modules()}
    return {path: module for path, module in modules.items() if path and module not in added}


def _heads(model: nn.Module, search: Search) -> set[nn.Module | None]:
    """Output layers: transformers' output embeddings, and what stands outside of its backbone or has a head's name."""
    backbone = getattr(model, "base_model", None)
    if not isinstance(backbone, nn.Module):
        return set()
    named = {search.modules.get(name) for heads in TASK_HEADS.values() for name in heads}
    apart = set(search.modules.values()) - set(backbone.modules()) if backbone is not model else set()
    return apart | named | {getattr(model, "get_output_embeddings", lambda: None)()}


def _usual(model: nn.Module, search: Search) -> list[str]:
    family = getattr(getattr(model, "config", None), "model_type", None)
    if family in DEFAULT_TARGETS:
        return DEFAULT_TARGETS[family]
    raise AdapterError(
        f"target_modules is not given and no usual choice is known for {family or type(model).__name__!r}; "
        f'say "all-linear" or name some of {listed(search.last_parts())}'
    )


def _not_free(layer: nn.Module) -> str | None:
    if "forward" in vars(layer):
        return "that has a forward put on the object by a hook: adapt the model before hooking it"
    if hasattr(layer, "adapters") and not isinstance(layer.adapters, Adapters):
        return "that already has something named 'adapters'"
    if not isinstance(layer, AdaptedLayer) and is_fixed(layer):
        return "of a class that Python cannot exchange: it inherits from something else before nn.Module"
    if any(hasattr(parameter, "full_tensor") for parameter in layer._parameters.values()):
        return "that is spread over processes already: adapt the model before fully_shard"
    return None


def _shortest(modules: dict[str, nn.Module], chosen: list[str]) -> list[str]:
    """The last parts of the chosen paths, where they mean just these layers; else the whole paths."""
    ends = dict.fromkeys(path.rpartition(".")[2] for path in chosen)
    meant = sum(path.rpartition(".")[2] in ends for path in modules)
    return list(ends) if meant == len(chosen) else chosen
