"""DoRA (Liu et al. 2024, arXiv:2402.09353), over any method."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.core.update import Factors, Update, own_precision


class Dora(Update):
    """W + ΔW = g ⊙ (W + ΔV) with g = m / ‖W + ΔV‖, row by row: ΔV is the change of `inner`, the magnitude m is learned.
    What ΔV's method does to a bias stays as it is. With a file's m `(1, n)` it is column by column (LyCORIS's
    `wd_on_out=False`): of a convolution, by its n input channels, each at all places of the kernel.

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
        self.dropout, self.scale, self.columns = inner.dropout, inner.scale, weight.shape[1]
        unknown = weight.new_empty(len(weight), dtype=own_precision(weight))
        self.magnitude = nn.Parameter(unknown if weight.is_meta else row_norms(weight, inner))

    def fit(self, tensors: Mapping[str, Tensor], biased: bool) -> None:
        self.inner.fit(tensors, biased)
        m = tensors.get("magnitude")
        along = m is not None and m.ndim == 2 and len(m) == 1 and m.numel() > 0 and len(self.magnitude) > 1
        if m is not None and along and self.columns % m.numel() == 0:
            self.forms = self.inner.forms  # type: ignore[misc]
            self.magnitude = nn.Parameter(self.magnitude.new_empty(m.shape))

    def delta(self, weight: Tensor) -> Tensor:
        changed = weight + self.inner.delta(weight)
        gain = self._gain(weight)[:, None] if self.magnitude.ndim == 1 else self._gain_of_columns(changed)
        return gain * changed - weight

    def by_rows(self, weight: Tensor) -> tuple[Tensor, Factors] | None:
        factors = self.inner.factors()
        if factors is None or self.magnitude.ndim == 2:
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
        return _ratio(self.magnitude, row_norms(weight, self.inner))

    def _gain_of_columns(self, changed: Tensor) -> Tensor:
        """g `(1, in)` for W + ΔV."""
        channels = changed.detach().unflatten(1, (self.magnitude.shape[1], -1))  # (out, n, kernel)
        norm = torch.linalg.vector_norm(channels, dim=(0, 2))
        return _ratio(self.magnitude, norm).repeat_interleave(channels.shape[2], 1)


def _ratio(magnitude: Tensor, norm: Tensor) -> Tensor:
    """m / ‖…‖, and 1 where there is nothing to rescale."""
    return torch.where(norm > 0, magnitude / torch.where(norm > 0, norm, 1), 1)


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
