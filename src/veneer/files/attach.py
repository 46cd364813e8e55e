"""An adapter onto a model, or onto the parts of a pipeline: all of them, or none."""

import os
from collections.abc import Iterable, Mapping
from typing import Any, overload

from torch import nn

from veneer.apart.changes import adapter_of, beside, changes
from veneer.core.adapter import Adapter
from veneer.core.errors import AdapterError, collapsed, listed
from veneer.core.inject import adapted_layers
from veneer.core.model import PeftModel, get_peft_model
from veneer.core.targets import base_modules
from veneer.files.carriers import Carriers
from veneer.files.parts import LEVEL, by_part, joined, prior_places

Given = Adapter | str | os.PathLike[str]


@overload
def attach(  # type: ignore[overload-overlap]  # a model is an object too
    target: nn.Module, adapter: Given, name: str = ..., is_trainable: bool = ..., parts: Iterable[str] | None = ...
) -> PeftModel: ...
@overload
def attach(
    target: object, adapter: Given, name: str = ..., is_trainable: bool = ..., parts: Iterable[str] | None = ...
) -> Carriers: ...
def attach(
    target: Any,
    adapter: Given,
    name: str = "default",
    is_trainable: bool = False,
    parts: Iterable[str] | None = None,
) -> PeftModel | Carriers:
    """Put an adapter, or what `read` finds at a path, on a model, on a diffusers pipeline, or on `{part: model}`.

    Returns the model, or the `Carriers`: all parts that carry adapters now, which are asked together. A model's first
    adapter acts at once, as after `from_pretrained`; others act from `set_adapter` on. `parts` names those of the
    adapter that are wanted, if not all. A layer's path may lack or have CLIP's level `text_model`, and may be flat,
    with `_` for dots, where one layer alone is meant so.

    Raises one `AdapterError` with all that does not fit, of all parts; nothing is changed then anywhere.
    """
    if not isinstance(adapter, Adapter):
        from veneer.files import read  # which is above

        adapter = read(adapter)
    wanted = _parts(adapter, parts)
    models = _models(target, wanted)
    faults, added, frozen = [], Carriers(), _Grads(models.values())
    for part, model in models.items():
        try:
            added[part] = _attached(model, matched(model, wanted[part]), name, is_trainable)
        except AdapterError as error:
            faults.append(f"{part}: {error}" if part else str(error))
        except BaseException:
            _undo(added, name, frozen)
            raise
    if faults:
        _undo(added, name, frozen)
        raise AdapterError("\n".join(faults))
    return next(iter(added.values())) if isinstance(target, nn.Module) else carriers(target)


def carriers(target: Any) -> Carriers:
    """The parts of a pipeline, or of `{part: model}`, that carry adapters, to be asked together."""
    return Carriers((part, model) for part, model in models_of(target).items() if isinstance(model, PeftModel))


def detach(target: Any, name: str | None = None) -> None:
    """Take the adapter called `name`, or all adapters, off a model, a pipeline's parts, or `{part: model}`.

    Without any left, the parts are the plain base models again. Raises `AdapterError` where none carries it.
    """
    found = carriers(target)
    meant = [model for model in found.values() if name is None or name in model.peft_config]
    if not meant:
        said = "" if name is None else repr(name) + " "
        raise AdapterError(f"no adapter {said}is on it; it carries {listed(found.peft_config)}")
    for model in meant:
        _take_off(model, name)


def adapter_on(target: Any, name: str | None = None) -> Adapter:
    """The adapter called `name`, or the one that acts, as plain data: of a pipeline's parts in one, for a file.

    Its tensors are the live ones. Raises `AdapterError` where none carries it, or something else is trained whole.
    """
    found = carriers(target)
    own = {part: model for part, model in found.items() if name is None or name in model.peft_config}
    if not own:
        raise AdapterError(f"no adapter {'' if name is None else repr(name) + ' '}is on it; {listed(found)} carry any")
    if isinstance(target, nn.Module):
        return own[""].get_adapter(name)
    return joined({part: model.get_adapter(name) for part, model in own.items()})


