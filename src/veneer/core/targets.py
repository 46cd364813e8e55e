"""Which layers a config means: names to layers, and nothing silently missed."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from veneer.core.config import LoraConfig
from veneer.core.errors import AdapterError, listed, nearest
from veneer.core.kinds import kind_of
from veneer.core.kinds.dense import AdaptedParameters
from veneer.core.kinds.layer import AdaptedLayer, Adapters
from veneer.core.roles import ROLES

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
    if config.target_parameters and config.target_modules is None:
        chosen: list[str] = []
        resolved = config
    else:
        chosen, resolved = _select_modules(model, modules, config)
    _refuse_unadaptable(modules, chosen, config)
    parameters = _matching_parameters(modules, config, chosen)
    configs = _with_patterns([*((path, "") for path in chosen), *parameters], resolved)
    targets: dict[str, Target] = {}
    for (path, part), own in configs.items():
        kind = AdaptedParameters if part else kind_of(modules[path])
        assert kind is not None
        targets.setdefault(path, Target(modules[path], kind, {})).configs[part] = own
    return targets, resolved


def _select_modules(
    model: nn.Module, modules: dict[str, nn.Module], config: LoraConfig
) -> tuple[list[str], LoraConfig]:
    names = config.target_modules if config.target_modules is not None else _usual(model, modules)
    role = ROLES.get(names) if isinstance(names, str) else None
    if role:
        heads = _heads(model)
        chosen = [path for path, module in modules.items() if module not in heads and role(path, modules)]
    elif isinstance(names, str):
        chosen = _matching_expression(modules, names)
    else:
        chosen = _matching_names(modules, names)
    excluded = _excluded(modules, config)
    chosen = _in_layers([path for path in chosen if path not in excluded], config)
    if not chosen:
        raise AdapterError(
            f"target_modules={names!r} leaves no layer of {type(model).__name__} to adapt; "
            f'its linear layers end with {listed(_last_parts(modules))}, or say "all-linear"'
        )
    # PEFT does not read an expression together with layer numbers, nor roles
    spell = role is not None or (isinstance(names, str) and config.layers_to_transform is not None)
    return chosen, replace(config, target_modules=_shortest(modules, chosen) if spell else names)


def _matching_parameters(
    modules: dict[str, nn.Module], config: LoraConfig, chosen: Iterable[str]
) -> list[tuple[str, str]]:
    """(path of the layer, name of the parameter) for each that `target_parameters` names."""
    known = {
        f"{path}.{name}": (path, name)
        for path, module in modules.items()
        for name, parameter in module.named_parameters(recurse=False)
        if 1 <= parameter.ndim <= 3
    }
    found, problems = set(), []
    for wanted in config.target_parameters or ():
        matches = [full for full in known if full == wanted or full.endswith(f".{wanted}")]
        if not matches:
            ends = (".".join(full.rsplit(".", 2)[-2:]) for full in known)
            problems.append(f"{wanted!r} matches no parameter of one to three dimensions{nearest(wanted, ends)}")
        found.update(matches)
    places = [place for full, place in known.items() if full in found]
    for path in dict.fromkeys(path for path, _ in places):
        layer = modules[path]
        if path in chosen or (isinstance(layer, AdaptedLayer) and not isinstance(layer, AdaptedParameters)):
            problems.append(f"{path} is adapted as a layer: target it in one way only")
        elif reason := AdaptedParameters.refusal(layer, config) or _not_free(layer):
            problems.append(f"{path} is a {type(layer).__name__} {reason}")
    if problems:
        raise AdapterError("target_parameters: " + "\n".join(problems))
    return places


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


def _matching_names(modules: dict[str, nn.Module], names: Iterable[str], what: str = "target_modules") -> list[str]:
    names = list(names)
    found = {name: [path for path in modules if path == name or path.endswith(f".{name}")] for name in names}
    if missing := [name for name in names if not found[name]]:
        known = [*_last_parts(modules), *modules]
        hints = "; ".join(f"{name!r} matches no module{nearest(name, known)}" for name in missing)
        raise AdapterError(f"{what}: {hints}; the linear layers end with {listed(_last_parts(modules))}")
    wanted = {path for paths in found.values() for path in paths}
    return [path for path in modules if path in wanted]


def _matching_expression(modules: dict[str, nn.Module], text: str, what: str = "target_modules") -> list[str]:
    """The paths that the expression matches whole; containers and layers without parameters are passed over."""
    try:
        expression = re.compile(text)
    except re.error as error:
        raise AdapterError(f"{what}={text!r} is not a regular expression: {error}") from None
    matches = [path for path in modules if expression.fullmatch(path)]
    if not matches:
        suffix = any(path.endswith(f".{text}") for path in modules)
        hint = f"; for every layer whose path ends with it, give a list: [{text!r}]" if suffix else ""
        hint = hint or nearest(text, [*ROLES, *_last_parts(modules)])
        raise AdapterError(f"{what}={text!r} is a regular expression for the whole path and matches none{hint}")
    return [path for path in matches if kind_of(modules[path]) or _is_bare_layer(modules[path])]


def _is_bare_layer(module: nn.Module) -> bool:
    return next(module.children(), None) is None and next(module.parameters(), None) is not None


def _excluded(modules: dict[str, nn.Module], config: LoraConfig) -> set[str]:
    names = config.exclude_modules
    if names is None:
        return set()
    if isinstance(names, str):
        return set(_matching_expression(modules, names, "exclude_modules"))
    return set(_matching_names(modules, names, "exclude_modules"))


def _in_layers(paths: list[str], config: LoraConfig) -> list[str]:
    """Those paths that stand in one of `layers_to_transform`, numbered under `layers_pattern` (or any list)."""
    wanted = config.layers_to_transform
    if wanted is None:
        return paths
    wanted = [wanted] if isinstance(wanted, int) else wanted
    patterns = config.layers_pattern or r"[^.]+"
    patterns = [patterns] if isinstance(patterns, str) else patterns
    # the first number in the path, as PEFT reads it
    expressions = [re.compile(rf"(?:.*?\.)?(?:{pattern})\.(?P<layer>\d+)(?:\.|$)") for pattern in patterns]
    number = {path: int(m["layer"]) for path in paths for e in expressions if (m := e.match(path))}
    if missing := sorted(set(wanted) - set(number.values())):
        there = sorted(set(number.values()))
        span = f"{there[0]} to {there[-1]}" if there else f"no numbered layers under {patterns}"
        raise AdapterError(f"layers_to_transform: no targeted layer is in {missing}; there are {span}")
    return [path for path in paths if number.get(path) in wanted]


def _refuse_unadaptable(modules: dict[str, nn.Module], chosen: list[str], config: LoraConfig) -> None:
    problems = []
    for path in chosen:
        layer = modules[path]
        kind = kind_of(layer)
        if kind is None:
            inner = [name for name, child in layer.named_modules() if kind_of(child)]
            hint = f"; it holds {listed(inner)}: name those" if inner else ""
            problems.append(f"{path} is a {type(layer).__name__}, which cannot be adapted{hint}")
        elif reason := kind.refusal(layer, config) or _not_free(layer):
            problems.append(f"{path} is a {type(layer).__name__} {reason}")
    if problems:
        more = f"\nand {len(problems) - 8} more" if len(problems) > 8 else ""
        raise AdapterError("target_modules: " + "\n".join(problems[:8]) + more)


def _not_free(layer: nn.Module) -> str | None:
    if "forward" in vars(layer):
        return "that has a forward put on the object by a hook: adapt the model before hooking it"
    if hasattr(layer, "adapters") and not isinstance(layer.adapters, Adapters):
        return "that already has something named 'adapters'"
    return None


def _shortest(modules: dict[str, nn.Module], chosen: list[str]) -> list[str]:
    """The last parts of the chosen paths, where they mean just these layers; else the whole paths."""
    ends = list(dict.fromkeys(path.rpartition(".")[2] for path in chosen))
    return ends if set(_matching_names(modules, ends)) == set(chosen) else chosen


def _with_patterns(places: Iterable[tuple[str, str]], config: LoraConfig) -> dict[tuple[str, str], LoraConfig]:
    """For each (path, part), the config with the `r` and `lora_alpha` that the first matching pattern gives it."""
    configs = {}
    used: set[str] = set()
    patterns: dict[str, dict[str, Any]] = {"r": config.rank_pattern, "lora_alpha": config.alpha_pattern}
    for path, part in places:
        own: dict[str, Any] = {}
        names = [f"{path}.{part}", path] if part else [path]
        for name, pattern in patterns.items():
            keys = [key for key in pattern if any(re.match(rf"(.*\.)?({key})$", each) for each in names)]
            used.update(keys)
            if keys:
                own[name] = pattern[keys[0]]
        configs[path, part] = replace(config, **own) if own else config
    if missing := [key for pattern in patterns.values() for key in pattern if key not in used]:
        ends = [path.rpartition(".")[2] for path, _ in configs]
        hints = "; ".join(f"{key!r} matches no adapted layer{nearest(key, ends)}" for key in dict.fromkeys(missing))
        raise AdapterError(f"rank_pattern, alpha_pattern: {hints}")
    return configs
