"""An adapter layer by layer: what each changes, by which method, with which numbers; from shapes alone."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from veneer.analyse.roles import role_of
from veneer.apart.changes import Change, beside, changes
from veneer.core.adapter import Adapter
from veneer.core.config import LoraConfig, scaling

_METHODS = {"LORA": "LoRA", "LOHA": "LoHa", "LOKR": "LoKr", "VERA": "VeRA", "IA3": "(IA)³", "FULL": "full difference"}
_RANKED = {"LORA": ("A",), "LOHA": ("A1",), "LOKR": ("D_A", "C_A"), "VERA": ("d",)}  # tensors with r as first side
_SCALED = {"LORA", "LOHA", "LOKR"}
WHOLE, BIAS, ROWS = "saved whole", "bias", "token rows"


@dataclass(frozen=True)
class Layer:
    """What an adapter does to one layer; `rank`, `alpha` and `scale` are None where the method has none."""

    path: str
    part: str  # of a pipeline; "" for a model by itself
    role: str
    method: str
    rank: int | None
    alpha: float | None
    scale: float | None
    shape: tuple[int, ...] | None  # (out, in · kernel)
    parameters: int
    said: int | None  # the rank that the config says


def layers_of(adapter: Adapter) -> tuple[dict[str, Layer], dict[str, Change]]:
    """The layers by path, in the file's order, and the changes that they come from; no tensor's values are read."""
    found, others = changes(adapter), beside(adapter)
    layers = {}
    for path, tensors in adapter.tensors.items():
        if path in found:
            layers[path] = _layer(path, adapter, tensors, found[path])
        elif path in others:
            layers[path] = _layer(path, adapter, tensors, None)
    return layers, found


def _layer(path: str, adapter: Adapter, tensors: Mapping[str, Tensor], change: Change | None) -> Layer:
    part, inner = _apart(path, adapter)
    config = change.config if change else adapter.config
    kind = config.peft_type
    method = _beside(path, tensors) or named(config)
    own = "value" not in tensors and "rows" not in tensors
    ranks = [len(tensors[name]) for name in _RANKED.get(kind, ()) if own and name in tensors]
    said = config.r if ranks else None
    scaled = own and kind in _SCALED
    return Layer(
        path=path,
        part=part,
        role="embedding" if path in adapter.embeddings else role_of(inner),
        method=method,
        rank=ranks[0] if ranks and change else said,  # the tensors of a stack of matrices have it many times
        alpha=config.lora_alpha if scaled else None,
        scale=scaling(config.r, config.lora_alpha, config.use_rslora) if scaled else None,
        shape=change.shape if change else tuple(tensors["value"].shape) if "value" in tensors else None,
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        said=said,
    )


def _apart(path: str, adapter: Adapter) -> tuple[str, str]:
    """The part of a pipeline, and the path in it."""
    part, _, inner = path.partition(".")
    return (part, inner) if part in adapter.parts else ("", path)


def _beside(path: str, tensors: Mapping[str, Tensor]) -> str | None:
    """What is trained beside a method."""
    if "rows" in tensors:
        return ROWS
    if "value" in tensors:
        return BIAS if path.endswith(".bias") else WHOLE
    return None


def named(config: LoraConfig) -> str:
    """The method as people call it: `LoRA`, `rsLoRA`, `DoRA`, `DoRA over LoHa`, …"""
    name = _METHODS.get(config.peft_type, config.peft_type)
    if config.use_rslora and config.peft_type in _SCALED:
        name = f"rs{name}"
    if config.use_dora:
        return "DoRA" if name == "LoRA" else f"DoRA over {name}"
    return name
