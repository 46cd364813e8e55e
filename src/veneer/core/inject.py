"""Adapters onto layers and off again: all of them, or none."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from veneer.core.adapter import Adapter, collapsed
from veneer.core.config import LoraConfig
from veneer.core.errors import AdapterError
from veneer.core.kinds import kind_of
from veneer.core.kinds.layer import AdaptedLayer, Adapters
from veneer.core.methods import method, updates_for
from veneer.core.plan import Plan
from veneer.core.reclass import reclass, restore
from veneer.core.targets import select
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
    layers = {}
    for path, target in targets.items():
        kind, weight = kind_of(target.layer), target.layer.weight
        assert kind is not None
        assert isinstance(weight, Tensor)
        layers[path] = (kind.matrix(weight), target.config)
    updates = updates_for(layers, resolved)
    if values is not None:
        _fill(model, updates, values)
    for path, update in updates.items():
        _attach(targets[path].layer, plan, name, update)
    return resolved


def extract(model: nn.Module, name: str, config: LoraConfig) -> Adapter:
    """The adapter called `name` as plain data: live tensors, not copies, where it is saved as it is."""
    updates = {path: layer.adapters[name] for path, layer in adapted_layers(model) if name in layer.adapters}
    tensors = _tensors(updates)  # type: ignore[arg-type]
    return Adapter(method(config.peft_type).saved_config(config), tensors)


def _tensors(updates: dict[str, Update]) -> dict[str, dict[str, Tensor]]:
    """By path; what all layers share stands under the path of the model itself."""
    shared = next((update.shared_tensors() for update in updates.values()), {})
    own = {path: update.tensors() for path, update in updates.items()}
    return {"": shared, **own} if shared else own


def detach(layer: AdaptedLayer, name: str | None = None) -> None:
    """Take the update called `name` off the layer, or all; a layer with none left gets its own class back."""
    if name is not None and name in layer.adapters:
        del layer.adapters[name]
    if name is None or not layer.adapters:
        del layer.adapters
        restore(layer)


def _attach(layer: nn.Module, plan: Plan, name: str, update: Update) -> None:
    if not isinstance(layer, AdaptedLayer):
        kind = kind_of(layer)
        assert kind is not None
        layer.adapters = Adapters(plan)
        reclass(layer, kind)
    assert isinstance(layer, AdaptedLayer)
    update.train(layer.training)
    layer.adapters[name] = update


def _refuse_name(name: str) -> None:
    if not isinstance(name, str) or not name or "." in name or hasattr(Adapters(Plan()), name):
        raise AdapterError(
            f"{name!r} cannot be an adapter's name: expected a word without dots that is no attribute of a module"
        )


@torch.no_grad()
def _fill(model: nn.Module, updates: dict[str, Update], values: Adapter) -> None:
    """Copy the file's tensors in, or say everything that does not fit and change nothing."""
    wanted = {(path, key): p for path, own in _tensors(updates).items() for key, p in own.items()}
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
    for key, parameter in wanted.items():
        parameter.copy_(found[key])
