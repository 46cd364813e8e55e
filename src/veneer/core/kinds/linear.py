"""Linear layers: `nn.Linear` and its subclasses, and transformers' `Conv1D`, which is one transposed."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from veneer.core.config import LoraConfig
from veneer.core.fused import FEW, Change, few_linear, fused_linear, thin_linear
from veneer.core.kinds.layer import AdaptedLayer, is_plain
from veneer.core.methods import method
from veneer.core.plan import by_row
from veneer.core.ranges import start_of
from veneer.core.start import FROM_WEIGHT
from veneer.core.update import Update


class Dense(NamedTuple):
    """weight · ΔW · drop(x), for a method that gives ΔW only."""

    update: Update
    weight: float
    dropout: float
    rows: Tensor | None  # (rows), in a mixed batch


class AdaptedLinear(AdaptedLayer):
    """y = W x + b + Σ weight · ΔW · drop(x), weight `(out, in)`."""

    linear = True
    bias: Tensor | None

    @classmethod
    def handles(cls, layer: nn.Module) -> bool:
        return isinstance(layer, nn.Linear) and _is_called(layer) and not _runs_itself(layer)

    @staticmethod
    def matrix(weight: Tensor) -> Tensor:
        return weight

    def forward(self, x: Tensor) -> Tensor:
        adapters: Any = self._modules["adapters"]
        matrix = self.matrix(self.weight)
        if not torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
            if (alone := adapters.alone(self.training)) and x.numel() <= FEW * x.shape[-1]:
                return few_linear(x, matrix, self.bias, *alone)
            if (change := adapters.jointly(x)) is not None:
                return F.linear(x, matrix, self.bias).add_(change)
        thin, dense, gains = self._changes(x, matrix)
        if not thin and not dense:
            return super().forward(x)
        y = fused_linear(x, matrix, self.bias, thin, sum(gains[1:], gains[0]) if gains else None)
        return self._with_dense(y, x, dense)

    def _changes(self, x: Tensor, matrix: Tensor | None) -> tuple[list[Change], list[Dense], list[Tensor]]:
        """What acts: products of thin matrices, the rest, and, where the base's `matrix` is given, by how much more
        its rows count: `(1, out)`, in a mixed batch `(rows, out)`.
        """
        thin, dense, gains = [], [], []
        for update, weight, rows in self.adapters.acting_on(x):
            dropout = update.dropout if self.training else 0.0
            factors = update.factors()
            if matrix is not None and (rescaled := update.by_rows(matrix)):
                gains.append(
                    weight * (rescaled.gain if rows is None else rows[:, None] * rescaled.gain).view(-1, len(matrix))
                )
                factors = rescaled.factors
            if factors:
                thin.append(Change(factors.A, factors.B, weight * factors.scale, dropout, rows))
            else:
                dense.append(Dense(update, weight, dropout, rows))
        return thin, dense, gains

    def _with_dense(self, y: Tensor, x: Tensor, dense: list[Dense]) -> Tensor:
        for update, weight, dropout, rows in dense:
            delta = weight * update(self.matrices(self)[""])
            change = F.linear(F.dropout(x, dropout), delta.to(x.dtype)).to(y.dtype)
            y = y + (change if rows is None else by_row(change, rows))
        return y


class AdaptedOwnLinear(AdaptedLinear):
    """A subclass of `nn.Linear` with a forward of its own (Falcon's, say): it runs, and the changes are added.

    So it is with quantised weights: bitsandbytes' `Linear8bitLt` and `Linear4bit`, torchao's tensors.
    Where a weight cannot be read, all that is known of W is its size, and its entries are NaN.
    """

    @classmethod
    def handles(cls, layer: nn.Module) -> bool:
        return isinstance(layer, nn.Linear) and _is_called(layer) and _runs_itself(layer)

    @classmethod
    def quantised(cls, layer: Any, config: LoraConfig) -> str | None:
        from_weight = isinstance(config.init_lora_weights, str) and start_of(config) in FROM_WEIGHT
        reads = config.use_dora or from_weight or method(config.peft_type).reads_weight
        if reads and not _can_be_read(layer.weight):
            return (
                f"whose weight is quantised ({layer.weight.dtype}) and cannot be read, as use_dora, a start from the "
                "weight and some methods want: use LoRA without them"
            )
        return None

    @classmethod
    def matrices(cls, layer: Any) -> dict[str, Tensor]:
        if is_plain(layer.weight):
            return {"": layer.weight}
        if _can_be_read(layer.weight):
            return {"": layer.weight.dequantize()}
        unknown = torch.full((), torch.nan, device=layer.weight.device)
        return {"": unknown.expand(layer.out_features, layer.in_features)}

    def forward(self, x: Tensor) -> Tensor:
        thin, dense, _ = self._changes(x, None)  # its own forward tells nothing about the rows of W x
        y = super(AdaptedLinear, self).forward(x)
        for change in thin:
            y = y + thin_linear(x, change).to(y.dtype)
        return self._with_dense(y, x, dense)


class AdaptedConv1D(AdaptedLinear):
    """transformers' `Conv1D` (GPT-2): a linear layer whose weight is stored `(in, out)`."""

    @classmethod
    def handles(cls, layer: nn.Module) -> bool:
        return type(layer).__name__ == "Conv1D" and type(layer).__module__ == "transformers.pytorch_utils"

    @staticmethod
    def matrix(weight: Tensor) -> Tensor:
        return weight.t()


def _is_called(layer: nn.Linear) -> bool:
    """Whether the layer is called: `nn.MultiheadAttention` only reads its out_proj's weight, so no change would act."""
    return not isinstance(layer, NonDynamicallyQuantizableLinear)


def _runs_itself(layer: nn.Linear) -> bool:
    return type(layer).forward is not nn.Linear.forward or not is_plain(layer.weight)


def _can_be_read(weight: Tensor) -> bool:
    """Whether a quantised weight says itself which matrix it stands for."""
    return type(weight).dequantize is not Tensor.dequantize
