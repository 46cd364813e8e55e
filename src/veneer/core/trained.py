"""What an adapter trains beside its method: whole modules, rows of tables, biases."""

from collections.abc import Container, Iterable, Mapping
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
    asked = config.task_type or ""
    found = _ending_with(config.modules_to_save or [], modules)
    names = [name for name in found if found[name] or name not in _HEADS.get(asked, [])]
    _tell_missing("modules_to_save", [name for name in names if not found[name]], modules, faults)
    meant = {path for paths in found.values() for path in paths}
    paths = [path for path in modules if path in meant and not inside(path, meant)]
    return paths, replace(config, modules_to_save=names or None)


def _ending_with(names: Iterable[str], paths: Iterable[str]) -> dict[str, list[str]]:
    """For each name, once, the paths that end with it."""
    found: dict[str, list[str]] = {name: [] for name in names}
    for path in paths if found else ():
        for i in range(len(path)):
            if path[i:] in found:
                found[path[i:]].append(path)
    return found


def _tell_missing(what: str, missing: list[str], choices: Iterable[str], faults: list[str]) -> None:
    if missing:
        ends = list(dict.fromkeys(end for path in choices for end in (path.rpartition(".")[2], path)))
        hints = [f"{shown(name)} matches no module{nearest(name, ends)}" for name in missing[:8]]
        hints += [f"nor do {len(missing) - 8} more"] if len(missing) > 8 else []
        faults.append(f"{what}: {'; '.join(hints)}")


def token_tables(
    model: nn.Module, modules: Mapping[str, nn.Module], config: LoraConfig, faults: list[str]
) -> dict[str, list[int]]:
    """The tables that `trainable_token_indices` means, with the rows of each; names as in `modules_to_save`."""
    wanted = config.trainable_token_indices
    if isinstance(wanted, list):
        table = getattr(model, "get_input_embeddings", lambda: None)()
        wanted = {next((path for path, module in modules.items() if module is table), "embed_tokens"): wanted}
    wanted = wanted or {}
    found = _ending_with(wanted, modules)
    tables = [path for path, module in modules.items() if isinstance(module, nn.Embedding)]
    _tell_missing("trainable_token_indices", [name for name in found if not found[name]], tables, faults)
    ids = {path: wanted[name] for name, paths in found.items() for path in paths}
    problems = []
    for path, own in ids.items():
        table = modules[path]
        fits = isinstance(table, nn.Embedding) and issubclass(kind_of(table) or object, AdaptedEmbedding)
        reason = AdaptedEmbedding.refusal(table, LoraConfig()) if fits else "which is no table that can be adapted"
        if reason is None and (beyond := [token for token in own if token >= len(table.weight)]):  # type: ignore[arg-type]
            reason = f"with {len(table.weight)} rows, and no {listed(beyond)}"  # type: ignore[arg-type]
        if reason:
            problems.append(f"{path} is a {type(table).__name__} {reason}")
    faults += [f"trainable_token_indices: {problem}" for problem in problems[:8]]
    return ids


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
