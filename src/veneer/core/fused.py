"""The fast forward of an adapted linear layer: one autograd function, whatever the number of adapters."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class Change(NamedTuple):
    """scale · B A · drop(x): one adapter's part of the output."""

    A: Tensor  # (r, in)
    B: Tensor  # (out, r)
    scale: float
    dropout: float  # probability that an input is dropped; 0 outside training


def fused_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, changes: Sequence[Change], gain: Tensor | None = None
) -> Tensor:
    """y = W x + b + gain ⊙ W x + Σ scale · B A · drop(x), computed in x's dtype whatever that of A, B and gain.

    x `(..., in)`, weight `(out, in)`, bias, gain `(out)` → `(..., out)`; a gain of 0 leaves W x + b to the bit. Of the
    activations, only x itself and the rank-sized `A x` are kept for the backward (and one byte an input where there
    is dropout). Under autocast the product is computed in autocast's dtype, as the plain layer's is.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    masks = [_mask(x, change.dropout) for change in changes]
    scales = [change.scale / (1 - change.dropout) for change in changes]
    factors = [factor for change in changes for factor in (change.A, change.B)]
    return _FusedLinear.apply(x, weight, bias, gain, scales, masks, *factors)


def thin_linear(x: Tensor, change: Change) -> Tensor:
    """scale · B A · drop(x) alone, for a layer whose own forward gives the rest."""
    h = F.linear(F.dropout(x, change.dropout), change.A.to(x.dtype))  # (..., r)
    return F.linear(h, change.B.to(x.dtype)) * change.scale


def _mask(x: Tensor, dropout: float) -> Tensor | None:
    """Which inputs are kept, one byte each, in x's flat shape."""
    if dropout == 0:
        return None
    kept = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - dropout)
    return kept.view(-1, x.shape[-1])


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gain: Tensor | None,
        scales: list[float],
        masks: list[Tensor | None],
        *factors: Tensor,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])  # (tokens, in)
        y = F.linear(flat, weight, bias)  # (tokens, out)
        if gain is not None:
            y = torch.addcmul(y, y if bias is None else y - bias, gain.to(x.dtype))
        kept: list[Tensor | None] = []
        for A, B, scale, mask in zip(factors[::2], factors[1::2], scales, masks, strict=True):
            A, B = A.to(x.dtype), B.to(x.dtype)
            h = (flat if mask is None else flat * mask) @ A.t()  # (tokens, r)
            y.addmm_(h, B.t(), alpha=scale)
            kept += [A, B, h, mask]
        ctx.save_for_backward(flat, weight, gain, *kept)
        ctx.shape, ctx.scales, ctx.dtypes = x.shape, scales, [factor.dtype for factor in factors]
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat, weight, gain, *kept = ctx.saved_tensors
        need_x, need_weight, need_bias, need_gain, _, _, *need_factors = ctx.needs_input_grad
        grad = grad.reshape(-1, grad.shape[-1])  # (tokens, out)
        through = grad if gain is None else grad * (1 + gain).to(grad.dtype)  # what reaches W x
        dx = through @ weight if need_x else None  # (tokens, in)
        dfactors: list[Tensor | None] = []
        for i, scale in enumerate(ctx.scales):
            A, B, h, mask = kept[4 * i : 4 * i + 4]
            need_A, need_B = need_factors[2 * i : 2 * i + 2]
            dB = (grad.t() @ h).mul_(scale).to(ctx.dtypes[2 * i + 1]) if need_B else None
            dh = (grad @ B).mul_(scale) if need_A or need_x else None  # (tokens, r)
            dA = None
            if need_A and dh is not None:
                dA = (dh.t() @ (flat if mask is None else flat * mask)).to(ctx.dtypes[2 * i])
            if dx is not None and dh is not None:
                dx = dx.addmm_(dh, A) if mask is None else dx.add_((dh @ A).mul_(mask))
            dfactors += [dA, dB]
        dweight = through.t() @ flat if need_weight else None
        dbias = grad.sum(0) if need_bias else None
        # W x is made again: keeping it would cost as much memory as all the rest of the layer
        dgain = (grad * (flat @ weight.t())).sum(0, dtype=gain.dtype) if need_gain else None
        return (None if dx is None else dx.view(ctx.shape), dweight, dbias, dgain, None, None, *dfactors)