def matched(model: nn.Module, adapter: Adapter) -> Adapter:
    """The adapter under the paths that the model's own layers have, where these can be told. Raises `AdapterError` for
    a flat name that may be several layers.
    """
    modules = base_modules(model)
    known = changes(adapter)
    strange = [path for path in known if path not in modules]
    if not strange or beside(adapter):  # what is trained whole goes by the model's own paths
        return adapter
    flat: dict[str, list[str]] = {}
    for path in modules:
        flat.setdefault(path.replace(".", "_"), []).append(path)
    found, unclear = {}, []
    for path in strange:
        levelled = next((other for other in (path.removeprefix(LEVEL), LEVEL + path) if other in modules), None)
        meant = [levelled] if levelled else flat.get(path.replace(".", "_"), []) or _levelled(path, flat)
        unclear += [f"{path} is {listed(meant, say=str, between=' or ')}"] if len(meant) > 1 else []
        found[path] = meant[0] if meant else path
    if unclear:
        raise AdapterError(f"names that may be several layers of this {type(model).__name__}: {collapsed(unclear)}")
    every = {found.get(path, path): change for path, change in known.items()}
    if len(every) < len(known):
        twice = [f"{path} ({own})" for path, own in found.items() if own != path]
        raise AdapterError(f"two names for one layer of this {type(model).__name__}, among: {collapsed(twice)}")
    tables = {found.get(path, path) for path in adapter.embeddings}
    base, task_type = adapter.config.base_model_name_or_path, adapter.config.task_type
    return adapter_of(every, metadata=adapter.metadata, embeddings=tables, base=base, task_type=task_type)


def _levelled(path: str, flat: Mapping[str, list[str]]) -> list[str]:
    """The same with CLIP's level or without it."""
    level = LEVEL.replace(".", "_")
    return flat.get(path.removeprefix(level), []) or flat.get(level + path, [])


def _parts(adapter: Adapter, parts: Iterable[str] | None) -> dict[str, Adapter]:
    """The adapters of the parts that are wanted; of one model's, the one under ""."""
    chosen = [parts] if isinstance(parts, str) else None if parts is None else list(parts)
    if strange := [part for part in chosen or () if part not in adapter.parts]:
        raise AdapterError(f"the adapter has no part {listed(strange)}: it has {listed(adapter.parts)}")
    if not adapter.parts:
        return {"": adapter}
    return {part: own for part, own in by_part(adapter).items() if chosen is None or part in chosen}


def _models(target: Any, wanted: Mapping[str, Adapter]) -> dict[str, nn.Module]:
    """The model of every wanted part. Raises `AdapterError` for those that the target has not."""
    if isinstance(target, nn.Module):
        if len(wanted) > 1:
            raise AdapterError(
                f"the adapter is for {listed(wanted)}: give the pipeline, or {{part: model}}, or parts=[…] for the one "
                f"that this {type(target).__name__} is"
            )
        return dict.fromkeys(wanted, target)
    held = models_of(target)
    if "" in wanted and len(held) == 1 and isinstance(target, Mapping):
        return {"": next(iter(held.values()))}
    if "" in wanted:
        raise AdapterError(f"the adapter is of one model: give that model (there are {listed(held)})")
    if missing := [part for part in wanted if part not in held]:
        rest = [part for part in wanted if part in held]
        said = f"; parts={rest} puts on what it has" if rest else ""
        raise AdapterError(f"the adapter is for {listed(missing)} too, and there are {listed(held)} alone{said}")
    return {part: held[part] for part in wanted}


def models_of(target: Any) -> dict[str, nn.Module]:
    """The models of a pipeline, of a mapping, or the model itself under ""."""
    if isinstance(target, nn.Module):
        return {"": target}
    own = target if isinstance(target, Mapping) else getattr(target, "components", None)
    if not isinstance(own, Mapping):
        raise AdapterError(f"expected a model, a pipeline or {{part: model}}, found {type(target).__name__}")
    models = {str(part): model for part, model in own.items() if isinstance(model, nn.Module)}
    return models | {part: models.pop(place) for part, place in prior_places(models).items()}


def _attached(model: nn.Module, adapter: Adapter, name: str, is_trainable: bool) -> PeftModel:
    what: Any = adapter
    if isinstance(model, PeftModel):
        model.add_adapter(name, what)
    else:
        get_peft_model(model, what, name)
    assert isinstance(model, PeftModel)
    if not is_trainable:
        for _, layer in adapted_layers(model):
            if name in layer.adapters:
                layer.adapters[name].requires_grad_(False)
    return model


class _Grads:
    """Which of the models' parameters are trained, so that it can be as it was."""

    def __init__(self, models: Iterable[nn.Module]) -> None:
        self.own = {id(model): [(own, own.requires_grad) for own in model.parameters()] for model in models}

    def restore(self, model: nn.Module) -> None:
        for parameter, was in self.own[id(model)]:
            parameter.requires_grad_(was)


def _undo(added: Carriers, name: str, frozen: _Grads) -> None:
    for model in added.values():
        _take_off(model, name)
        frozen.restore(model)


def _take_off(model: PeftModel, name: str | None) -> None:
    if name is None or list(model.peft_config) == [name]:
        model.unload()
    else:
        model.delete_adapter(name)
