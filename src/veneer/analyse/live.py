"""What a live model carries, layer by layer and as a whole: PEFT's names for it, and nothing but reading."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from veneer.core.config import LoraConfig
from veneer.core.inject import adapted_layers
from veneer.core.kinds.layer import AdaptedLayer
from veneer.core.reclass import mixin_of

if TYPE_CHECKING:
    from veneer.core.trainer import Trainable


@dataclass(kw_only=True)
class _Status:
    """What is carried."""

    peft_types: dict[str, str]  # adapter → its method; all the adapters that are here
    active_adapters: list[str]  # those that act, live or merged
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Literal["irregular"]]  # all of the adapter's parameters train, none, or some
    devices: dict[str, list[str]]
    dtypes: dict[str, list[str]]

    @property
    def available_adapters(self) -> list[str]:
        return sorted(self.peft_types)

    @property
    def enabled(self) -> bool:
        """Whether anything acts."""
        return bool(self.active_adapters)

    def __str__(self) -> str:
        facts = sorted(vars(self).items(), key=lambda fact: fact[0] in _Status.__annotations__)
        return "\n".join(f"{name}: {f'{value:,}' if isinstance(value, int) else value}" for name, value in facts)


@dataclass(kw_only=True)
class LayerStatus(_Status):
    """A layer that carries adapters; `kind` says how it is adapted."""

    name: str
    module_type: str
    kind: str


@dataclass(kw_only=True)
class ModelStatus(_Status):
    """A model that carries adapters; `weights` are those of a blend, and none are given for a batch of mixed rows."""

    base_model_type: str
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    weights: dict[str, float]


def layer_status(model: "Trainable") -> list[LayerStatus]:
    """What `get_layer_status` says."""
    return [
        LayerStatus(
            **_carried(model, [layer]),
            name=path,
            module_type=type(layer).__name__,
            kind=mixin_of(layer).__name__.removeprefix("Adapted"),
        )
        for path, layer in adapted_layers(model)
    ]


def model_status(model: "Trainable") -> ModelStatus:
    """What `get_model_status` says."""
    layers = [layer for _, layer in adapted_layers(model)]
    terms = model.adapter_plan.terms or model.adapter_plan.merged
    trainable, total = model.get_nb_trainable_parameters()
    return ModelStatus(
        **_carried(model, layers),
        base_model_type=type(model).__name__,
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        weights={term.adapter: term.weight for term in terms if term.rows is None},
    )


def _carried(model: "Trainable", layers: list[AdaptedLayer]) -> dict[str, Any]:
    configs = {name: own for name, own in model.peft_config.items() if any(name in layer.adapters for layer in layers)}
    updates = {name: [layer.adapters[name] for layer in layers if name in layer.adapters] for name in configs}
    parameters = {name: [p for update in own for p in update.parameters()] for name, own in updates.items()}
    trains = {name: {p.requires_grad for p in own} for name, own in parameters.items()}
    return {
        "peft_types": {name: ", ".join(map(_method, own.by_method())) for name, own in configs.items()},
        "active_adapters": [name for name in model.active_adapters if name in configs],
        "merged_adapters": [term.adapter for term in model.adapter_plan.merged if term.adapter in configs],
        "requires_grad": {name: found.pop() if len(found) == 1 else "irregular" for name, found in trains.items()},
        "devices": {name: sorted({str(p.device) for p in own}) for name, own in parameters.items()},
        "dtypes": {name: sorted({str(p.dtype)[len("torch.") :] for p in own}) for name, own in parameters.items()},
    }


def _method(config: LoraConfig) -> str:
    return config.peft_type + "-DORA" * config.use_dora
