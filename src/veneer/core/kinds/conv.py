"""Convolutions: `nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`."""

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from veneer.core.kinds.dense import AdaptedDense
from veneer.core.kinds.layer import AdaptedLayer
from veneer.core.plan import by_row

_KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONVOLVE = (F.conv1d, F.conv2d, F.conv3d)


class AdaptedConv(AdaptedLayer):
    """y = W ∗ x + b + Σ weight · (ΔW ∗ drop(x) + Δb), where W `(out, in / groups · kernel)` is the kernel, flattened.

    ΔW = scale · B A is two convolutions: A's is like the base's (stride, padding and its mode, dilation) into r
    channels, B's goes from there point by point. With groups, ΔW is one convolution like the base's.
    """

    biased = True
    groups: int
    _conv_forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    @classmethod
    def handles(cls, layer: nn.Module) -> bool:
        plain = next((kind for kind in _KINDS if isinstance(layer, kind)), None)
        own: Any = type(layer)
        return plain is not None and (own.forward, own._conv_forward) == (plain.forward, plain._conv_forward)

    @staticmethod
    def matrix(weight: Tensor) -> Tensor:
        return weight.flatten(1)

    @classmethod
    def values(cls, layer: Any, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"weight": matrices[""].view(layer.weight.shape)} if matrices else {}

    @classmethod
    def filed(cls, layer: Any, form: str, tensor: Tensor) -> Tensor:
        """PEFT's files hold A as a kernel `(r, in, *kernel)`, B and what scales rows as those of a single point."""
        shape = layer.weight.shape
        if form == "A" or (form == "l" and tensor.shape[1:].numel() > 1):
            return tensor.view(-1, *shape[1:])
        point = [1 for _ in shape[2:]]
        if form == "l":
            return tensor.view(1, -1, *point)
        return tensor.view(*tensor.shape, *point) if form == "B" else tensor

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        (x,) = *inputs, *named.values()  # by whatever name the base calls it
        y = super().forward(x)
        for update, weight, rows in self.adapters.acting_on(y):
            dropped = F.dropout(x, update.dropout, self.training)
            shift = update.bias_change(self.bias)
            shift = None if shift is None else (weight * shift).to(y.dtype)
            if self.groups == 1 and (factors := update.factors()):
                A, B = factors.A.to(y.dtype), factors.B.to(y.dtype)
                h = self._conv_forward(dropped, A.view(-1, *self.weight.shape[1:]), None)  # (..., r, *places)
                point = B.view(*B.shape, *(1 for _ in self.weight.shape[2:])) * (weight * factors.scale)
                change = _CONVOLVE[self.weight.ndim - 3](h, point, shift)
            else:
                delta = weight * update(self.matrix(self.weight))
                change = self._conv_forward(dropped, delta.view_as(self.weight).to(y.dtype), shift)
            y = y + (change if rows is None else by_row(change, rows)).to(y.dtype)
        return y


class AdaptedOwnConv(AdaptedDense, AdaptedConv):
    """A subclass with a forward of its own (a standardised kernel, say): it runs on the kernel W + Σ weight · ΔW."""

    @classmethod
    def handles(cls, layer: nn.Module) -> bool:
        return isinstance(layer, _KINDS)
