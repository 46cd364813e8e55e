"""Lookup tables: `nn.Embedding`, and its subclasses that do more than look up."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.core.config import LoraConfig
from veneer.core.kinds.dense import AdaptedDense
from veneer.core.kinds.layer import AdaptedLayer
from veneer.core.plan import by_row
from veneer.core.update import Update


class AdaptedEmbedding(AdaptedLayer):
    """y = W[:, x] + Σ weight · ΔW[:, x], where W `(dim, num)` is the table transposed: a linear layer of one-hot x.

    An input of the change is a token, so dropout drops the change of whole tokens. A padding token keeps its
    row's change and gives no gradient, to none of the factors. The change's gradient is dense, also where the
    table's is sparse. Subclasses that scale what they look up (Gemma's, Bart's) scale the change likewise.
    """

    padding_idx: int | None
    embed_scale: Tensor | float

    @classmethod
    def handles(cls, layer: nn.Module) -> bool:
        return isinstance(layer, nn.Embedding) and (type(layer).forward is nn.Embedding.forward or _is_scaled(layer))

    @classmethod
    def refusal(cls, layer: nn.Module, config: LoraConfig) -> str | None:
        if getattr(layer, "max_norm", None) is not None:
            return f"with max_norm={layer.max_norm}, which rewrites its own table at each forward"
        if getattr(layer, "scale_grad_by_freq", False):
            return "with scale_grad_by_freq, which says nothing about the gradient of two factors"
        return super().refusal(layer, config)

    @staticmethod
    def matrix(weight: Tensor) -> Tensor:
        return weight.t()

    @classmethod
    @torch.no_grad()
    def start(cls, update: Update, how: bool | str) -> None:
        """A = 0, B normal (loralib's): by A's usual start, in ±1/√num, a large table would hardly learn."""
        factors = update.factors()
        if factors and isinstance(factors.A, nn.Parameter) and factors.A.requires_grad and how in (True, "gaussian"):
            nn.init.zeros_(factors.A)
            nn.init.normal_(factors.B)

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        (x,) = *inputs, *named.values()  # by whatever name the base calls it
        y = super().forward(x)
        for update, weight, rows in self.adapters.acting_on(y):
            if factors := update.factors():
                h = F.embedding(x, factors.A.t()).to(y.dtype)  # (..., r)
                change = F.linear(h, factors.B.to(y.dtype)) * (weight * factors.scale)
            elif few := update.few(self.matrix(self.weight)):
                change = weight * few.at(x)
            else:
                change = F.embedding(x, weight * update(self.matrix(self.weight)).t())
            change = change if rows is None else by_row(change, rows)
            y = (y + self._kept(change, x, update.dropout)).to(y.dtype)  # rounded once
        return y

    def _kept(self, change: Tensor, x: Tensor, dropout: float) -> Tensor:
        """The change `(..., dim)` as it is added: scaled like the table, dropped in training, padding detached."""
        if _is_scaled(self):
            scale = self.embed_scale  # rounded as the subclass rounds it, so that merged is live
            change = change * (scale.to(self.weight.dtype) if isinstance(scale, Tensor) else scale)
        if self.padding_idx is not None:
            change = torch.where((x == self.padding_idx).unsqueeze(-1), change.detach(), change)
        if dropout and self.training:
            change = change * F.dropout(change.new_ones(x.shape), dropout).unsqueeze(-1)
        return change


class AdaptedOwnEmbedding(AdaptedDense, AdaptedEmbedding):
    """A subclass with a forward of its own (learned positions, say): it runs on the table W + Σ weight · ΔW."""

    @classmethod
    def handles(cls, layer: nn.Module) -> bool:
        return isinstance(layer, nn.Embedding)


def _is_scaled(layer: nn.Module) -> bool:
    """Whether all that the subclass adds is a factor, which transformers' classes of that name have."""
    return type(layer).__name__.endswith("ScaledWordEmbedding") and hasattr(layer, "embed_scale")
