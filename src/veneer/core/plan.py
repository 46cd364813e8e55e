"""`Plan`: which adapters act now, with which weights. One object per model, shared by all its layers."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from veneer.core.errors import AdapterError, listed, nearest

Spec = str | Iterable[str] | Mapping[str, float]


@dataclass(frozen=True)
class Term:
    """`weight` · the change of `adapter`."""

    adapter: str
    weight: float = 1.0


@dataclass
class Plan:
    """y = W x + Σ weight · ΔW x over `terms`; no terms is the base model.

    While adapters are merged, `merged` holds the terms that are inside the weights, `terms` is empty, and
    `resting` holds what acts again after unmerging.
    """

    terms: tuple[Term, ...] = ()
    merged: tuple[Term, ...] = ()
    resting: tuple[Term, ...] = ()


def terms_of(spec: Spec, known: Iterable[str]) -> tuple[Term, ...]:
    """The terms that a name, a list of names (the sum), or a mapping of names to weights (a blend) asks for."""
    if isinstance(spec, Mapping):
        if wrong := {name: weight for name, weight in spec.items() if not _is_weight(weight)}:
            raise AdapterError(f"an adapter's weight should be a finite number, found {wrong}")
        terms = tuple(Term(name, float(weight)) for name, weight in spec.items())
    else:
        terms = tuple(Term(name) for name in ([spec] if isinstance(spec, str) else spec))
    known = list(known)
    names = [term.adapter for term in terms]
    if strangers := [name for name in names if name not in known]:
        hints = "".join(nearest(name, known) for name in strangers[:1])
        raise AdapterError(f"no adapter named {listed(strangers)}; the model carries {listed(known)}{hints}")
    if len(set(names)) < len(names):
        raise AdapterError(f"an adapter may be named once, found {listed(names)}; use weights for more of it")
    return terms


def _is_weight(weight: object) -> bool:
    try:
        return math.isfinite(float(weight))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
