"""`combine`: adapters into one, as mathematics says, layer by layer and without a model.

"linear"   Σ wᵢ ΔWᵢ, exactly; thin factors are stacked, and recompressed to the numerical rank
"cat"      the same, stacked and left so
"svd"      its best approximation of a `rank` or `energy` (the share of Σ σ²); without either, of the largest rank
           among the adapters
"slerp"    of two, along the arc between their changes, layer by layer; the weights are 1 - t and t
"ties", "dare_linear", "dare_ties", "magnitude_prune"
           Σ of thinned-out changes: `density` is the share of entries that is kept, `majority` "total" or "frequency",
           `seed` that of chance, with which and a layer's path all draws are made

A sum of full matrices is one and is kept as such, unless a `rank` or `energy` is given: of those that are thinned
out, of LoKr, of a LoHa of large rank, of DoRA.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from veneer.apart.changes import Change, adapter_of, changes
from veneer.combine.base import Base, Source
from veneer.combine.beside import combined_beside
from veneer.combine.layers import Errors, levelled
from veneer.combine.matrix import Keep, alone
from veneer.combine.shares import Weight, shares
from veneer.combine.together import agreed, precision, refuse_apart, told
from veneer.combine.ways import SUMS, Layer, Way
from veneer.core.adapter import Adapter
from veneer.core.errors import AdapterError
from veneer.safe.stored import is_finite

Progress = Callable[[int, int], None]  # layers done, of how many


def combine(adapters: Sequence[Adapter], weights: Sequence[Weight], how: str = "linear", **options: Any) -> Adapter:
    """ΔW = Σ wᵢ ΔWᵢ in every layer, or what else `how` says. `measured` has the options, and says the error too."""
    return measured(adapters, weights, how, **options)[0]


@torch.no_grad()
def measured(
    adapters: Sequence[Adapter],
    weights: Sequence[Weight],
    how: str = "linear",
    *,
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    majority: str = "total",
    seed: int = 0,
    base: Source | None = None,
    dtype: torch.dtype | None = None,
    names: Sequence[str] | None = None,
    progress: Progress = lambda done, total: None,
) -> tuple[Adapter, Errors]:
    """The combined adapter, and what its ranks cost: ‖ΔW - BA‖ / ‖ΔW‖.

    `weights`: a number for each adapter, of either sign, `{pattern: number}` or `Blocks` (`veneer.combine.shares`). A
    layer that an adapter has not counts as unchanged by it. `base` (a model, its tensors by name, its folder) is asked
    for where a change depends on the base's weights (DoRA), and where parameters are trained whole. The tensors of the
    result have the precision `dtype`; fp32 at least, if not said. `names` are for messages.

    Raises one `AdapterError` with all that stands against it.
    """
    names = list(names or (f"adapter {i + 1}" for i in range(len(adapters))))
    way = Way(how, Keep(rank=rank, energy=energy), density, majority, seed)
    refuse_apart(adapters, weights, names, how)
    own = [changes(adapter) for adapter in adapters]
    if how == "svd" and way.keep.everything:
        ranks = [change.config.r for every in own for change in every.values()]
        way = replace(way, keep=Keep(rank=max(ranks, default=1)))
    places = [[path for path in adapter.tensors if path] for adapter in adapters]
    share = [shares(weight, its, name) for weight, its, name in zip(weights, places, names, strict=True)]
    model = None if base is None else Base(base)
    dtype = dtype or precision(adapters)
    tables = frozenset(path for adapter in adapters for path in adapter.embeddings)
    layers = _layers(own, share, tables, seed)
    found, errors, faults = each_layer(
        layers, lambda layer: layer.combined(way, model, dtype), progress, way.how in SUMS
    )
    rest = combined_beside(adapters, share, names, way, model, dtype, faults)
    if faults:
        raise AdapterError(told(faults))
    return rest.onto(adapter_of(found, embeddings=tables, **agreed(adapters))), errors


def _layers(
    own: Sequence[Mapping[str, Change]], share: Sequence[Mapping[str, float]], tables: frozenset[str], seed: int
) -> list[Layer]:
    """The layers that any adapter has, in their order."""
    paths = dict.fromkeys(path for each in own for path in each)
    having = {path: [i for i, each in enumerate(own) if path in each] for path in paths}
    return [
        Layer(path, [(share[i][path], own[i][path], f"{seed}:{path}:{i}") for i in having[path]], path in tables)
        for path in paths
    ]


def each_layer(
    layers: Sequence[Layer],
    work: Callable[[Layer], tuple[Change, tuple[float, float]]],
    progress: Progress,
    thin: bool = True,
) -> tuple[dict[str, Change], Errors, list[str]]:
    """The work done layer by layer, its errors, and what stands against it in some; `thin` work forms no out × in."""
    found, errors, faults = dict[str, Change](), Errors(), list[str]()
    for done, layer in enumerate(layers):
        progress(done, len(layers))
        try:
            with alone() if thin and layer.is_thin else nullcontext():
                change, errors.squares[layer.path] = work(layer)
                if not all(map(is_finite, change.tensors.values())):
                    raise AdapterError("the result would hold NaN or infinity")
            found[layer.path] = change
        except AdapterError as error:
            faults.append(f"{layer.path}: {str(error).removeprefix(f'{layer.path}: ')}")
        except torch.linalg.LinAlgError:
            faults.append(f"{layer.path}: has no singular values: look for NaN or infinity in the adapters")
    progress(len(layers), len(layers))
    return levelled(found), errors, faults
