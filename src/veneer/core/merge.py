"""Changes into the weights and out again: exact, and the whole model or nothing."""

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.errors import AdapterError, collapsed, listed
from veneer.core.inject import adapted_layers
from veneer.core.kinds.layer import AdaptedLayer, is_plain
from veneer.core.plan import Plan, Term
from veneer.core.trained import tied_parameters


@torch.no_grad()
def merge(model: nn.Module, plan: Plan, terms: tuple[Term, ...], untie: bool = False) -> None:
    """W ← W + Σ weight · ΔW, and so for b, in every adapted layer: from the original, summed in fp32, rounded once.

    The original is kept for `unmerge`. With `untie`, a layer that shares its weight with one that the change is not
    meant for gets a weight of its own. Raises `AdapterError`, with nothing changed, when a weight is so shared without
    that, is computed from others (`weight_norm`), is quantised or spread over processes, or would not be
    finite; or when a bias is changed that is not there.
    """
    layers = {path: layer for path, layer in adapted_layers(model) if any(layer.adapters.acting(terms))}
    changing = {f"{path}.{name}": (layer, name) for path, layer in layers.items() for name in layer.changing(terms)}
    _refuse(changing)
    changed, broken = dict[str, Tensor](), []
    for path, layer in layers.items():
        for name, value in layer.changed(terms).items():
            own = changed[f"{path}.{name}"] = value.clone() if isinstance(value, nn.Parameter) else value.contiguous()
            if not all(torch.isfinite(end) for end in own.aminmax()):
                broken.append(f"{path}.{name}")
    if broken:
        raise AdapterError(f"merging {listed(t.adapter for t in terms)} gives NaN or infinity in {collapsed(broken)}")
    apart = _apart(model, changed)
    if apart and not untie:
        raise AdapterError(
            f"cannot merge into a weight that other layers share: {'; '.join(map(' and '.join, apart))}; "
            "merge_and_unload(untie=True) gives the changed layer a weight of its own"
        )
    for path, (layer, name) in changing.items():
        old = layer.get_parameter(name)
        layer.adapters.original = {**(layer.adapters.original or {}), name: old.data}
        if any(path in paths for paths in apart):
            owner, _, last = name.rpartition(".")
            layer.get_submodule(owner)._parameters[last] = nn.Parameter(old.detach(), requires_grad=old.requires_grad)
    for path, (layer, name) in changing.items():
        layer.get_parameter(name).data = changed[path]
    config: Any = getattr(model, "config", None)
    if apart and hasattr(config, "tie_word_embeddings"):
        config.tie_word_embeddings = False  # or transformers would tie them again
    plan.merged, plan.resting = terms, plan.terms
    plan.act(())


def unmerge(model: nn.Module, plan: Plan) -> None:
    """The original weights, bit for bit, where something is merged; what acted before the merge acts again."""
    if not plan.merged:
        return
    for _, layer in adapted_layers(model):
        for name, value in (layer.adapters.original or {}).items():
            layer.get_parameter(name).data = value
        layer.adapters.original = None
    plan.act(plan.resting)
    plan.merged, plan.resting = (), ()


def _refuse(changing: Mapping[str, tuple[AdaptedLayer, str]]) -> None:
    """Raise `AdapterError` for what is not there, no parameter, or not to be read."""
    values = {path: attrgetter(name)(layer) for path, (layer, name) in changing.items()}
    if absent := [path for path, value in values.items() if value is None]:
        raise AdapterError(f"cannot merge a bias into layers that have none: {listed(absent)}; let it act live")
    own = {layer: dict(layer.named_parameters(remove_duplicate=False)) for layer, _ in changing.values()}
    if computed := [path for path, (layer, name) in changing.items() if name not in own[layer]]:
        raise AdapterError(f"cannot merge into a weight that is computed from other parameters: {listed(computed)}")
    if unreadable := [path for path, value in values.items() if not is_plain(value)]:
        raise AdapterError(
            f"cannot merge into weights that are quantised or spread over processes: {listed(unreadable)}; "
            "save the adapter, and merge it into the base model as it was before"
        )


def _apart(model: nn.Module, changed: Mapping[str, Tensor]) -> list[list[str]]:
    """The paths of each weight that several layers share and that would not be the same in all of them."""
    apart = []
    for paths in tied_parameters(dict(model.named_modules())):
        values = [changed[path] for path in paths if path in changed]
        if values and (len(values) < len(paths) or not all(torch.equal(values[0], other) for other in values)):
            apart.append(paths)
    return apart
