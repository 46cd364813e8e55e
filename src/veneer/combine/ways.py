"""One layer's changes into one, in every way there is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from veneer.apart.changes import Change
from veneer.combine import sparse
from veneer.combine.base import Base
from veneer.combine.layers import Seen, full, lora, seen, shifted
from veneer.combine.matrix import Keep, Matrix, Thin, factored, inner, kept, weighted, whole
from veneer.core.errors import AdapterError, listed, nearest, shown

SUMS = ("linear", "cat", "svd", "slerp")
HOWS = (*SUMS, *sparse.HOWS)
_NO_ARC = 1e-6  # the angle below which two changes point the same way, or opposite ways


@dataclass(frozen=True)
class Way:
    """How changes are combined: `how`, and what it is told."""

    how: str = "linear"
    keep: Keep = field(default_factory=Keep)
    density: float | None = None
    majority: str = "total"
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises `AdapterError`."""
        wrong = []
        if self.how not in HOWS:
            wrong.append(f"how: expected one of {listed(HOWS, 20)}, found {shown(self.how)}{nearest(self.how, HOWS)}")
        elif self.how in sparse.HOWS:
            wrong += sparse.wrong_density(self.how, self.density)
        elif self.density is not None:
            wrong.append(f"{self.how} takes no density: {listed(sparse.HOWS)} do")
        if self.how in ("linear", "cat") and not self.keep.everything:
            wrong.append(f"{self.how} is the exact sum, of whatever rank it has: say 'svd' for one of a rank or energy")
        if self.majority not in sparse.MAJORITIES:
            wrong.append(f"majority: expected one of {listed(sparse.MAJORITIES)}, found {shown(self.majority)}")
        if wrong:
            raise AdapterError("; ".join(wrong))

    @property
    def is_sum(self) -> bool:
        """Whether it is Σ wᵢ ΔWᵢ, as exact as its rank allows."""
        return self.how in ("linear", "cat", "svd")

    def entrywise(self, terms: Sequence[tuple[float, Tensor]], keys: Sequence[str]) -> Tensor:
        """That of a sparse way, for changes of any shape; `keys` are what chance depends on."""
        told: dict[str, Any] = {"density": self.density, "majority": self.majority, "keys": keys}
        return sparse.HOWS[self.how]([weight * change for weight, change in terms], **told)

    def one(self, terms: Sequence[tuple[float, Matrix | None, str]], dtype: torch.dtype) -> Matrix | None:
        """The changes, with their weights and keys, into one; those of them that are there."""
        own = [(weight, W, key) for weight, W, key in terms if W is not None]
        if not own or self.how in SUMS:
            return weighted([(weight, W) for weight, W, _ in own]) if own else None
        wide = torch.promote_types(dtype, torch.float32)  # enough for entries, and half of fp64's memory
        return self.entrywise([(weight, whole(W, wide)) for weight, W, _ in own], [key for *_, key in own])


