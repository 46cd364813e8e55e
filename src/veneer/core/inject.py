"""Adapters onto layers, off again, and into live ones: all of them, or none."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.core.adapter import Adapter
from veneer.core.config import LoraConfig
from veneer.core.errors import AdapterError, collapsed, named
from veneer.core.kinds.dense import AdaptedModule
from veneer.core.kinds.embedding import AdaptedEmbedding
from veneer.core.kinds.layer import AdaptedLayer, Adapters, is_plain
from veneer.core.methods import maker
from veneer.core.methods.beside import Tied
from veneer.core.plan import BASE, Plan
from veneer.core.reclass import mixin_of, reclass, restore
from veneer.core.targets import Target, every_module, select
from veneer.core.update import Parts, own_precision
from veneer.safe.stored import is_finite


class Carrier(NamedTuple):
    """A layer that has an update, or is to have one."""

    kind: type[AdaptedLayer]
    layer: Any
    update: Any


_TRANSFORMERS = (
    nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer
)  # fmt: skip
# what sees tokens as a router sends them, or pairs of positions: their number may well be that of the rows
_ROUTED = re.compile(r"(^|\.)(experts?(_\d+)?|relative_attention_bias)(\.|$)")


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLayer]]:
    """The layers that carry adapters, with their paths.

    Raises `AdapterError` for one that was copied by itself and put into the model: what acts on it is its own affair.
    """
    plan = getattr(model, "adapter_plan", None)
    for path, module in every_module(model).items():
        if isinstance(module, AdaptedLayer):
            if plan is not None and module.adapters.plan is not plan:
                raise AdapterError(
                    f"{path} is the copy of an adapted layer, which the model's adapters do not reach: put the layer "
                    "itself back, and copy layers before they are adapted, or the whole model"
                )
            yield path, module


def inject(model: nn.Module, plan: Plan, name: str, what: LoraConfig | Adapter) -> LoraConfig:
    """Give the layers that a config means an update called `name`: a fresh one, or one with an adapter's tensors.

    Returns the config with its targets spelled out. Raises one `AdapterError` with the adapter's own faults and all
    that does not fit, before anything is changed.
    """
    _refuse_name(name)
    carriers, resolved = prepared(model, what)
    crosswise = tuple(f"{path}.".lstrip(".") for path, module in every_module(model).items() if _is_crosswise(module))
    for path, carrier in carriers.items():
        _attach(carrier, plan, name)
        if _ROUTED.search(path) or path.startswith(crosswise):
            plan.unmixable[name] = path
    settle(model)
    return resolved


def _is_crosswise(module: nn.Module) -> bool:
    """Whether it is a transformer of torch's that takes time as its first dimension, and the batch as its second."""
    return isinstance(module, _TRANSFORMERS) and any(
        isinstance(inner, nn.MultiheadAttention) and not inner.batch_first for inner in module.modules()
    )


def prepared(model: nn.Module, what: LoraConfig | Adapter) -> tuple[dict[str, Carrier], LoraConfig]:
    """The layers that are meant, with updates that are not attached yet, and the config with its targets spelled out.

    Raises as `inject` does.
    """
    config, values = (what.config, what) if isinstance(what, Adapter) else (what, None)
    faults = list(values.faults) if values else []
    try:
        targets, resolved = select(model, config, fresh=values is None)
        carriers = _built(targets, resolved, sketched=values is not None)
    except AdapterError as error:
        raise AdapterError("\n".join([*faults, str(error)])) from None
    if values is not None:
        if config.method.saved_config(config) != config:
            faults.append("the config says how an adapter is trained, which its tensors are not read under")
        for path, (kind, layer, update) in carriers.items():
            biased = kind.biased and (layer.bias is not None or is_plain(layer.weight))
            for part, place in kind.places(update).items():
                update.parts()[part].fit(values.tensors.get(path + place, {}), biased)
        faults += _misfits(model, carriers, values)
    if faults:
        raise AdapterError("\n".join(faults))
    if values is not None:
        if any(matrix.is_meta for target in targets.values() for matrix in target.matrices().values()):
            raise AdapterError("the base is on 'meta', where an adapter's values would be lost: load its weights first")
        _fill(carriers, values)
    return carriers, resolved


