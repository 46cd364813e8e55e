"""Linear layers: `nn.Linear` and its subclasses, and transformers' `Conv1D`, which is one transposed."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from veneer.core.config import LoraConfig
from veneer.core.fused import FEW, Change, few_linear, fused_linear, is_traced, thin_linear
from veneer.core.kinds.layer import AdaptedLayer, is_plain
from veneer.core.plan import by_row
from veneer.core.ranges import start_of
from veneer.core.start import FROM_WEIGHT
from veneer.core.update import Update

# weight · ΔW · drop(x) of a method that gives no thin matrices; the last are the weights of a mixed batch's rows
Dense = tuple[Update, float, float, Tensor | None]


class AdaptedLinear(AdaptedLayer):
    """y = W x + b + Σ weight · (ΔW · drop(x) + Δb), weight `(out, in)`."""

    linear = biased = True

    @classmethod
    def handles(cls, layer: nn.Module) -> bool:
        return isinstance(layer, nn.Linear) and _is_called(layer) and not _runs_itself(layer)

    @staticmethod
    def matrix(weight: Tensor) -> Tensor:
        return weight

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        (x,) = *inputs, *named.values()  # by whatever name the base calls it
        if not torch.is_grad_enabled() and not is_traced() and (y := self._without_gradients(x)) is not None:
            return y
        matrix, bias = self.matrix(self.weight), self.bias
        thin, dense, gains, shifts = self._changes(x, matrix, bias)
        if not thin and not dense and not gains:
            return super().forward(x)
        y = fused_linear(x, matrix, bias, thin, sum(gains[1:], gains[0]) if gains else None)
        for shift in shifts:
            y = (y.reshape(len(shift), -1, len(matrix)) + shift.unsqueeze(1).to(y.dtype)).view(y.shape)
        return self._with_dense(y, x, dense)

    def _without_gradients(self, x: Tensor) -> Tensor | None:
        """The same for what is served: one adapter on few tokens, or a mixed batch; None where it is something else."""
        adapters: Any = self._modules["adapters"]
        own: Any = self._parameters
        try:
            weight, bias = own["weight"], own["bias"]  # `__getattr__` takes a microsecond
        except KeyError:  # parametrised
            weight, bias = self.weight, self.bias
        if x.numel() <= FEW * x.shape[-1] and (alone := adapters.alone(self.training)):
            return few_linear(x, self.matrix(weight), bias, *alone)
        change = adapters.jointly(x, self.training)
        return None if change is None else F.linear(x, self.matrix(weight), bias).add_(change)

    def _changes(
        self, x: Tensor, matrix: Tensor | None, bias: Tensor | None
    ) -> tuple[list[Change], list[Dense], list[Tensor], list[Tensor]]:
        """What acts: products of thin matrices; the rest; where the base's `matrix` is given, by how much more its
        rows count; what is added to the `bias`. The last two are `(1, out)`, in a mixed batch `(rows, out)`.
        """
        thin, dense, gains, shifts = [], [], [], []
        for update, weight, rows in self.adapters.acting_on(x):
            dropout = update.dropout if self.training else 0.0
            factors = update.factors()
            rescaled = None if matrix is None else update.by_rows(matrix)
            if rescaled:
                gain, factors = rescaled
                gains.append(_weighted(gain, weight, rows))
            if (shift := update.bias_change(bias)) is not None:
                shifts.append(_weighted(shift, weight, rows))
            if factors:
                thin.append(Change(factors.A, factors.B, weight * factors.scale, dropout, rows))
            elif not rescaled:
                dense.append((update, weight, dropout, rows))
        return thin, dense, gains, shifts

    def _with_dense(self, y: Tensor, x: Tensor, dense: list[Dense]) -> Tensor:
        for update, weight, dropout, rows in dense:
            matrix, columns, dropped = self.matrices(self)[""], update.by_columns(), F.dropout(x, dropout)
            if few := update.few(matrix):
                change = F.linear(dropped, (weight * few.values).to(x.dtype)).to(y.dtype)
                y = y.index_add(-1, few.ids, change if rows is None else by_row(change, rows))
                continue
            if columns is None:
                change = F.linear(dropped, (weight * update(matrix)).to(x.dtype)).to(y.dtype)
            else:
                change = F.linear(dropped * (weight * columns).to(x.dtype), matrix).to(y.dtype)
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
        reads = config.use_dora or from_weight or config.method.reads_weight
        if reads and not _can_be_read(layer.weight):
            return (
                f"whose weight is quantised ({layer.weight.dtype}) and cannot be read, as use_dora, a start from the "
                "weight and some methods want: use LoRA without them"
            )
        if layer.bias is None and config.method.shifts(config):
            return "whose weight is quantised and which has no bias, as a change of biases wants there: set it off"
        return None

    @classmethod
    def matrices(cls, layer: Any) -> dict[str, Tensor]:
        if is_plain(layer.weight):
            return {"": layer.weight}
        if _can_be_read(layer.weight):
            return {"": layer.weight.dequantize()}
        unknown = torch.full((), torch.nan, device=layer.weight.device)
        return {"": unknown.expand(layer.out_features, layer.in_features)}

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        (x,) = *inputs, *named.values()  # by whatever name the base calls it
        # its own forward tells nothing about the rows of W x, nor about what it does with b
        thin, dense, _, shifts = self._changes(x, None, self.bias)
        y = self.own_forward(self.shifted() if shifts else {}, x)
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


def _weighted(value: Tensor, weight: float, rows: Tensor | None) -> Tensor:
    """`(1, out)`, or in a mixed batch `(rows, out)`, for a value `(out)`."""
    return weight * (value.unsqueeze(0) if rows is None else rows[:, None] * value)


def _is_called(layer: nn.Linear) -> bool:
    """Whether the layer is called: `nn.MultiheadAttention` only reads its out_proj's weight, so no change would act."""
    return not isinstance(layer, NonDynamicallyQuantizableLinear)


def _runs_itself(layer: nn.Linear) -> bool:
    return type(layer).forward is not nn.Linear.forward or not is_plain(layer.weight)


def _can_be_read(weight: Tensor) -> bool:
    """Whether a quantised weight says itself which matrix it stands for."""
    return type(weight).dequantize is not Tensor.dequantize
