"""What an adapter trains beside its method: whole modules, rows of tables, biases."""

from collections import defaultdict
from collections.abc import Container, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from veneer.core.config import LoraConfig
from veneer.core.kinds.dense import AdaptedModule
from veneer.core.kinds.embedding import AdaptedEmbedding
from veneer.core.kinds.layer import AdaptedLayer
from veneer.core.kinds.linear import AdaptedConv1D, AdaptedLinear
from veneer.core.reclass import mixin_of
from veneer.core.search import Search

if TYPE_CHECKING:
    from veneer.core.targets import Target

# the heads of transformers' models for a task: they start at random, so PEFT trains them without being asked
TASK_HEADS = {"SEQ_CLS": ["classifier", "score"], "TOKEN_CLS": ["classifier", "score"], "QUESTION_ANS": ["qa_outputs"]}


def saved_modules(search: Search, config: LoraConfig, fresh: bool) -> tuple[list[str], list[str]]:
    """The paths that `modules_to_save` means: as in PEFT, all that end with a name, also in the middle of a word
    (DistilBERT's `pre_classifier` for `classifier`), and for a fresh adapter the heads of its task; and the names
    without the heads that the model has not.
    """
    heads = TASK_HEADS.get(config.task_type or "", [])
    names = [*(config.modules_to_save or []), *(heads if fresh else [])]
    there = [name for name in names if name not in heads or any(path.endswith(name) for path in search.modules)]
    meant = search.named(there, "modules_to_save", search.modules, in_a_word=True)
    return [path for path in meant if not inside(path, meant)], list(dict.fromkeys(there))


def token_tables(model: nn.Module, search: Search, config: LoraConfig) -> dict[str, list[int]]:
    """The tables that `trainable_token_indices` means, with the rows of each; names as in `modules_to_save`."""
    wanted = config.trainable_token_indices or {}
    if isinstance(wanted, list):
        table = getattr(model, "get_input_embeddings", lambda: None)()
        wanted = {next((path for path, module in search.modules.items() if module is table), "embed_tokens"): wanted}
    found = search.named(wanted, "trainable_token_indices", search.modules, in_a_word=True)
    return {path: wanted[name] for path, name in found.items()}


def other_biases(search: Search, config: LoraConfig, targets: Mapping[str, "Target"]) -> list[str]:
    """The layers that `bias="all"` adds to those adapted; a layer that cannot train its bias is a fault."""
    if config.bias == "none":
        return []
    own = {path: module for path, module in search.modules.items() if module._parameters.get("bias") is not None}
    whole = {path for path, target in targets.items() if target.kind is AdaptedModule}
    rest = [path for path in own if config.bias == "all" and path not in targets and not inside(path, whole)]
    stuck = [path for path in rest if isinstance(own[path], NonDynamicallyQuantizableLinear)]  # read, not called
    for path, target in targets.items():
        trains = target.kind.biased or target.kind.norm or target.kind is AdaptedModule
        if not trains and any(name.rpartition(".")[2] == "bias" for name, _ in target.layer.named_parameters()):
            stuck.append(path)
    for path in stuck:
        search.refuse("bias", path, "whose bias is not trained beside")
    return rest


def inside(path: str, others: Container[str]) -> bool:
    """Whether a path stands below one of the others."""
    while path := path.rpartition(".")[0]:
        if path in others:
            return True
    return False


def refuse_clashes(search: Search, targets: Mapping[str, "Target"]) -> None:
    """What would be changed in two ways, by this adapter or by it and those on the model, is a fault."""
    carried = {path: mixin_of(own) for path, own in search.modules.items() if isinstance(own, AdaptedLayer)}
    kinds: dict[str, object] = {**carried, **{path: target.kind for path, target in targets.items()}}
    whole = {path for path, kind in kinds.items() if kind is AdaptedModule}
    for path, kind in kinds.items():
        if carried.get(path, kind) is not kind or (whole and inside(path, whole)):
            search.refuse("layers", path, "that is adapted otherwise, or stands in a module that is: choose one way")


def tied_parameters(modules: Mapping[str, nn.Module]) -> list[list[str]]:
    """The paths of each parameter that several modules hold, in the model's order."""
    owners: dict[int, list[str]] = defaultdict(list)
    for path, module in modules.items():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners[id(parameter)].append(f"{path}.{name}")
    return [paths for paths in owners.values() if len(paths) > 1]


def tie(search: Search, targets: dict[str, "Target"], everything: bool) -> list[str]:
    """Let the layers that share a changed weight follow it: those of a table's rows, or with `everything` all.

    Returns, a sentence each, what is changed in one layer alone; what cannot be followed is a fault.
    """
    alone = []
    for paths in tied_parameters(search.modules):
        told = " and ".join(paths)
        changed = [path for path in paths if _is_changed(path, targets)]
        layers = [path.rpartition(".")[0] for path in paths]
        named = [layer for layer in layers if layer in targets]
        rows = [targets[layer].rows for layer in named]
        if not (everything or any(rows)):
            if 0 < len(changed) < len(paths):
                alone.append(f"{told} are one weight, and only {' and '.join(changed)} is changed")
        elif changed:
            # a table, where one is among them
            source = min(named, key=lambda layer: not issubclass(targets[layer].kind, AdaptedEmbedding), default="")
            same = all(own == rows[0] for own in rows)
            follow = {layer: _following(search, targets, source, layer) for layer in layers} if source and same else {}
            if not all(follow.values()) or not follow:
                search.fault(
                    "ensure_weight_tying" if everything else "trainable_token_indices",
                    f"{told} are one weight: what changes both is LoRA without DoRA, the same trainable_token_indices, "
                    "or modules_to_save that names just these layers",
                )
            targets |= {layer: target for layer, target in follow.items() if target and layer != source}
    return alone


def _is_changed(path: str, targets: Mapping[str, "Target"]) -> bool:
    holders = (holder for holder in targets if path.startswith(f"{holder}."))
    return any(path.removeprefix(f"{holder}.") in targets[holder].parameters() for holder in holders)


def _following(search: Search, targets: Mapping[str, "Target"], source: str, path: str) -> "Target | None":
    """The layer with the change of another one that has the same weight, where it can have it."""
    target, layer = targets[source], search.modules[path]
    if target.kind is AdaptedModule:
        kind, fits = AdaptedModule, "weight" in layer._parameters
    else:
        kind = search.kind(path)
        simple = target.own is not None or (target.config.peft_type == "LORA" and not target.config.use_dora)
        fits = simple and issubclass(kind or object, AdaptedEmbedding | AdaptedLinear) and kind is not AdaptedConv1D
    follower = replace(target, layer=layer, kind=kind, tied_to=source)
    return follower if fits and not follower.refusal() else None
