"""DoRA (Liu et al. 2024, arXiv:2402.09353), over any method."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.core.update import Factors, Update, own_precision


class Dora(Update):
    """W + ΔW = g ⊙ (W + ΔV) with g = m / ‖W + ΔV‖, row by row: ΔV is the change of `inner`, the magnitude m is learned.
    What ΔV's method does to a bias stays as it is.

    m `(out)` starts as ‖W + ΔV‖, by the same sums as later, so that g is 1 to the bit. The norm counts as a
    constant in the gradient (§4.3). A row that is all zero has g = 1. Dropout acts on ΔV alone where the layer
    rescales its rows (`by_rows`), and on the whole change elsewhere; its expectation is the same.
    """

    file_names: ClassVar = {"magnitude": "lora_magnitude_vector"}
    forms: ClassVar = {"magnitude": "l"}

    def __init__(self, weight: Tensor, inner: Update) -> None:
        super().__init__()
        self.inner = inner
        self.forms = {**inner.forms, **Dora.forms}  # type: ignore[misc]
        self.dropout, self.scale = inner.dropout, inner.scale
        unknown = weight.new_empty(len(weight), dtype=own_precision(weight))
        self.magnitude = nn.Parameter(unknown if weight.is_meta else row_norms(weight, inner))

    def delta(self, weight: Tensor) -> Tensor:
        return self._gain(weight)[:, None] * (weight + self.inner.delta(weight)) - weight

    def by_rows(self, weight: Tensor) -> tuple[Tensor, Factors] | None:
        factors = self.inner.factors()
        if factors is None:
            return None
        gain = self._gain(weight)
        return gain - 1, factors._replace(B=gain[:, None] * factors.B)

    def shift(self, bias: Tensor | None) -> Tensor | None:
        return self.inner.shift(bias)

    def tensors(self) -> dict[str, Tensor]:
        return {**self.inner.tensors(), "magnitude": self.magnitude.detach()}

    def shared_tensors(self) -> dict[str, Tensor]:
        return self.inner.shared_tensors()

    def _gain(self, weight: Tensor) -> Tensor:
        """g `(out)`."""
        norm = row_norms(weight, self.inner)
        return torch.where(norm > 0, self.magnitude / torch.where(norm > 0, norm, 1), 1)


@torch.no_grad()
def row_norms(weight: Tensor, update: Update) -> Tensor:
    """‖W + ΔV‖ `(out)` of the rows, in fp32 at least. For ΔV = s · B A, without either sum as a matrix:
    ‖W‖² + 2 s Σ (W Aᵀ) ⊙ B + s² Σ (B A Aᵀ) ⊙ B.
    """
    W = weight.to(own_precision(weight))
    with torch.autocast(weight.device.type, enabled=False):
        factors = update.factors()
        if factors is None:
            return torch.linalg.vector_norm(W + update.delta(weight), dim=1)
        A, B, scale = factors.A.to(W.dtype), factors.B.to(W.dtype), factors.scale
        cross = ((W @ A.t()) * B).sum(1)
        square = ((B @ (A @ A.t())) * B).sum(1)
        return (W.square().sum(1) + 2 * scale * cross + scale**2 * square).clamp_min(0).sqrt()
