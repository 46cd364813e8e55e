"""`combine`: adapters into one, as mathematics says, layer by layer and without a model."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from veneer.combine.base import Base, Source
from veneer.combine.beside import combined_beside
from veneer.combine.layers import Errors
from veneer.combine.matrix import Keep
from veneer.combine.shares import Weight, shares
from veneer.combine.together import agreed, precision, refuse_apart, told
from veneer.combine.ways import Layer, Way
from veneer.core.adapter import Adapter
from veneer.core.apart import Change, adapter_of, changes
from veneer.core.errors import AdapterError


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
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Adapter, Errors]:
    """The combined adapter, and what its ranks cost.

    `weights`: a number for each adapter, of either sign, `{pattern: number}` or `Blocks` (`veneer.combine.shares`). A
    layer that an adapter has not counts as unchanged by it.

    "linear": the exact sum; thin factors are stacked and recompressed to the numerical rank. "cat": the same, stacked
    and left so. "svd": the best approximation of the sum of that `rank` or `energy` (the share of Σ σ²); without
    either, of the largest rank among the adapters. "slerp": of two, along the arc between their changes, layer by
    layer; the weights are 1 - t and t. "ties", "dare_linear", "dare_ties", "magnitude_prune": with a `density` (the
    share of entries that is kept), `majority` "total" or "frequency" and `seed`; they make full matrices, which are
    kept as such unless a `rank` or `energy` is given. So does a sum with a full matrix in it (LoKr, a large LoHa).

    `base` is asked for where a change depends on the base's weights (DoRA), and where parameters are trained whole.
    The tensors of the result have the precision `dtype`; fp32 at least, if not said. `names` are for messages.
    Raises one `AdapterError` with all that stands against it.
    """
    names = list(names or (f"adapter {i + 1}" for i in range(len(adapters))))
    way = Way(how, Keep(rank=rank, energy=energy), density, majority, seed)
    refuse_apart(adapters, weights, names, how)
    own = [changes(adapter) for adapter in adapters]
    if how == "svd" and way.keep.everything:
        way = replace(
            way, keep=Keep(rank=max((change.config.r for every in own for change in every.values()), default=1))
        )
    places = [[path for path in adapter.tensors if path] for adapter in adapters]
    share = [shares(weight, own, name) for weight, own, name in zip(weights, places, names, strict=True)]
    model = None if base is None else Base(base)
    dtype = dtype or precision(adapters)
    tables = frozenset(path for adapter in adapters for path in adapter.embeddings)
    paths = list(dict.fromkeys(path for every in own for path in every))
    faults, found, errors = list[str](), dict[str, Change](), Errors()
    for done, path in enumerate(paths):
        progress(done, len(paths))
        having = [i for i, every in enumerate(own) if path in every]
        layer = Layer(path, [(share[i][path], own[i][path], f"{seed}:{path}:{i}") for i in having], path in tables)
        try:
            found[path], errors.squares[path] = layer.combined(way, model, dtype)
        except AdapterError as error:
            faults.append(f"{path}: {str(error).removeprefix(f'{path}: ')}")
    progress(len(paths), len(paths))
    rest = combined_beside(adapters, share, names, way, model, dtype, faults)
    if faults:
        raise AdapterError(told(faults))
    return rest.onto(adapter_of(found, embeddings=tables, **agreed(adapters))), errors
