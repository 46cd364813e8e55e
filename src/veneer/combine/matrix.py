"""Matrices of changes, thin or whole: their sums, products and singular values, never forming out × in where thin."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from veneer.core.errors import AdapterError, shown

_TINY, _SMALL = 128, 1024  # the smaller side up to which a matrix of fp32, of fp64, is decomposed by an SVD
_FIRST, _FAR = 32, 4  # the rank at which a search begins, and how many times it must fit into the smaller side
_MOST_TURNS = 16  # power iterations before the search is given up
_FEW = 2**21  # entries of a matrix that is too small for several threads
_SLACK = 1e-3  # the share of the squared error by which a search may miss the best approximation


class Thin(NamedTuple):
    """W = B A, of low rank."""

    B: Tensor  # (out, r)
    A: Tensor  # (r, in)


Matrix = Thin | Tensor


class Factored(NamedTuple):
    """W ≈ B A with balanced factors: BᵀB = A Aᵀ = diag(σ)."""

    B: Tensor  # (out, r)
    A: Tensor  # (r, in)
    lost: float  # ‖W - B A‖²
    square: float  # ‖W‖²


@dataclass(frozen=True)
class Keep:
    """How many of the singular values σ₁ ≥ σ₂ ≥ … of a change are kept.

    `rank`: this many at most. `energy`: as many as hold this share of Σ σ². `frobenius`: the same of its root, the
    Frobenius norm. `cumulative`: as many as hold this share of Σ σ. `ratio`: those with σ / σ₁ of at least this.
    Of several, the one that keeps fewest counts. One is always kept; those below the numerical rank never are: a σ of
    less than ε σ₁, with ε that of the precision in which the factors are stored, is lost in their rounding.
    """

    rank: int | None = None
    energy: float | None = None
    frobenius: float | None = None
    cumulative: float | None = None
    ratio: float | None = None

    def __post_init__(self) -> None:
        wrong = []
        if self.rank is not None and (type(self.rank) is not int or self.rank < 1):
            wrong.append(f"rank should be a whole number of at least 1, found {shown(self.rank)}")
        for name in ("energy", "frobenius", "cumulative", "ratio"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and 0 < value <= 1):
                hint = f": a ratio of σ₁ / σ, as kohya's sv_ratio, is 1 / {value:g} here" if name == "ratio" else ""
                wrong.append(f"{name} should be above 0 and at most 1, found {shown(value)}{hint}")
        if wrong:
            raise AdapterError("; ".join(wrong))

    @property
    def everything(self) -> bool:
        """Whether nothing but rounding is lost."""
        return self == Keep()

    @property
    def partly(self) -> bool:
        """Whether the largest singular values and ‖W‖ say all that is to be known."""
        return not self.everything and self.cumulative is None

    def count(self, S: Tensor, square: float, smallest: float) -> int:
        """How many of S `(k)`, in falling order, of a matrix with ‖W‖² = `square`; none below `smallest` · σ₁."""
        counts = [int((smallest * S[0] < S).sum())]
        if self.rank is not None:
            counts.append(self.rank)
        if self.ratio is not None:
            counts.append(int((self.ratio * S[0] <= S).sum()))
        for share in (self.energy, self.frobenius and self.frobenius**2):
            if share:
                counts.append(_first(S.square().cumsum(0), share * square))
        if self.cumulative is not None:
            counts.append(_first(S.cumsum(0), self.cumulative * float(S.sum())))
        return max(1, min(counts))


def _first(sums: Tensor, wanted: float) -> int:
    """The number of terms after which the growing sums reach what is wanted, up to rounding."""
    return int((sums < wanted * (1 - 1e-12)).sum()) + 1


def weighted(terms: Sequence[tuple[float, Matrix]]) -> Matrix:
    """Σ weight · W: thin where all are, its factors beside each other and each weight in the left one."""
    if all(isinstance(W, Thin) for _, W in terms):
        B = torch.cat([(weight * W.B.double()) for weight, W in terms], 1)  # type: ignore[union-attr]
        return Thin(B, torch.cat([W.A.double() for _, W in terms]))  # type: ignore[union-attr]
    return sum(weight * whole(W) for weight, W in terms)  # type: ignore[return-value]


def whole(W: Matrix, dtype: torch.dtype | None = None) -> Tensor:
    """W as `(out, in)`, in its own precision or that of `dtype`."""
    return W.B.to(dtype) @ W.A.to(dtype) if isinstance(W, Thin) else W.to(dtype)


def inner(V: Matrix, W: Matrix) -> float:
    """⟨V, W⟩ = Σ V ⊙ W; of two thin ones it is tr((V_Bᵀ W_B)(W_A V_Aᵀ))."""
    if isinstance(V, Thin) and isinstance(W, Thin):
        return float(((V.B.double().t() @ W.B.double()) * (V.A.double() @ W.A.double().t())).sum())
    if isinstance(W, Thin):
        V, W = W, V
    if isinstance(V, Thin):
        return float((V.B.double() * (whole(W).double() @ V.A.double().t())).sum())
    return float(torch.sum(V * W, dtype=torch.float64))  # type: ignore[arg-type]


def factored(W: Matrix, keep: Keep, dtype: torch.dtype) -> Factored:
    """The best approximation of W by the singular values that are kept, stored in `dtype`.

    Of a thin W by QR of both factors and an SVD of the small core, in fp64. Of a whole one by a random search where
    few singular values are wanted, which falls back to the exact way where it does not come near the best.
    """
    if isinstance(W, Thin) and W.B.shape[1] <= min(len(W.B), W.A.shape[1]):
        return _of_thin(W, keep, dtype)
    D = W.B.double() @ W.A.double() if isinstance(W, Thin) else W
    with alone() if D.numel() < _FEW else nullcontext():
        return _of_whole(D, keep, dtype)


def _of_whole(D: Tensor, keep: Keep, dtype: torch.dtype) -> Factored:
    square = float(torch.sum(D.double().square()))
    least = max(torch.finfo(dtype).eps, max(D.shape) ** 0.5 * torch.finfo(D.dtype).eps)
    U, S = _leading(D, keep, square, least) or _exact(D)  # (out, some), (some)
    k = keep.count(S, square, least)
    root = S[:k].sqrt()
    B = (U[:, :k] * root).to(dtype)  # (out, k)
    A = ((U[:, :k].t() @ D.to(U.dtype)) / torch.where(root > 0, root, 1)[:, None]).to(dtype)  # (k, in)
    rest = torch.addmm(D.to(U.dtype), B.to(U.dtype), A.to(U.dtype), alpha=-1)
    return Factored(B, A, float(torch.sum(rest.double().square())), square)


@contextmanager
def alone() -> Iterator[None]:
    """Inside, torch computes in one thread: on small matrices those that wait for each other take longer than one, and
    on a busy machine twenty times as long.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _of_thin(W: Thin, keep: Keep, dtype: torch.dtype) -> Factored:
    (left, R), (right, L) = torch.linalg.qr(W.B.double()), torch.linalg.qr(W.A.double().t())
    U, S, Vt = torch.linalg.svd(R @ L.t())  # (r, r), (r), (r, r)
    least = len(S) * torch.finfo(torch.float64).eps
    S = torch.where(least * (R.norm(dim=0) * L.norm(dim=0)).sum() < S, S, 0)  # what terms leave that cancel out
    square = float(S.square().sum())
    k = keep.count(S, square, max(torch.finfo(dtype).eps, least))
    root = S[:k].sqrt()
    B, A = left @ (U[:, :k] * root), (root[:, None] * Vt[:k]) @ right.t()
    found = kept(Thin(B, A), dtype)
    return found._replace(lost=float(S[k:].square().sum()) + found.lost, square=square)


