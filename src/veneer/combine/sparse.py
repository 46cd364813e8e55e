"""Sums of thinned-out changes: TIES (Yadav et al. 2023, arXiv:2306.01708) and DARE (Yu et al. 2024, arXiv:2311.03099).

They act on the entries of ΔW, which is what the papers thin out. (PEFT thins out A and B, each by itself; what comes
of their product is another thing.) "The share with the largest values" is taken layer by layer, so that one
layer at a time is in memory.
"""

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from veneer.core.errors import shown

MAJORITIES = ("total", "frequency")


def pruned(D: Tensor, density: float) -> Tensor:
    """The entries of D with the largest values, this share of them; the others are 0."""
    kept = round(density * D.numel())
    if kept >= D.numel():
        return D
    if kept == 0:
        return torch.zeros_like(D)
    least = D.abs().flatten().kthvalue(D.numel() - kept + 1).values
    return torch.where(D.abs() >= least, D, 0)


def dropped(D: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Each entry of D is kept with probability `density`, and is divided by it: the expectation is D."""
    kept = torch.rand(D.shape, generator=generator) < density
    return torch.where(kept.to(D.device), D / density, 0)


def elected(changes: Sequence[Tensor], majority: str) -> Tensor:
    """For each entry the mean of those that have the sign of the majority, of all that are not 0.

    "total": the sign of their sum. "frequency": the sign that more of them have, and where as many have the one as
    the other, that of their sum.
    """
    total = _sum(changes)
    sign = total.sign()
    if majority == "frequency":
        votes = _sum([D.sign() for D in changes])
        sign = torch.where(votes == 0, sign, votes.sign())
    agreed, number = torch.zeros_like(total), torch.zeros_like(total)
    for D in changes:
        agrees = (D.sign() == sign) & (sign != 0)
        agreed += torch.where(agrees, D, 0)
        number += agrees
    return agreed / number.clamp_min(1)


def magnitude_prune(changes: Sequence[Tensor], density: float, **_: object) -> Tensor:
    """Σ wᵢ · the largest entries of ΔWᵢ; `changes` are wᵢ ΔWᵢ, here and below."""
    return _sum([pruned(D, density) for D in changes])


def ties(changes: Sequence[Tensor], density: float, majority: str = "total", **_: object) -> Tensor:
    """Trim, elect a sign, and take the mean of what agrees (TIES). A negative weight turns its change around first."""
    return elected([pruned(D, density) for D in changes], majority)


def dare_linear(changes: Sequence[Tensor], density: float, keys: Sequence[str] = (), **_: object) -> Tensor:
    """Σ wᵢ · ΔWᵢ with entries dropped at random (DARE); of each what its key says, and nothing else."""
    return _sum(_drawn(changes, density, keys))


def dare_ties(
    changes: Sequence[Tensor], density: float, majority: str = "total", keys: Sequence[str] = (), **_: object
) -> Tensor:
    """Drop at random, elect a sign, and take the mean of what agrees."""
    return elected(_drawn(changes, density, keys), majority)


HOWS: dict[str, Callable[..., Tensor]] = {
    "ties": ties,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
    "magnitude_prune": magnitude_prune,
}


def _sum(changes: Sequence[Tensor]) -> Tensor:
    return sum(changes[1:], changes[0])


def _drawn(changes: Sequence[Tensor], density: float, keys: Sequence[str]) -> list[Tensor]:
    generators = [torch.Generator().manual_seed(_seed(key)) for key in keys]
    return [dropped(D, density, generator) for D, generator in zip(changes, generators, strict=True)]


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def wrong_density(how: str, density: object) -> list[str]:
    """What is wrong with it, if anything."""
    if not isinstance(density, bool) and isinstance(density, int | float) and 0 < density <= 1:
        return []
    found = "nothing; 0.2 is usual" if density is None else shown(density)
    return [f"{how}: density, the share of entries that is kept, should be above 0 and at most 1, found {found}"]
