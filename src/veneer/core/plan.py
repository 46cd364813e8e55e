"""`Plan`: which adapters act now, with which weights. One object per model, shared by all its layers."""

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from veneer.core.errors import AdapterError, listed, nearest

BASE = "__base__"  # in a mixed batch: a row of the base model
Spec = str | Iterable[str] | Mapping[str, float]
Rows = Sequence[str | Mapping[str, float]]


@dataclass(frozen=True)
class Term:
    """`weight` · the change of `adapter`; in a mixed batch, row i has the weight `rows[i]` of it."""

    adapter: str
    weight: float = 1.0
    rows: tuple[float, ...] | None = None


@dataclass
class Plan:
    """y = W x + Σ weight · ΔW x over `terms`; no terms is the base model.

    While adapters are merged, `merged` holds the terms that are inside the weights, `terms` is empty, and
    `resting` holds what acts again after unmerging.
    """

    terms: tuple[Term, ...] = ()
    merged: tuple[Term, ...] = ()
    resting: tuple[Term, ...] = ()
    repeats: bool = False  # whether a row may stand several times in a row, as beams do
    watched: bool = False  # whether a forward in training was looked at for layers that are not called
    # adapter → layer → its update, which every layer enters: a compiled model looks its layers up, which are always the
    # same, and never an adapter's name, so that one graph serves all adapters of the same shapes
    updates: dict[str, dict[str, Any]] = field(default_factory=lambda: defaultdict(dict), repr=False, compare=False)
    acting: tuple[tuple[Term, dict[str, Any]], ...] = field(default=(), repr=False, compare=False)  # found(terms)
    layers: int = field(default=0, compare=False)
    tables: dict[Hashable, Any] = field(default_factory=dict, repr=False)  # what was made for `terms`, once

    def act(self, terms: tuple[Term, ...]) -> None:
        """Let these terms act from now on."""
        self.terms, self.tables, self.acting = terms, {}, self.found(terms)

    def found(self, terms: tuple[Term, ...]) -> tuple[tuple[Term, dict[str, Any]], ...]:
        """The terms with the updates, by layer, of their adapters."""
        return tuple((term, self.updates[term.adapter]) for term in terms)

    def new_key(self) -> str:
        """By which a layer is known here."""
        self.layers += 1
        return str(self.layers)

    def __getstate__(self) -> dict[str, Any]:
        """Without what layers enter: the copy of one layer is not one of all."""
        return {**vars(self), "updates": defaultdict(dict), "acting": (), "tables": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.act(self.terms)

    def row_weights(self, terms: Sequence[Term], widths: tuple[int, ...], like: Tensor) -> Tensor:
        """`(rows, Σ widths)`: the row weights of `terms[j]` in its `widths[j]` columns, of the dtype of `like`."""
        rows = len(terms[0].rows or ())
        if len(like) != rows and (not self.repeats or len(like) % rows):
            raise AdapterError(f"adapter_names has {rows} entries, the input of an adapted layer {len(like)} rows")
        key = (tuple(term.adapter for term in terms), widths, like.dtype, like.device)
        if key not in self.tables:
            table = torch.tensor([term.rows for term in terms], dtype=like.dtype, device=like.device).t()
            self.tables[key] = table.repeat_interleave(torch.tensor(widths, device=like.device), dim=1)
        return self.tables[key]


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


def terms_by_row(specs: Rows, known: Iterable[str]) -> tuple[Term, ...]:
    """The terms of a mixed batch: for each row a name, a blend `{name: weight}`, or `"__base__"`.

    Raises `AdapterError` for names that are not known and weights that are not finite numbers.
    """
    if isinstance(specs, (str, Mapping)) or not specs:
        raise AdapterError(f"adapter_names should be a list with an entry for each row of the batch, found {specs!r}")
    known = list(known)
    rows: dict[str, list[float]] = {}
    for i, spec in enumerate(specs):
        for term in () if spec == BASE else terms_of(spec, known):
            rows.setdefault(term.adapter, [0.0] * len(specs))[i] = term.weight
    return tuple(Term(name, rows=tuple(weights)) for name, weights in rows.items())


def _is_weight(weight: object) -> bool:
    try:
        return math.isfinite(float(weight))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False


def by_row(y: Tensor, weights: Tensor) -> Tensor:
    """y with everything that belongs to row i of the batch times `weights[i]`, `(rows)` or `(rows, features)`.

    y's first dimension holds the rows one after the other, each as often as beams or flattened tokens have it.
    """
    rows, features = len(weights), y.shape[-1]
    return (y.reshape(rows, -1, features) * weights.view(rows, 1, -1)).view(y.shape)