def kept(W: Thin, dtype: torch.dtype) -> Factored:
    """The factors as they are, stored in `dtype`: what is lost is their rounding."""
    B, A = W.B.to(dtype), W.A.to(dtype)
    rounding = weighted([(1, Thin(W.B - B, W.A)), (1, Thin(B, W.A - A))])
    return Factored(B, A, max(inner(rounding, rounding), 0.0), inner(W, W))


def _leading(D: Tensor, keep: Keep, square: float, least: float) -> tuple[Tensor, Tensor] | None:
    """The singular vectors and values that are kept, by a search for more and more of them; None where it is no use."""
    r = keep.rank or _FIRST
    while keep.partly and r * _FAR <= min(D.shape) and min(D.shape) > _TINY:
        if (found := _searched(D, r, square)) is None:
            return None
        if keep.rank is not None or keep.count(found[1][:r], square, least) < r:
            return found[0][:, :r], found[1][:r]
        r *= _FAR
    return None


def _exact(D: Tensor) -> tuple[Tensor, Tensor]:
    """All left singular vectors and values: of large matrices by the eigenvalues of D Dᵀ or Dᵀ D in fp64.

    By these, σ is known to the root of their rounding, 10⁻⁷ σ₁ and less, which is beyond an fp32 D; below it is 0.
    """
    wide, X = D.shape[0] <= D.shape[1], D.double()
    if min(D.shape) <= (_SMALL if D.dtype == torch.float64 else _TINY):
        U, S, _ = torch.linalg.svd(X, full_matrices=False)
        return U, S
    values, vectors = torch.linalg.eigh(X @ X.t() if wide else X.t() @ X)
    values, vectors = values.flip(0), vectors.flip(1)
    S = torch.where(values > len(values) * torch.finfo(torch.float64).eps * values[0], values, 0).sqrt()
    return (vectors, S) if wide else (X @ vectors / torch.where(S > 0, S, 1), S)


def _searched(D: Tensor, r: int, square: float) -> tuple[Tensor, Tensor] | None:
    """The first r and some more, found by turns on a random subspace (Halko et al. 2011, arXiv:0909.4061).

    Each turn brings the subspace nearer by a factor, by which is told what is still to come: the search ends when this
    is a small share of the error, and is given up when it takes too long. It always begins from the same numbers.
    """
    wider = min(r + max(10, r // 2), *D.shape)
    generator = torch.Generator(D.device).manual_seed(0)
    start = torch.randn(D.shape[1], wider, generator=generator, device=D.device, dtype=D.dtype)
    Q = torch.linalg.qr(D @ start).Q  # (out, wider)
    before = growth = 0.0
    for turn in range(_MOST_TURNS):
        Q, R = torch.linalg.qr(D @ torch.linalg.qr(D.t() @ Q).Q)
        U, S, _ = torch.linalg.svd(R.double())
        captured = float(S[:r].square().sum())
        last, growth = growth, captured - before
        rate = min(growth / last, 0.99) if turn > 1 and last > 0 else 0.99
        remaining = growth * rate / (1 - rate)
        before = captured
        if turn and remaining <= max(_SLACK * (square - captured), 10 * torch.finfo(D.dtype).eps * square):
            return Q.double() @ U, S
    return None
