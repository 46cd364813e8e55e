"""A layer's change as matrices, and matrices as a layer's change."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from veneer.apart.changes import WRAPPED, Change
from veneer.combine.matrix import Factored, Matrix, Thin
from veneer.core.config import LoraConfig, scaling
from veneer.core.errors import AdapterError


@dataclass
class Errors:
    """What approximating cost: ‖ΔW - BA‖ / ‖ΔW‖, layer by layer and of all layers as one vector."""

    squares: dict[str, tuple[float, float]] = field(default_factory=dict)  # path → (‖ΔW - BA‖², ‖ΔW‖²)

    @property
    def layers(self) -> dict[str, float]:
        """By path; 0 where there is no change."""
        return {path: _root(lost, square) for path, (lost, square) in self.squares.items()}

    @property
    def total(self) -> float:
        """Of all layers together."""
        return self.of(self.squares)

    def of(self, paths: Iterable[str]) -> float:
        """Of these layers together."""
        pairs = [self.squares[path] for path in paths if path in self.squares]
        return _root(sum(lost for lost, _ in pairs), sum(square for _, square in pairs))


def _root(lost: float, square: float) -> float:
    return math.sqrt(max(lost, 0.0) / square) if square else 0.0


@dataclass(frozen=True)
class Seen:
    """A layer's change as it is combined: ΔW and Δb `(out)`, or one of them, and the shape of a row of ΔW in files."""

    W: Matrix | None
    b: Tensor | None
    row: tuple[int, ...]  # (in, *kernel), or (in · kernel)


def seen(change: Change, weight: Tensor | None = None, bias: Tensor | None = None) -> Seen:
    """ΔW and Δb, in fp32 at least. `weight` `(out, in · kernel)` and `bias` are the base's, where they are known.

    Raises `AdapterError` for a change that depends on the base's weight when that is not given.
    """
    if change.tensors.keys() == {"b"}:
        return Seen(None, change.tensors["b"].detach(), ())
    if weight is None and (change.reads_weight or change.shape is None):
        kind = "DoRA" if change.config.use_dora else change.config.peft_type
        raise AdapterError(f"the change that {kind} makes depends on the base's weights: give the base")
    if change.config.peft_type == "LORA" and not change.config.use_dora:
        return _seen_plain(change)
    update = change.update(weight)
    with torch.no_grad():
        factors = update.factors()
        if factors is not None:
            A, B, scale = factors
            W: Matrix = Thin(scale * B.detach().double(), A.detach().double())
        else:
            shape = change.shape
            sketch = torch.empty(shape, device="meta") if weight is None and shape else weight
            assert sketch is not None
            W = update.delta(sketch).detach()
        b = update.shift(bias)
    return Seen(W, None if b is None else b.detach(), row_of(change, W))


def _seen_plain(change: Change) -> Seen:
    """The same of a plain LoRA, which is most that there is: without a module for each layer, half the time."""
    own, config = change.tensors, change.config
    A, B = own["A"].detach().flatten(1), own["B"].detach().flatten(1)  # (r, in · kernel), (out, r)
    if len(A) != B.shape[1] or len(A) != config.r:
        change.update()  # which says what is wrong
    scale = scaling(config.r, config.lora_alpha, config.use_rslora)
    W = Thin(scale * B.double(), A.double())
    return Seen(W, scale * own["b"].detach().double() if "b" in own else None, row_of(change, W))


def row_of(change: Change, W: Matrix) -> tuple[int, ...]:
    """The shape of a row of ΔW in files, as far as the tensors say it: `(in, *kernel)` of a convolution."""
    columns = W.A.shape[1] if isinstance(W, Thin) else W.shape[1]
    rows = {tuple(tensor.shape[1:]) for tensor in change.tensors.values() if tensor.ndim > 2}
    return next((row for row in rows if math.prod(row) == columns), (columns,))


def lora(found: Factored, row: Sequence[int], b: Tensor | None, dtype: torch.dtype) -> Change:
    """ΔW = B A as a plain LoRA of scale 1."""
    r = len(found.A)
    point = [1 for _ in row[1:]]
    tensors = {"A": found.A.reshape(r, *row), "B": found.B.reshape(len(found.B), r, *point)}
    config = LoraConfig(r=r, lora_alpha=r, options={"lora_bias": b is not None})
    return Change(config, tensors if b is None else {**tensors, "b": b.to(dtype)})


def levelled(found: Mapping[str, Change]) -> dict[str, Change]:
    """The same changes, where those of the parts of one layer have one rank: smaller ones are filled up with zeros."""
    ranks: dict[str, int] = {}
    for path, change in found.items():
        layer = path.partition(WRAPPED)[0]
        ranks[layer] = max(change.config.r, ranks.get(layer, 0))
    return {path: _of_rank(change, ranks[path.partition(WRAPPED)[0]]) for path, change in found.items()}


def _of_rank(change: Change, r: int) -> Change:
    own = change.tensors
    if change.config.r == r or "A" not in own:
        return change
    more = r - change.config.r
    A = torch.cat([own["A"], own["A"].new_zeros(more, *own["A"].shape[1:])])
    B = torch.cat([own["B"], own["B"].new_zeros(len(own["B"]), more, *own["B"].shape[2:])], 1)
    return Change(replace(change.config, r=r, lora_alpha=r), {**own, "A": A, "B": B})


def shifted(b: Tensor, dtype: torch.dtype) -> Change:
    """Δb alone."""
    return Change(LoraConfig(peft_type="FULL"), {"b": b.to(dtype)})


def full(W: Tensor, row: Sequence[int], b: Tensor | None, dtype: torch.dtype) -> Change:
    """ΔW as it is."""
    tensors = {"D": W.to(dtype).reshape(len(W), *row)}
    return Change(LoraConfig(peft_type="FULL"), tensors if b is None else {**tensors, "b": b.to(dtype)})
