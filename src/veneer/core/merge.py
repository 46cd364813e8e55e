"""Changes into the weights and out again: exact, and the whole model or nothing."""

from collections import defaultdict

import torch
from torch import nn

from veneer.core.errors import AdapterError, listed
from veneer.core.inject import adapted_layers
from veneer.core.kinds.layer import AdaptedLayer, is_plain
from veneer.core.plan import Plan, Term


@torch.no_grad()
def merge(model: nn.Module, plan: Plan, terms: tuple[Term, ...]) -> None:
    """W ← W + Σ weight · ΔW in every adapted layer, from the original weight, summed in fp32, rounded once.

    The original is kept for `unmerge`. Raises `AdapterError`, with nothing changed, when a weight is shared with
    a layer that the change is not meant for, is computed from others (`weight_norm`), is quantised or spread over
    processes, or would not be finite.
    """
    layers = [(path, layer) for path, layer in adapted_layers(model) if any(layer.adapters.acting(terms))]
    changing = {f"{path}.{name}": (layer, name) for path, layer in layers for name in layer.changing(terms)}
    _refuse_computed(changing)
    _refuse_unreadable(changing)
    _refuse_tied(model, changing)
    done: list[AdaptedLayer] = []
    try:
        for path, layer in layers:
            changed = layer.changed(terms)
            if not all(torch.isfinite(end) for value in changed.values() for end in value.aminmax()):
                raise AdapterError(f"merging {listed(t.adapter for t in terms)} gives NaN or infinity in {path}")
            layer.adapters.original = {name: layer.get_parameter(name).data for name in changed}
            done.append(layer)
            for name, value in changed.items():
                layer.get_parameter(name).data = value.contiguous()
    except BaseException:
        for layer in done:
            _put_back(layer)
        raise
    plan.merged, plan.resting = terms, plan.terms
    plan.act(())


def unmerge(model: nn.Module, plan: Plan) -> None:
    """The original weights, bit for bit; what acted before the merge acts again."""
    for _, layer in adapted_layers(model):
        if layer.adapters.original is not None:
            _put_back(layer)
    plan.act(plan.resting)
    plan.merged, plan.resting = (), ()


def _put_back(layer: AdaptedLayer) -> None:
    assert layer.adapters.original is not None
    for name, value in layer.adapters.original.items():
        layer.get_parameter(name).data = value
    layer.adapters.original = None


def _refuse_computed(changing: dict[str, tuple[AdaptedLayer, str]]) -> None:
    computed = [path for path, (layer, name) in changing.items() if not _is_parameter(layer, name)]
    if computed:
        raise AdapterError(f"cannot merge into a weight that is computed from other parameters: {listed(computed)}")


def _is_parameter(layer: AdaptedLayer, name: str) -> bool:
    path, _, last = name.rpartition(".")
    return last in layer.get_submodule(path)._parameters


def _refuse_unreadable(changing: dict[str, tuple[AdaptedLayer, str]]) -> None:
    if told := [path for path, (layer, name) in changing.items() if not is_plain(layer.get_parameter(name))]:
        raise AdapterError(
            f"cannot merge into weights that are quantised or spread over processes: {listed(told)}; "
            "save the adapter, and merge it into the base model as it was before"
        )


def _refuse_tied(model: nn.Module, changing: dict[str, tuple[AdaptedLayer, str]]) -> None:
    owners: dict[int, list[str]] = defaultdict(list)
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            owners[id(parameter)].append(f"{path}.{name}")
    sharing = [owners[id(layer.get_parameter(name))] for layer, name in changing.values()]
    if tied := [paths for paths in sharing if len(paths) > 1]:
        shared = "; ".join(" and ".join(paths) for paths in tied)
        raise AdapterError(f"cannot merge into a weight that other layers share: {shared}; untie it first")
