"""`Plan`: which adapters act now, with which weights. One object per model, shared by all its layers."""

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, SupportsFloat

import torch
from torch import Tensor

from veneer.core.errors import AdapterError, listed, nearest

_AGAIN = (
    "with gradient checkpointing the layers run again in backward, and other adapters act by now: call backward() "
    "before switching, and run what has no backward under torch.no_grad()"
)
BASE = "__base__"  # in a mixed batch: a row of the base model
Spec = str | Iterable[str] | Mapping[str, float]
Rows = Sequence[str | Mapping[str, float]]


@dataclass(frozen=True)
class Term:
    """`weight` · the change of `adapter`; in a mixed batch, row i has the weight `rows[i]` of it."""

    adapter: str
    weight: float = 1.0
    rows: tuple[float, ...] | None = None


class Groups(NamedTuple):
    """The rows of a mixed batch, adapter by adapter: each has as many places as the one with most rows has rows."""

    take: Tensor  # (adapters · most): the row in each place; places that are left over repeat one
    weights: Tensor  # (adapters, most): what the place counts; 0 where it is left over
    rows: int  # of the batch
    in_order: bool  # whether the places are these, one by one


@dataclass
class Plan:
    """y = W x + Σ weight · ΔW x over `terms`; no terms is the base model.

    While adapters are merged, `merged` holds the terms that are inside the weights, `terms` is empty, and
    `resting` holds what acts again after unmerging.
    """

    terms: tuple[Term, ...] = ()
    merged: tuple[Term, ...] = ()
    resting: tuple[Term, ...] = ()
    disabled: tuple[Term, ...] = ()  # what acts again after `enable_adapters`
    unmixable: dict[str, str] = field(default_factory=dict)  # adapter → a layer of it that sees no rows of the batch
    repeats: bool = False  # whether a row may stand several times in a row, as beams do
    watched: set[str] = field(default_factory=set)  # adapters of which a forward in training was looked at, once
    pending: tuple[Term, ...] | None = None  # the terms of a forward whose layers run again in its backward
    # adapter → layer → its update, which every layer enters: a compiled model looks its layers up, which are always the
    # same, and never an adapter's name, so that one graph serves all adapters of the same shapes
    updates: dict[str, dict[str, Any]] = field(default_factory=lambda: defaultdict(dict), repr=False, compare=False)
    acting: tuple[tuple[Term, dict[str, Any]], ...] = field(default=(), repr=False, compare=False)  # found(terms)
    names: tuple[str, ...] = field(default=(), repr=False, compare=False)  # of the terms' adapters
    # the modules of which transformers says whether they run again in backward, once they were looked for
    checkpointed: list[Any] | None = field(default=None, repr=False, compare=False)
    layers: int = field(default=0, compare=False)  # that were ever adapted
    tables: dict[Hashable, Any] = field(default_factory=dict, repr=False)  # what was made for `terms`, once

    def act(self, terms: tuple[Term, ...]) -> None:
        """Let these terms act from now on."""
        self.terms, self.tables, self.acting = terms, {}, self.found(terms)
        self.names = tuple(term.adapter for term in terms)

    def now(self) -> tuple[tuple[Term, dict[str, Any]], ...]:
        """What acts on a layer that runs now. Raises `AdapterError` where it runs again for a forward of others."""
        if self.pending is not None and not torch.compiler.is_compiling() and torch._C._current_graph_task_id() >= 0:
            if self.pending != self.terms:
                raise AdapterError(_AGAIN)
            self.pending = None
        return self.acting

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """Inside, a forward runs whose layers will run again in its backward (gradient checkpointing)."""
        before = self.pending
        if before not in (None, self.terms):
            raise AdapterError(_AGAIN)
        self.pending = self.terms
        try:
            yield
        except BaseException:
            self.pending = before  # there will be no backward
            raise

    def found(self, terms: tuple[Term, ...]) -> tuple[tuple[Term, dict[str, Any]], ...]:
        """The terms with the updates, by layer, of their adapters."""
        return tuple((term, self.updates[term.adapter]) for term in terms)

    def __getstate__(self) -> dict[str, Any]:
        """Without what layers enter, as the copy of one layer is not one of all, and without a backward to come."""
        fresh = vars(Plan())
        return vars(self) | {name: fresh[name] for name in ("updates", "acting", "tables", "pending", "checkpointed")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.act(self.terms)

    def carried(self, terms: tuple[Term, ...]) -> tuple[Term, ...]:
        """Those of the terms whose adapters are still on the model."""
        return tuple(term for term in terms if term.adapter in self.updates)

    def forget(self, name: str) -> None:
        """The adapter is no longer on the model; what acted with it acts on."""
        self.unmixable.pop(name, None)
        self.updates.pop(name, None)
        self.act(self.carried(self.terms))

    def refuse_merged(self, doing: str) -> None:
        """Raise `AdapterError` where adapters are inside the weights."""
        if self.merged:
            names = listed(term.adapter for term in self.merged)
            raise AdapterError(f"{doing} while {names} is merged would be wrong: call unmerge_adapter() first")

    def refuse_offloaded(self) -> None:
        """Raise `AdapterError` where accelerate has taken away what acts: it gives back what is called, not read."""
        if any(own.is_meta for _, updates in self.acting for update in updates.values() for own in update.parameters()):
            raise AdapterError(
                "the adapters are offloaded layer by layer, and would act with whatever is in memory: call "
                "merge_adapter() before, or offload whole models (enable_model_cpu_offload)"
            )

    def row_weights(self, term: Term, like: Tensor) -> Tensor:
        """The weights `(rows)` of a mixed batch's term for `like`, whose first dimension holds the rows."""
        self.count(like)
        if torch.compiler.is_compiling():
            return like.new_tensor(term.rows)
        return self._table((term.adapter, like.dtype, like.device), lambda: like.new_tensor(term.rows))

    def groups(self, names: tuple[str, ...], like: Tensor) -> Groups:
        """The rows of a mixed batch, adapter by adapter, for those of these names."""
        self.count(like)
        return self._table((names, like.device), lambda: _grouped(self.terms, names, like.device))

    def _table(self, key: Hashable, make: Callable[[], Any]) -> Any:
        if key not in self.tables:
            self.tables[key] = make()
        return self.tables[key]

    def count(self, like: Tensor) -> None:
        """Raise `AdapterError` unless `like` has the rows of the mixed batch."""
        rows = len(self.terms[0].rows or ())
        if len(like) != rows and (not self.repeats or len(like) % rows):
            raise AdapterError(f"adapter_names has {rows} entries, the input of an adapted layer {len(like)} rows")


def _grouped(terms: tuple[Term, ...], names: tuple[str, ...], device: torch.device) -> Groups:
    of = {term.adapter: term.rows or () for term in terms}
    own = {name: [row for row, weight in enumerate(of[name]) if weight] for name in names}
    most = max(map(len, own.values()))
    take = [row for rows in own.values() for row in (rows * most)[:most]]
    weights = [[of[name][row] for row in rows] + [0.0] * (most - len(rows)) for name, rows in own.items()]
    rows = len(of[names[0]])
    places, counts = torch.tensor(take, device=device), torch.tensor(weights, device=device)
    return Groups(places, counts, rows, take == list(range(rows)))


def terms_of(spec: Spec, known: Iterable[str]) -> tuple[Term, ...]:
    """The terms that a name, a list of names (the sum), or a mapping of names to weights (a blend) asks for."""
    if isinstance(spec, Mapping):
        numbers = {name for name, weight in spec.items() if isinstance(weight, SupportsFloat) and math.isfinite(weight)}
        if wrong := {name: weight for name, weight in spec.items() if name not in numbers}:
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
            if not term.weight:
                continue  # it acts on no row, and spoils none
            rows.setdefault(term.adapter, [0.0] * len(specs))[i] = term.weight
    return tuple(Term(name, rows=tuple(weights)) for name, weights in rows.items())


def by_row(y: Tensor, weights: Tensor) -> Tensor:
    """y with everything that belongs to row i of the batch times `weights[i]`, `(rows)` or `(rows, features)`.

    y's first dimension holds the rows one after the other, each as often as beams or flattened tokens have it. What
    counts 0 is 0, whatever another row's adapter made of it.
    """
    rows, features = len(weights), y.shape[-1]
    each = weights.view(rows, 1, -1)
    return torch.where(each == 0, 0, y.reshape(rows, -1, features) * each).view(y.shape)
