"""Adapters onto layers and off again: all of them, or none."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.core.adapter import Adapter, collapsed
from veneer.core.config import LoraConfig
from veneer.core.errors import AdapterError
from veneer.core.kinds.embedding import AdaptedEmbedding
from veneer.core.kinds.layer import AdaptedLayer, Adapters
from veneer.core.methods import maker, method
from veneer.core.plan import Plan
from veneer.core.reclass import mixin_of, reclass, restore
from veneer.core.targets import Target, select
from veneer.core.update import Update


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLayer]]:
    """The layers that carry adapters, with their paths."""
    for path, module in model.named_modules():
        if isinstance(module, AdaptedLayer):
            yield path, module


def inject(model: nn.Module, plan: Plan, name: str, config: LoraConfig, values: Adapter | None = None) -> LoraConfig:
    """Give the layers that `config` means an update called `name`, with the tensors of `values` or fresh ones.

    Returns the config with its targets spelled out. Raises `AdapterError` before anything is changed.
    """
    _refuse_name(name)
    targets, resolved = select(model, config)
    weights = ((matrix, target.config) for target in targets.values() for matrix in target.matrices().values())
    make = maker(resolved, weights)
    updates = {path: target.kind.build(make, target.layer, target.configs) for path, target in targets.items()}
    if values is not None:
        _fill(model, {path: (targets[path].kind, targets[path].layer, own) for path, own in updates.items()}, values)
    for path, update in updates.items():
        _attach(targets[path], plan, name, update)
    return resolved


def extract(model: nn.Module, name: str, config: LoraConfig) -> Adapter:
    """The adapter called `name` as plain data: live tensors, not copies, where it is saved as it is."""
    layers = {
        path: (_kind(layer), layer, layer.adapters[name])
        for path, layer in adapted_layers(model)
        if name in layer.adapters
    }
    tensors: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for (path, key), entry in _entries(layers).items():
        tensors[path][key] = entry.filed
    embeddings = frozenset(path for path, (kind, _, _) in layers.items() if issubclass(kind, AdaptedEmbedding))
    return Adapter(method(config.peft_type).saved_config(config), dict(tensors), embeddings)


def detach(layer: AdaptedLayer, name: str | None = None) -> None:
    """Take the update called `name` off the layer, or all; a layer with none left gets its own class back."""
    if name is not None and name in layer.adapters:
        del layer.adapters[name]
    if name is None or not layer.adapters:
        del layer.adapters
        restore(layer)


def _attach(target: Target, plan: Plan, name: str, update: Update) -> None:
    layer = target.layer
    if not isinstance(layer, AdaptedLayer):
        layer.adapters = Adapters(plan)
        reclass(layer, target.kind)
    assert isinstance(layer, AdaptedLayer)
    update.train(layer.training)
    layer.adapters[name] = update


def _refuse_name(name: str) -> None:
    if not isinstance(name, str) or not name or "." in name or hasattr(Adapters(Plan()), name):
        raise AdapterError(
            f"{name!r} cannot be an adapter's name: expected a word without dots that is no attribute of a module"
        )


class _Entry(NamedTuple):
    """One tensor of an update, and how a file has it."""

    tensor: Tensor
    filed: Tensor
    ending: str
    kind: type[AdaptedLayer]


def _entries(layers: Mapping[str, tuple[type[AdaptedLayer], nn.Module, Any]]) -> dict[tuple[str, str], _Entry]:
    """(path, name) → what a file says there; what all layers share stands under the path of the model itself."""
    entries = {}
    for path, (kind, layer, update) in layers.items():
        for part, place in kind.places(update).items():
            own = update.parts()[part]
            for name, tensor in own.shared_tensors().items():
                entries["", name] = _Entry(tensor, tensor, own.file_names[name], kind)
            for name, tensor in own.tensors().items():
                filed = kind.filed(layer, own.file_names[name], tensor)
                entries[path + place, name] = _Entry(tensor, filed, own.file_names[name], kind)
    return entries


def _kind(layer: AdaptedLayer) -> Any:
    return mixin_of(layer)


@torch.no_grad()
def _fill(
    model: nn.Module, layers: Mapping[str, tuple[type[AdaptedLayer], nn.Module, Update]], values: Adapter
) -> None:
    """Copy the file's tensors in, or say everything that does not fit and change nothing."""
    entries = _entries(layers)
    wanted = {place: entry.filed for place, entry in entries.items()}
    found = {(path, key): t for path, own in values.tensors.items() for key, t in own.items()}
    missing = [".".join(filter(None, key)) for key in wanted if key not in found]
    strangers = [".".join(filter(None, key)) for key in found if key not in wanted]
    misshaped = [
        f"{'.'.join(key)} expected {tuple(wanted[key].shape)} found {tuple(found[key].shape)}"
        for key in wanted
        if key in found and wanted[key].shape != found[key].shape
    ]
    said = (("missing", missing), ("unexpected", strangers), ("of another shape", misshaped))
    if problems := [f"{what}: {collapsed(names)}" for what, names in said if names]:
        made_for = values.config.base_model_name_or_path
        origin = f" (it was made for {made_for})" if made_for else ""
        raise AdapterError(f"the adapter does not fit this {type(model).__name__}{origin}:\n" + "\n".join(problems))
    for place, (tensor, _, ending, kind) in entries.items():
        tensor.copy_(kind.unfiled(ending, found[place], tensor.shape))