@dataclass(frozen=True)
class Layer:
    """One layer: of each adapter that has it the weight, the change and the key of its chance."""

    path: str
    terms: Sequence[tuple[float, Change, str]]
    is_table: bool = False

    @property
    def is_thin(self) -> bool:
        """Whether all changes are products of thin matrices as they stand."""
        return all(change.config.peft_type == "LORA" and not change.config.use_dora for _, change, _ in self.terms)

    def combined(self, way: Way, base: Base | None, dtype: torch.dtype) -> tuple[Change, tuple[float, float]]:
        """The change, and ‖ΔW - BA‖² and ‖ΔW‖². Raises `AdapterError`."""
        if way.how in ("linear", "cat") and (rescaled := self._rescaled(dtype)):
            return rescaled, (0.0, 0.0)
        views = [self.seen(change, base) for _, change, _ in self.terms]
        weights = [weight for weight, *_ in self.terms]
        matrices = [view.W for view in views if view.W is not None]
        if len(sizes := {size(W) for W in matrices}) > 1:
            raise AdapterError(f"the adapters are for layers of other sizes: {listed(sizes)}")
        if way.how == "slerp" and len(matrices) == len(views):
            weights = along_the_arc(weights, matrices)
        each = [(weight, key, view) for weight, (*_, key), view in zip(weights, self.terms, views, strict=True)]
        W = way.one([(weight, view.W, key) for weight, key, view in each], dtype)
        b = way.one([(weight, view.b, f"{key}:b") for weight, key, view in each], dtype)
        rows = [view.row for view in views]
        if base is not None and W is not None:
            rows.append(base.row(self.path, size(W)[1]))
        return stored(W, None if b is None else whole(b), max(rows, key=len), way.keep, dtype, as_is=way.how == "cat")

    def seen(self, change: Change, base: Base | None) -> Seen:
        """ΔW and Δb of one of the changes, with the base's weight where that is asked for."""
        if base is None or not (change.reads_weight or change.shape is None):
            return seen(change)
        return seen(change, base.matrix(self.path, change.shape, self.is_table), base.value(f"{self.path}.bias"))

    def _rescaled(self, dtype: torch.dtype) -> Change | None:
        """l = 1 + Σ w (l - 1) where all are (IA)³ of the same side, which needs no weight of the base."""
        first = self.terms[0][1].config
        alike = [(own.config.peft_type, own.config.use_dora, own.config.options) for _, own, _ in self.terms]
        if alike != [("IA3", False, first.options)] * len(alike):
            return None
        scales = [weight * (change.tensors["l"].double() - 1) for weight, change, _ in self.terms]
        return Change(first, {"l": (1 + torch.stack(scales).sum(0)).to(dtype)})


def stored(
    W: Matrix | None,
    b: Tensor | None,
    row: Sequence[int],
    keep: Keep,
    dtype: torch.dtype,
    as_is: bool = False,
    thin: bool = False,
) -> tuple[Change, tuple[float, float]]:
    """ΔW as a change, and what that cost, squared.

    A full matrix of which everything is kept stays one, unless it is to be `thin`; thin factors stay `as_is` if asked.
    """
    if W is None:
        assert b is not None
        return shifted(b, dtype), (0.0, 0.0)
    if as_is and isinstance(W, Thin):
        found = kept(W, dtype)
        return lora(found, row, b, dtype), (found.lost, found.square)
    if thin or isinstance(W, Thin) or not keep.everything:
        found = factored(W, keep, dtype)
        return lora(found, row, b, dtype), (found.lost, found.square)
    return full(W, row, b, dtype), (float(torch.sum((W - W.to(dtype)).double().square())), inner(W, W))


def size(W: Matrix) -> tuple[int, int]:
    """(out, in)."""
    return (len(W.B), W.A.shape[1]) if isinstance(W, Thin) else (len(W), W.shape[1])


def along_the_arc(weights: Sequence[float], changes: Sequence[Matrix]) -> list[float]:
    """sin((1-t) θ) / sin θ and sin(t θ) / sin θ, with θ the angle between the two changes (Shoemake 1985).

    Where there is no angle, as one is not there or zero, or they point the same way, 1 - t and t. Raises
    `AdapterError`.
    """
    if len(weights) == 2 and abs(sum(weights) - 1) > 1e-9:
        raise AdapterError(
            f"slerp: the weights are 1 - t and t, whose sum is 1, found {weights[0]:g} and {weights[1]:g}"
        )
    if len(weights) < 2:
        return list(weights)
    first, second = changes
    norms = math.sqrt(inner(first, first) * inner(second, second))
    angle = math.acos(max(-1.0, min(1.0, inner(first, second) / norms))) if norms else 0.0
    if math.pi - angle < _NO_ARC:
        raise AdapterError("slerp: the two changes are opposite, and no arc between them is the shortest: say 'linear'")
    return [math.sin(weight * angle) / math.sin(angle) if angle > _NO_ARC else weight for weight in weights]
