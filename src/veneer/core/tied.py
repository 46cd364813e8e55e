"""Weights that several layers share, and the layers that follow when one of them changes."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from veneer.core.kinds.embedding import AdaptedEmbedding
from veneer.core.kinds.linear import AdaptedConv1D, AdaptedLinear
from veneer.core.kinds.module import AdaptedModule
from veneer.core.search import Search

if TYPE_CHECKING:
    from veneer.core.targets import Target


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
    layer, kind, target = search.modules[path], search.kind(path), targets[source]
    if target.kind is AdaptedModule:
        follower = replace(target, layer=layer, tied_to=source)
        return follower if "weight" in layer._parameters and not follower.refusal() else None
    if target.own is None and (target.config.peft_type != "LORA" or target.config.use_dora):
        return None
    fits = issubclass(kind or object, AdaptedEmbedding | AdaptedLinear) and kind is not AdaptedConv1D
    follower = replace(target, layer=layer, kind=kind, tied_to=source)
    return follower if fits and not follower.refusal() else None
