"""Adapters onto layers and off again: all of them, or none."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.adapter import Adapter, collapsed
from veneer.core.config import LoraConfig
from veneer.core.errors import AdapterError
from veneer.core.kinds.embedding import AdaptedEmbedding
from veneer.core.kinds.layer import AdaptedLayer, Adapters
from veneer.core.methods import method
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
    build = method(config.peft_type)
    updates = {}
    for path, target in targets.items():
        updates[path] = target.kind.build(build, target.layer, target.configs)
    if values is not None:
        _fill(model, {path: (targets[path], update) for path, update in updates.items()}, values)
    for path, update in updates.items():
        _attach(targets[path], plan, name, update)
    return resolved


def extract(model: nn.Module, name: str, config: LoraConfig) -> Adapter:
    """The adapter called `name` as plain data; its tensors are the live ones, not copies."""
    tensors: dict[str, dict[str, Tensor]] = defaultdict(dict)
    embeddings = set()
    for path, layer in adapted_layers(model):
        if name in layer.adapters:
            kind: Any = mixin_of(layer)
            for place, key, ending, parameter in _entries(kind, layer.adapters[name]):
                tensors[path + place][key] = kind.filed(layer, ending, parameter).detach()
            if issubclass(kind, AdaptedEmbedding):
                embeddings.add(path)
    return Adapter(config, dict(tensors), frozenset(embeddings))


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


def _entries(kind: type[AdaptedLayer], update: Any) -> Iterator[tuple[str, str, str, Tensor]]:
    """What a file says of the update: (what follows the layer's path, name, name in a PEFT file, parameter)."""
    for part, place in kind.places(update).items():
        own = update.parts()[part]
        for name, parameter in own.named_parameters():
            yield place, name, own.file_names[name], parameter


@torch.no_grad()
def _fill(model: nn.Module, updates: dict[str, tuple[Target, Update]], values: Adapter) -> None:
    """Copy the file's tensors in, or say everything that does not fit and change nothing."""
    parameters, wanted = {}, {}
    for path, (target, update) in updates.items():
        for place, key, ending, parameter in _entries(target.kind, update):
            parameters[path + place, key] = (target.kind, ending, parameter)
            wanted[path + place, key] = target.kind.filed(target.layer, ending, parameter)
    found = {(path, key): t for path, own in values.tensors.items() for key, t in own.items()}
    missing = [".".join(key) for key in wanted if key not in found]
    strangers = [".".join(key) for key in found if key not in wanted]
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
    for entry, (kind, ending, parameter) in parameters.items():
        parameter.copy_(kind.unfiled(ending, found[entry], parameter.shape))
