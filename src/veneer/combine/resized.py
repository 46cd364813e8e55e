"""An adapter alone: as a plain LoRA, of other ranks, turned around; and two, one without the other."""

from dataclasses import replace

import torch
from torch import Tensor

from veneer.apart.changes import Change, adapter_of, beside, changes
from veneer.combine.base import Base, Source
from veneer.combine.combined import Progress, combine, each_layer, measured
from veneer.combine.layers import Errors
from veneer.combine.matrix import Keep
from veneer.combine.together import agreed, precision, refuse_apart, told
from veneer.combine.ways import Layer, size, stored
from veneer.core.adapter import Adapter
from veneer.core.errors import AdapterError


def lora_of(adapter: Adapter, r: int | None = None, base: Source | None = None) -> tuple[Adapter, Errors]:
    """The adapter as a plain LoRA of rank r at most, and the error ‖ΔW - BA‖ / ‖ΔW‖, layer by layer and in all.

    Without r, of the rank that each change has. DoRA and (IA)³ depend on the base's weights: `base` is a model, its
    tensors by name, or its folder. What is trained whole beside the method stays so. Raises `AdapterError`.
    """
    return resize(adapter, rank=r, base=base)


@torch.no_grad()
def resize(
    adapter: Adapter,
    rank: int | None = None,
    *,
    ratio: float | None = None,
    energy: float | None = None,
    cumulative: float | None = None,
    frobenius: float | None = None,
    base: Source | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress = lambda done, total: None,
) -> tuple[Adapter, Errors]:
    """The best approximation of each layer's change by as many singular values as are asked for (`Keep`), and its
    error.

    `ratio`: those with σ / σ₁ of at least this (kohya's sv_ratio is its inverse). `cumulative`: this share of Σ σ
    (sv_cumulative). `frobenius`: this share of ‖ΔW‖ (sv_fro). `energy`: this share of ‖ΔW‖². With any of them `rank`
    is the most there may be, and layers get ranks of their own. The tensors keep their precision, if `dtype` does not
    say another. Raises `AdapterError`.
    """
    keep = Keep(rank, energy, frobenius, cumulative, ratio)
    refuse_apart([adapter], [1.0], ["the adapter"], "svd")
    model = None if base is None else Base(base)
    layers = [Layer(path, [(1.0, change, "")], path in adapter.embeddings) for path, change in changes(adapter).items()]

    def work(layer: Layer) -> tuple[Change, tuple[float, float]]:
        ((_, change, _),) = layer.terms
        own = dtype or precision([Adapter(change.config, {"": change.tensors})], least=None)
        view = layer.seen(change, model)
        own_row = () if model is None or view.W is None else model.row(layer.path, size(view.W)[1])
        row = max(view.row, own_row, key=len)
        return stored(view.W, view.b, row, keep, own, thin=True)

    found, errors, faults = each_layer(layers, work, progress)
    if faults:
        raise AdapterError(told(faults))
    return replace(adapter_of(found, like=adapter), metadata=agreed([adapter])["metadata"]), errors


def subtract(adapter: Adapter, other: Adapter, how: str = "linear", base: Source | None = None) -> Adapter:
    """ΔW - ΔW′, exactly; `how` and `base` as in `combine`."""
    return combine([adapter, other], [1.0, -1.0], how, base=base)


def negate(adapter: Adapter, base: Source | None = None) -> Adapter:
    """-ΔW, exactly and of the same ranks: what added to the adapter leaves the base. `base` as in `combine`."""
    every = changes(adapter)
    if not beside(adapter) and all(own.config.peft_type in _LEFT and not own.config.use_dora for own in every.values()):
        return replace(adapter, tensors=adapter.tensors | {path: _turned(own) for path, own in every.items()})
    return measured([adapter], [-1.0], "cat", names=["the adapter"], base=base)[0]


# the tensors of a method with which ΔW and Δb change their sign
_LEFT = {"LORA": ("B", "b"), "LOHA": ("B1",), "LOKR": ("C", "C_B"), "FULL": ("D", "b")}


def _turned(change: Change) -> dict[str, Tensor]:
    turned = _LEFT[change.config.peft_type]
    return {name: -own if name in turned else own for name, own in change.tensors.items()}
