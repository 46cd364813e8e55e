"""Weights that several layers share, and the layers that follow when one of them changes."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from veneer.core.kinds.embedding import AdaptedEmbedding
from veneer.core.kinds.layer import AdaptedLayer
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
        named = {layer: targets[layer] for layer in layers if layer in targets}
        if not (everything or any(target.rows for target in named.values())):
            if 0 < len(changed) < len(paths):
                alone.append(f"{told} are one weight, and only {' and '.join(changed)} is changed")
        elif changed:
            tables = [layer for layer, target in named.items() if issubclass(target.kind, AdaptedEmbedding)]
            source = next(iter([*tables, *named]), None)
            same = source is not None and all(target.rows == named[source].rows for target in named.values())
            kinds = {layer: _following(named[source], search, layer) if source and same else None for layer in layers}
            if None in kinds.values():
                search.faults.append(
                    f"{told} are one weight: what changes both is LoRA without DoRA, the same trainable_token_indices, "
                    "or modules_to_save that names just these layers"
                )
            for layer, kind in kinds.items():
                if layer != source and kind:
                    targets[layer] = replace(named[source], layer=search.modules[layer], kind=kind, tied_to=source)
    return alone


def _is_changed(path: str, targets: Mapping[str, "Target"]) -> bool:
    holders = (holder for holder in targets if path.startswith(f"{holder}."))
    return any(path.removeprefix(f"{holder}.") in targets[holder].parameters() for holder in holders)


def _following(source: "Target", search: Search, path: str) -> type[AdaptedLayer] | None:
    """The kind as which a layer may have the change of another one with the same weight."""
    layer, kind = search.modules[path], search.kinds[path]
    if source.kind is AdaptedModule:
        return AdaptedModule if "weight" in layer._parameters else None
    if source.own is None and (source.config.peft_type != "LORA" or source.config.use_dora):
        return None
    if kind is AdaptedConv1D or not issubclass(kind or object, AdaptedEmbedding | AdaptedLinear):
        return None
    return None if replace(source, layer=layer, kind=kind).refusal() else kind
