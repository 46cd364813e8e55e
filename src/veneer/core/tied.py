"""Weights that several layers share, and the layers that follow when one of them changes."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from veneer.core.config import LoraConfig
from veneer.core.kinds import kind_of
from veneer.core.kinds.embedding import AdaptedEmbedding
from veneer.core.kinds.layer import AdaptedLayer
from veneer.core.kinds.linear import AdaptedConv1D, AdaptedLinear
from veneer.core.kinds.module import AdaptedModule

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


def tie(
    modules: Mapping[str, nn.Module], targets: dict[str, "Target"], everything: bool
) -> tuple[list[str], list[str]]:
    """Let the layers that share a changed weight follow it: those of a table's rows, or with `everything` all.

    Returns, a sentence each, what is changed in one layer alone, and what cannot be followed.
    """
    alone, faults = [], []
    for paths in tied_parameters(modules):
        told = " and ".join(paths)
        changed = [path for path in paths if _is_changed(path, targets)]
        layers = [path.rpartition(".")[0] for path in paths]
        named = {layer: targets[layer] for layer in layers if layer in targets}
        rows = [target.rows for target in named.values() if target.rows]
        if not changed or not (rows or everything):
            if changed and len(changed) < len(paths):
                alone.append(f"{told} are one weight, and only {' and '.join(changed)} is changed")
            continue
        tables = [layer for layer, target in named.items() if issubclass(target.kind, AdaptedEmbedding)]
        source = next(iter([*tables, *named]), None)
        kinds = {layer: _following(targets[source], modules[layer]) if source else None for layer in layers}
        if None in kinds.values() or any(target.rows != named[source or ""].rows for target in named.values()):
            faults.append(
                f"{told} are one weight: what changes both is LoRA without DoRA, the same trainable_token_indices, or "
                "modules_to_save that names just these layers"
            )
            continue
        for layer, kind in kinds.items():
            if layer != source and source and kind:
                targets[layer] = replace(targets[source], layer=modules[layer], kind=kind, tied_to=source)
    return alone, faults


def _is_changed(path: str, targets: Mapping[str, "Target"]) -> bool:
    holders = (holder for holder in targets if path.startswith(f"{holder}."))
    return any(path.removeprefix(f"{holder}.") in targets[holder].parameters() for holder in holders)


def _following(source: "Target", layer: nn.Module) -> type[AdaptedLayer] | None:
    """The kind as which a layer may have the change of another one with the same weight."""
    if source.kind is AdaptedModule:
        return AdaptedModule if "weight" in layer._parameters else None
    if source.own is None and (source.config.peft_type != "LORA" or source.config.use_dora):
        return None
    kind = kind_of(layer)
    fits = kind is not None and issubclass(kind, AdaptedEmbedding | AdaptedLinear) and kind is not AdaptedConv1D
    config = LoraConfig() if source.own else source.config
    return kind if kind and fits and not kind.refusal(layer, config) else None
