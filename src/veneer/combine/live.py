"""`PeftModel.add_weighted_adapter`: adapters of a live model, combined into a new one of it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from veneer.combine.combined import combine
from veneer.combine.shares import Weight
from veneer.combine.sparse import HOWS
from veneer.core.errors import AdapterError, shown

if TYPE_CHECKING:
    from veneer.core.model import PeftModel


def add_weighted(
    model: "PeftModel",
    adapters: Sequence[str],
    weights: Sequence[Weight],
    adapter_name: str,
    combination_type: str = "linear",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    svd_energy: float | None = None,
    seed: int = 0,
) -> None:
    """Put Σ weight · ΔW of these adapters, or what else the type says, on the model as a new adapter.

    The types are PEFT's and `slerp`; what they do is `combine`'s: `linear`, which is PEFT's roughest, is exact here.
    `…_svd` and the types that thin out give a LoRA of `svd_rank`, or of the largest rank among the adapters; say
    `svd_energy` for a share of Σ σ² instead. `svd_full_matrices` and `svd_driver`, which PEFT has, say nothing here,
    and clamping, which PEFT offers, is refused: it makes any approximation worse. The adapter does not act until
    `set_adapter`. Raises `AdapterError`, with the model as it was.
    """
    model.adapter_plan.refuse_merged("combining adapters")
    if isinstance(adapters, str) or not all(isinstance(name, str) for name in adapters):
        raise AdapterError(f"adapters should be a list of names, found {shown(adapters)}")
    if svd_clamp is not None:
        raise AdapterError("svd_clamp is not supported: cut off factors are no longer the best of their rank")
    own = [model.get_adapter(name) for name in adapters]
    how = combination_type.removesuffix("_svd") if isinstance(combination_type, str) else combination_type
    if how in HOWS and svd_rank is None and svd_energy is None:
        svd_rank = max(max([adapter.config.r, *adapter.config.rank_pattern.values()]) for adapter in own)
    told = {"density": density, "majority": majority_sign_method, "seed": seed, "rank": svd_rank, "energy": svd_energy}
    model._add(adapter_name, combine(own, weights, how, base=model, names=adapters, **told), False)