def settle(model: nn.Module) -> None:
    """Keep `nn.TransformerEncoder` from nested tensors while layers in it are adapted, and only then.

    None but its fast path can take them, which reads weights and calls no layer.
    """
    for module in every_module(model).values():
        if isinstance(module, nn.TransformerEncoder):
            adapted = any(isinstance(inner, AdaptedLayer) for inner in module.modules())
            if module.use_nested_tensor is (True if adapted else None):
                module.use_nested_tensor = None if adapted else True  # type: ignore[assignment]


def _built(targets: Mapping[str, Target], config: LoraConfig, sketched: bool) -> dict[str, Carrier]:
    """The targets with their updates; a sketch takes no memory, whatever the config claims, and draws no values."""

    def on(weight: Tensor) -> Tensor:
        return weight.to("meta") if sketched else weight

    by_method = [target for target in targets.values() if target.own is None]
    make = maker(config, ((on(matrix), each.config) for each in by_method for matrix in each.matrices().values()))

    def built(target: Target) -> Any:
        parts = {}
        for part, matrix in target.matrices().items():
            if own := target.configs.get(part, target.configs.get("")):
                parts[part] = target.own(on(matrix)) if target.own else make(on(matrix), own, target.kind.start)
        return parts[""] if "" in parts else Parts(parts)

    updates = {path: built(target) for path, target in targets.items() if target.tied_to is None}
    for path, target in targets.items():
        if target.tied_to is not None:
            updates[path] = _tied(updates[target.tied_to], target, targets[target.tied_to])
        if (bias := target.bias()) is not None:
            updates[path].own_bias = on(bias.detach()).to(own_precision(bias), copy=True)
    return {path: Carrier(target.kind, target.layer, updates[path]) for path, target in targets.items()}


def _tied(update: Any, target: Target, source: Target) -> Any:
    """The same change, for another layer with the same weight."""
    if target.kind is AdaptedModule:
        return Parts({"weight": update["weight"]})
    lookups = [issubclass(kind, AdaptedEmbedding) for kind in (target.kind, source.kind)]
    return Tied(update, turned=lookups[0] != lookups[1])


def carrying(model: nn.Module, name: str) -> dict[str, Carrier]:
    """The layers that carry the adapter called `name`."""
    layers = {path: layer for path, layer in adapted_layers(model) if name in layer.adapters}
    return {path: Carrier(mixin_of(layer), layer, layer.adapters[name]) for path, layer in layers.items()}  # type: ignore[arg-type]


def extract(model: nn.Module, name: str, config: LoraConfig) -> Adapter:
    """The adapter called `name` as plain data: live tensors, not copies, where it is saved as it is.

    Tensors that `fully_shard` spread over processes are gathered, for which all of these call it.
    """
    carriers = carrying(model, name)
    for carrier in carriers.values():
        carrier.layer.adapters.part()  # whoever saves a tensor saves all of its memory
    plan: Any = model.adapter_plan
    if lost := len(plan.updates[name]) - len(carriers):
        raise AdapterError(f"{name!r} is on {lost} layers that are no longer in the model: something replaced them")
    tensors: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for (path, key), entry in entries(carriers).items():
        tensors[path][key] = gathered(entry.filed)
    embeddings = frozenset(path for path, own in carriers.items() if issubclass(own.kind, AdaptedEmbedding))
    return Adapter(config.method.saved_config(config), dict(tensors), embeddings)


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be spread over processes."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def detach(layer: AdaptedLayer, name: str | None = None) -> None:
    """Take the update called `name` off the layer, or all; a layer with none left gets its own class back."""
    if name is not None and name in layer.adapters:
        del layer.adapters[name]
    if name is None or not layer.adapters:
        del layer.adapters
        restore(layer)


def _attach(carrier: Carrier, plan: Plan, name: str) -> None:
    kind, layer, update = carrier
    if not isinstance(layer, AdaptedLayer):
        layer._modules["adapters"] = Adapters(plan)  # no layer has such a name; as an attribute it takes a while
        reclass(layer, kind)
    if not layer.training:
        update.eval()
    layer._modules["adapters"][name] = update


