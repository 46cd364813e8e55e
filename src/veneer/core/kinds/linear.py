"""Linear layers: `nn.Linear` and its subclasses, and transformers' `Conv1D`, which is one transposed."""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from veneer.core.fused import Change, fused_linear
from veneer.core.kinds.layer import AdaptedLayer


class AdaptedLinear(AdaptedLayer):
    """y = W x + b + Σ weight · ΔW · drop(x), weight `(out, in)`."""

    linear = True
    bias: Tensor | None

    @classmethod
    def handles(cls, layer: nn.Module) -> bool:
        # nn.MultiheadAttention reads its out_proj's weight and never calls the module: a change of it would not act
        return (
            isinstance(layer, nn.Linear)
            and not isinstance(layer, NonDynamicallyQuantizableLinear)
            and type(layer).forward is nn.Linear.forward
        )

    @staticmethod
    def matrix(weight: Tensor) -> Tensor:
        return weight

    def forward(self, x: Tensor) -> Tensor:
        acting = list(self.adapters.acting())
        if not acting:
            return super().forward(x)
        thin, dense = [], []
        for update, weight in acting:
            dropout = update.dropout if self.training else 0.0
            if factors := update.factors():
                thin.append(Change(factors.A, factors.B, weight * factors.scale, dropout))
            else:
                dense.append((update, weight, dropout))
        matrix = self.matrix(self.weight)
        y = fused_linear(x, matrix, self.bias, thin)
        for update, weight, dropout in dense:
            y = y + F.linear(F.dropout(x, dropout), (weight * update.delta(matrix)).to(y.dtype))
        return y


class AdaptedConv1D(AdaptedLinear):
    """transformers' `Conv1D` (GPT-2): a linear layer whose weight is stored `(in, out)`."""

    @classmethod
    def handles(cls, layer: nn.Module) -> bool:
        return type(layer).__name__ == "Conv1D" and type(layer).__module__ == "transformers.pytorch_utils"

    @staticmethod
    def matrix(weight: Tensor) -> Tensor:
        return weight.t()
