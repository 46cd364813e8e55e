"""Which layers a config means: names to layers, and nothing silently missed."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor, nn

from veneer.core.config import LoraConfig
from veneer.core.errors import AdapterError, listed, nearest, shown
from veneer.core.kinds import kind_of
from veneer.core.kinds.dense import AdaptedParameters
from veneer.core.kinds.layer import AdaptedLayer, Adapters
from veneer.core.reclass import is_fixed
from veneer.core.roles import ROLES
from veneer.core.search import Place, Search, ending_with, last_parts

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

    def matrices(self) -> dict[str, Tensor]:
        """What of the layer changes, by part."""
        return self.kind.matrices(self.layer)

    @property
    def config(self) -> LoraConfig:
        return next(iter(self.configs.values()))


def select(model: nn.Module, config: LoraConfig) -> tuple[dict[str, Target], LoraConfig]:
    """The layers that `config` means, by path, and the config with `target_modules` spelled out.

    Raises `AdapterError` for every entry, pattern or layer number that matches nothing, and for layers that no
    kind can adapt.
    """
    modules = base_modules(model)
    search = Search(modules)
    if config.target_parameters and config.target_modules is None:
        chosen: list[str] = []
        resolved = config
    else:
        chosen, resolved = _select_modules(model, search, config)
    _find_unadaptable(modules, chosen, config, search.faults)
    places = [*((path, "") for path in chosen), *_matching_parameters(search, config, chosen)]
    # a pattern for a layer whose name is misspelt is not wrong itself
    own = search.own_numbers([(path, "") for path in modules] if search.faults else places, config)
    if search.faults:
        raise AdapterError("\n".join(search.faults))
    targets: dict[str, Target] = {}
    for path, part in places:
        kind = AdaptedParameters if part else kind_of(modules[path])
        assert kind is not None
        numbers = own[path, part]
        target = targets.setdefault(path, Target(modules[path], kind, {}))
        target.configs[part] = replace(resolved, **numbers) if numbers else resolved
    return targets, resolved


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
    # PEFT does not read an expression together with layer numbers, nor roles
    spell = role is not None or (isinstance(names, str) and config.layers_to_transform is not None)
    return chosen, replace(config, target_modules=_shortest(modules, chosen) if spell and chosen else names)


def _matching_parameters(search: Search, config: LoraConfig, chosen: Iterable[str]) -> list[Place]:
    """Those that `target_parameters` names."""
    if not config.target_parameters:
        return []
    modules = search.modules
    known = {
        f"{path}.{name}": (path, name)
        for path, module in modules.items()
        for name, parameter in module.named_parameters(recurse=False)
        if 1 <= parameter.ndim <= 3
    }
    ends = [".".join(full.rsplit(".", 2)[-2:]) for full in known]
    matches = ending_with(config.target_parameters, known)
    problems = [
        f"{shown(wanted)} matches no parameter of one to three dimensions{nearest(wanted, ends)}"
        for wanted, paths in matches.items()
        if not paths
    ]
    found = {full for paths in matches.values() for full in paths}
    places = [place for full, place in known.items() if full in found]
    for path in dict.fromkeys(path for path, _ in places):
        layer = modules[path]
        if path in chosen or (isinstance(layer, AdaptedLayer) and not isinstance(layer, AdaptedParameters)):
            problems.append(f"{path} is adapted as a layer: target it in one way only")
        elif reason := _not_free(layer) or AdaptedParameters.refusal(layer, config):
            problems.append(f"{path} is a {type(layer).__name__} {reason}")
    if problems:
        search.faults.append("target_parameters: " + _told(problems))
    return places


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


def _find_unadaptable(modules: dict[str, nn.Module], chosen: list[str], config: LoraConfig, faults: list[str]) -> None:
    problems = []
    for path in chosen:
        layer = modules[path]
        kind = kind_of(layer)
        if kind is None:
            inner = [name for name, child in layer.named_modules() if kind_of(child)]
            hint = f"; it holds {listed(inner)}: name those" if inner else ""
            problems.append(f"{path} is a {type(layer).__name__}, which cannot be adapted{hint}")
        elif reason := _not_free(layer) or kind.refusal(layer, config):
            problems.append(f"{path} is a {type(layer).__name__} {reason}")
    if problems:
        faults.append("target_modules: " + _told(problems))


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