def _refuse_name(name: str) -> None:
    fits = isinstance(name, str) and re.fullmatch(r"[\w +-]+", name) and name != BASE
    if not fits or hasattr(Adapters(Plan()), name):
        expected = "expected letters, digits, _, - and spaces, no attribute of a module"
        raise AdapterError(f"{name!r} cannot be an adapter's name: {expected}")


class Entry(NamedTuple):
    """One tensor of an update, and how a file has it."""

    tensor: Tensor
    filed: Tensor
    form: str
    kind: type[AdaptedLayer]
    scale: float  # that of its update


def entries(carriers: Mapping[str, Carrier]) -> dict[tuple[str, str], Entry]:
    """(path, name) → what a file says there; what all layers share stands under the path of the model itself."""
    found = {}
    for path, (kind, layer, update) in carriers.items():
        for part, place in kind.places(update).items():
            own = update.parts()[part]
            for name, tensor in own.shared_tensors().items():
                found["", name] = Entry(tensor, tensor, "", kind, own.scale)
            if (bias := own.own_bias) is not None:
                found[f"{path}.bias", "value"] = Entry(bias.detach(), bias.detach(), "", kind, own.scale)
            for name, tensor in own.tensors().items():
                form = own.forms.get(name, "")
                found[path + place, name] = Entry(tensor, kind.filed(layer, form, tensor), form, kind, own.scale)
    return found


def _misfits(model: nn.Module, carriers: Mapping[str, Carrier], values: Adapter) -> list[str]:
    """All in the file that does not fit the model."""
    wanted = {place: entry.filed.shape for place, entry in entries(carriers).items()}
    found = {(path, key): t for path, own in values.tensors.items() for key, t in own.items()}
    missing, misshaped, broken = [], [], []
    for key, shape in wanted.items():
        if key not in found:
            missing.append(said(key))
        elif not _fits(shape, found[key].shape):
            misshaped.append(f"{said(key)} expected {tuple(shape)} found {tuple(found[key].shape)}")
        elif not is_finite(found[key]):
            broken.append(said(key))
    strangers = [said(key) for key in found if key not in wanted]
    for path, base in values.bases.items():
        weight = carriers[path].layer.get_parameter("weight").detach() if path in carriers else None
        if weight is None or weight.shape != base.shape or not torch.equal(weight.to(base.device, base.dtype), base):
            strangers.append(f"{path}.base_layer.weight (of another base)")
    told = (("missing", missing), ("unexpected", strangers), ("of another shape", misshaped))
    problems = [f"{what}: {collapsed(names)}" for what, names in told if names]
    if problems:
        made_for = values.config.base_model_name_or_path
        origin = f" (it was made for {named(made_for)})" if made_for else ""
        problems.insert(0, f"the adapter does not fit this {type(model).__name__}{origin}:")
    return problems + ([f"NaN or infinity in: {collapsed(broken)}"] if broken else [])


def _fits(wanted: torch.Size, found: torch.Size) -> bool:
    """Whether a file's shape is that, but for ones at its end (kernels of a single point are filed as matrices, and
    matrices as kernels), or flattens to the matrix that is wanted.
    """
    bare = [shape[: max((i + 1 for i, size in enumerate(shape) if size != 1), default=0)] for shape in (wanted, found)]
    return bare[0] == bare[1] or wanted == (found[:1].numel(), found[1:].numel())


def said(key: tuple[str, str]) -> str:
    """What messages call an entry."""
    return ".".join(filter(None, key))


@torch.no_grad()
def _fill(carriers: Mapping[str, Carrier], values: Adapter) -> None:
    for kind, layer, update in carriers.values():
        matrices = kind.matrices(layer)
        for part, own in update.parts().items():
            own.materialise(matrices[part].device)
    for (path, key), entry in entries(carriers).items():
        entry.tensor.copy_(entry.kind.unfiled(entry.form, values.tensors[path][key], entry.tensor.shape))
