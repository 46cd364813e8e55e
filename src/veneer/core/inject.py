"""Adapters onto layers and off again: all of them, or none."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from veneer.core.adapter import Adapter
from veneer.core.config import LoraConfig
from veneer.core.errors import AdapterError, collapsed, named
from veneer.core.kinds import kind_of
from veneer.core.kinds.layer import AdaptedLayer, Adapters
from veneer.core.methods import method
from veneer.core.plan import Plan
from veneer.core.reclass import reclass, restore
from veneer.core.stored import is_finite
from veneer.core.targets import Target, select
from veneer.core.update import Update


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLayer]]:
    """The layers that carry adapters, with their paths."""
    for path, module in model.named_modules():
        if isinstance(module, AdaptedLayer):
            yield path, module


def inject(
    model: nn.Module,
    plan: Plan,
    name: str,
    config: LoraConfig,
    values: Adapter | None = None,
    faults: Iterable[str] = (),
) -> LoraConfig:
    """Give the layers that `config` means an update called `name`, with the tensors of `values` or fresh ones.

    Returns the config with its targets spelled out. Raises one `AdapterError` with `faults` (those that `values` had
    of its own) and all that does not fit, before anything is changed.
    """
    _refuse_name(name)
    faults = list(faults)
    try:
        targets, resolved = select(model, config)
    except AdapterError as error:
        raise AdapterError("\n".join([*faults, str(error)])) from None
    build = method(config.peft_type)
    if values is not None:
        faults += _misfits(model, build, targets, values)
    if faults:
        raise AdapterError("\n".join(faults))
    updates = {path: build(_matrix(target.layer), target.config) for path, target in targets.items()}
    if values is not None:
        _fill(updates, values)
    for path, update in updates.items():
        _attach(targets[path].layer, plan, name, update)
    return resolved


def extract(model: nn.Module, name: str, config: LoraConfig) -> Adapter:
    """The adapter called `name` as plain data; its tensors are the live ones, not copies."""
    tensors = {
        path: dict(layer.adapters[name].named_parameters())
        for path, layer in adapted_layers(model)
        if name in layer.adapters
    }
    return Adapter(config, {path: {key: p.detach() for key, p in own.items()} for path, own in tensors.items()})


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


def _matrix(layer: nn.Module) -> Tensor:
    kind = kind_of(layer)
    assert kind is not None
    assert isinstance(layer.weight, Tensor)
    return kind.matrix(layer.weight)


def _misfits(model: nn.Module, build: type[Update], targets: dict[str, Target], values: Adapter) -> list[str]:
    """All in the file that does not fit the model, found without memory for what the config claims."""
    wanted = {}
    for path, target in targets.items():
        update = build(_matrix(target.layer).to("meta"), target.config)
        wanted.update({(path, key): parameter.shape for key, parameter in update.named_parameters()})
    found = {(path, key): tensor for path, own in values.tensors.items() for key, tensor in own.items()}
    missing = [".".join(key) for key in wanted if key not in found]
    strangers = [".".join(key) for key in found if key not in wanted]
    misshaped = [
        f"{'.'.join(key)} expected {tuple(shape)} found {tuple(found[key].shape)}"
        for key, shape in wanted.items()
        if key in found and shape != found[key].shape
    ]
    fitting = [key for key, shape in wanted.items() if key in found and shape == found[key].shape]
    broken = [".".join(key) for key in fitting if not is_finite(found[key])]
    said = (("missing", missing), ("unexpected", strangers), ("of another shape", misshaped))
    problems = [f"{what}: {collapsed(names)}" for what, names in said if names]
    if problems:
        made_for = values.config.base_model_name_or_path
        origin = f" (it was made for {named(made_for)})" if made_for else ""
        problems.insert(0, f"the adapter does not fit this {type(model).__name__}{origin}:")
    return problems + ([f"NaN or infinity in: {collapsed(broken)}"] if broken else [])


@torch.no_grad()
def _fill(updates: dict[str, Update], values: Adapter) -> None:
    for path, update in updates.items():
        for key, parameter in update.named_parameters():
            parameter.copy_(values.tensors[path][key])
