"""What an adapter trains beside its method: whole modules, rows of tables, biases."""

from collections.abc import Container, Mapping
from dataclasses import replace

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from veneer.core.config import LoraConfig
from veneer.core.errors import listed, nearest, shown
from veneer.core.kinds import kind_of
from veneer.core.kinds.embedding import AdaptedEmbedding
from veneer.core.kinds.layer import AdaptedLayer
from veneer.core.kinds.module import AdaptedModule
from veneer.core.reclass import mixin_of

# the heads of transformers' models for a task: they start at random, so PEFT trains them without being asked
_HEADS = {"SEQ_CLS": ["classifier", "score"], "TOKEN_CLS": ["classifier", "score"], "QUESTION_ANS": ["qa_outputs"]}


def with_heads(config: LoraConfig) -> LoraConfig:
    """The config with the heads of its task among `modules_to_save`, as PEFT has it."""
    named = [*(config.modules_to_save or []), *_HEADS.get(config.task_type or "", [])]
    return replace(config, modules_to_save=named or None)


def saved_modules(
    modules: Mapping[str, nn.Module], config: LoraConfig, faults: list[str]
) -> tuple[list[str], LoraConfig]:
    """The paths that `modules_to_save` means: as in PEFT, all that end with a name, also in the middle of a word
    (DistilBERT's `pre_classifier` for `classifier`); and the config without the heads that the model has not.
    """
    names = list(dict.fromkeys(config.modules_to_save or []))
    found = {name: [path for path in modules if path.endswith(name)] for name in names}
    names = [name for name in names if found[name] or name not in _HEADS.get(config.task_type or "", [])]
    if missing := [name for name in names if not found[name]]:
        choices = list(dict.fromkeys(path.rpartition(".")[2] for path in modules))
        hints = [f"{shown(name)} matches no module{nearest(name, [*choices, *modules])}" for name in missing[:8]]
        hints += [f"nor do {len(missing) - 8} more"] if len(missing) > 8 else []
        faults.append(f"modules_to_save: {'; '.join(hints)}")
    meant = {path for paths in found.values() for path in paths}
    paths = [path for path in modules if path in meant and not inside(path, meant)]
    return paths, replace(config, modules_to_save=names or None)


def token_tables(
    model: nn.Module, modules: Mapping[str, nn.Module], config: LoraConfig, faults: list[str]
) -> dict[str, list[int]]:
    """The tables that `trainable_token_indices` means, with the rows of each; names as in `modules_to_save`."""
    wanted = config.trainable_token_indices
    if isinstance(wanted, list):
        table = getattr(model, "get_input_embeddings", lambda: None)()
        known = [path for path, module in modules.items() if module is table or path.endswith("embed_tokens")]
        wanted = {known[0] if known else "embed_tokens": wanted}
    found: dict[str, list[int]] = {}
    problems = []
    for name, ids in (wanted or {}).items():
        paths = [path for path in modules if path.endswith(name)]
        if not paths:
            tables = [path for path, module in modules.items() if isinstance(module, nn.Embedding)]
            problems.append(f"{shown(name)} matches no module; the tables are {listed(tables)}{nearest(name, tables)}")
        for path in paths:
            table = modules[path]
            if not isinstance(table, nn.Embedding) or not issubclass(kind_of(table) or object, AdaptedEmbedding):
                problems.append(f"{path} is a {type(table).__name__}, which is no table that can be adapted")
            elif beyond := [token for token in ids if token >= len(table.weight)]:
                problems.append(f"{path} has {len(table.weight)} rows, and no {listed(beyond)}")
            found[path] = ids
    if problems:
        faults.append("trainable_token_indices: " + "\n".join(problems[:8]))
    return found


def other_biases(
    modules: Mapping[str, nn.Module], config: LoraConfig, kinds: Mapping[str, type[AdaptedLayer]]
) -> tuple[list[str], list[str]]:
    """The layers that `bias="all"` adds to those adapted as `kinds`; and which of them all cannot train theirs."""
    if config.bias == "none":
        return [], []
    own = {path: module for path, module in modules.items() if isinstance(module._parameters.get("bias"), nn.Parameter)}
    whole = {path for path, kind in kinds.items() if kind is AdaptedModule}
    rest = [path for path in own if config.bias == "all" and path not in kinds and not inside(path, whole)]
    stuck = [path for path in rest if isinstance(own[path], NonDynamicallyQuantizableLinear)]  # read, not called
    for path, kind in kinds.items():
        names = [name for name, _ in modules[path].named_parameters()]
        if not (kind.biased or kind.norm or kind is AdaptedModule) and any(f".{n}".endswith(".bias") for n in names):
            stuck.append(path)
    return rest, [f"{path} is a {type(modules[path]).__name__} whose bias is not trained beside" for path in stuck]


def inside(path: str, others: Container[str]) -> bool:
    """Whether a path stands below one of the others."""
    while path := path.rpartition(".")[0]:
        if path in others:
            return True
    return False


def clashes(modules: Mapping[str, nn.Module], targets: Mapping[str, type[AdaptedLayer]]) -> list[str]:
    """What would be changed in two ways, by this adapter or by it and those on the model."""
    carried = {path: mixin_of(module) for path, module in modules.items() if isinstance(module, AdaptedLayer)}
    kinds: dict[str, object] = {**carried, **targets}
    whole = {path for path, kind in kinds.items() if kind is AdaptedModule}
    twice = [path for path, kind in targets.items() if carried.get(path, kind) is not kind]
    twice += [path for path in kinds if whole and path not in twice and inside(path, whole)]
    return [f"{path} is adapted otherwise, or stands in a module that is: target it in one way only" for path in twice]
