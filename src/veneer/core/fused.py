"""The fast forward of an adapted linear layer: one autograd function, whatever the number of adapters."""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.core.plan import by_row

FEW = 64  # tokens, which take less time than to round A and B
MANY = 512  # tokens, whose product with a weight is as fast by rows as by columns
BLOCK = 2**19  # numbers in fp32 that stay in the cache
# half precision, and by what a CPU is quick at it
HALF = {torch.bfloat16: ("amx_bf16", "avx512_bf16"), torch.float16: ("amx_fp16", "avx512_fp16")}


class Change(NamedTuple):
    """scale · B A · drop(x): one adapter's part of the output."""

    A: Tensor  # (r, in)
    B: Tensor  # (out, r)
    scale: float
    dropout: float  # probability that an input is dropped; 0 outside training
    rows: Tensor | None = None  # (rows), in a mixed batch: what each row's part is multiplied by


def product_dtype(x: Tensor) -> torch.dtype:
    """What a product of many rows is computed in: x's dtype, but fp32 for bf16 and fp16 on a CPU that is slow at them.

    There, such products take at least twice as long as those of the same numbers in fp32, and round more.
    """
    slow = x.dtype in HALF and x.device.type == "cpu" and 2 * len(x) >= FEW and not is_quick(x.dtype)
    return torch.float32 if slow else x.dtype


@cache
def is_quick(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of that half precision faster than those of fp32."""
    told: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(told.get(unit) for unit in HALF[dtype])


def wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """W x + b in the dtype of x `(rows, in)`, whatever that of W `(out, in)` and b; without gradients where it differs.

    Of another dtype, W is cast by blocks of rows, for which one memory is enough: the cast of a whole layer's weight
    takes longer than the product of a few hundred rows, most of it to get the memory. Their y lies by columns.
    """
    if weight.dtype == x.dtype:
        return F.linear(x, weight, bias)
    by_columns = len(x) < MANY
    x = x.t().contiguous().t() if by_columns else x
    y = x.new_empty(len(weight), len(x)).t() if by_columns else x.new_empty(len(x), len(weight))
    for rows, block in _blocks(weight, x.dtype):
        torch.mm(x, block.t(), out=y[:, rows])
    return y if bias is None else y.add_(bias)


def wide_product(x: Tensor, weight: Tensor) -> Tensor:
    """x W in the dtype of x `(rows, out)`, W cast as in `wide_linear`; `(rows, in)`."""
    if weight.dtype == x.dtype:
        return x @ weight
    by_columns = x.stride(0) == 1  # as x is, so is y
    y = x.new_zeros(weight.shape[1], len(x)).t() if by_columns else x.new_zeros(len(x), weight.shape[1])
    for rows, block in _blocks(weight, x.dtype):
        y.addmm_(x[:, rows], block)
    return y


def _blocks(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Some rows of the weight after others, in this dtype; each is in the place of the one before."""
    rows = min(len(weight), max(FEW, BLOCK // weight.shape[1]))
    block = torch.empty_like(weight[:rows], dtype=dtype)
    for start in range(0, len(weight), rows):
        own = weight[start : start + rows]
        yield slice(start, start + rows), block[: len(own)].copy_(own)


def is_traced() -> bool:
    """Whether a compiler or `torch.func` makes something else of the operations: then they are plain ones.

    Inductor (torch 2.13) loses the alpha of `add`.
    """
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def fused_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, changes: Sequence[Change], gain: Tensor | None = None
) -> Tensor:
    """y = W x + b + gain ⊙ W x + Σ scale · B A · drop(x), computed in x's dtype whatever that of A, B and gain.

    x `(..., in)`, weight `(out, in)`, bias `(out)`, gain `(1, out)` or, in a mixed batch, `(rows, out)` → `(..., out)`;
    a gain of 0 leaves W x + b to the bit. Of the activations, only x itself and the rank-sized `A x` are kept for the
    backward: what dropout kept is found again. Under autocast the product is computed in autocast's
    dtype, as the plain layer's is.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return fused_linear(x, weight, bias, changes, gain)
    if is_traced():
        return sum((thin_linear(x, change) for change in changes), _base_linear(x, weight, bias, gain))
    flat = x.reshape(-1, x.shape[-1])  # (tokens, in)
    if torch.is_grad_enabled():
        masks = [_mask(change.dropout) for change in changes]
        scales = [change.scale / (1 - change.dropout) for change in changes]
        rows = [None if change.rows is None else change.rows.to(x.dtype) for change in changes]
        factors = [factor for change in changes for factor in (change.A, change.B)]
        y = _FusedLinear.apply(flat, weight, bias, gain, scales, masks, rows, *factors)
    else:
        y = _plain_linear(flat, weight, bias, changes, gain)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], weight.shape[0])


def _plain_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, changes: Sequence[Change], gain: Tensor | None
) -> Tensor:
    """`fused_linear` without gradients, x `(tokens, in)`."""
    y = _base_linear(x, weight, bias, gain)
    for A, B, scale, dropout, rows in changes:
        few, mask = len(x) <= FEW, _mask(dropout)
        A, B = (A, B) if few else (A.to(x.dtype), B.to(x.dtype))
        h = torch.mm((x if mask is None else mask(x).mul_(x)).to(A.dtype), A.t())  # (tokens, r)
        scale = scale / (1 - dropout)
        h = h if rows is None else by_row(h, rows)
        y = y.add_(torch.mm(h, B.t()), alpha=scale) if few else y.addmm_(h, B.t(), alpha=scale)
    return y


def _base_linear(x: Tensor, weight: Tensor, bias: Tensor | None, gain: Tensor | None) -> Tensor:
    y = wide_linear(x, weight, bias)
    return y if gain is None else y + by_row(y if bias is None else y - bias, gain.to(x.dtype))


def few_linear(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """The same for what is asked most: one adapter, one token. Python's own time counts here."""
    return F.linear(x, weight, bias).add_(F.linear(F.linear(x.to(A.dtype), A), B), alpha=scale)


def thin_linear(x: Tensor, change: Change) -> Tensor:
    """scale · B A · drop(x) alone, for a layer whose own forward gives the rest."""
    h = F.linear(F.dropout(x, change.dropout), change.A.to(x.dtype))  # (..., r)
    if change.rows is not None:
        h = by_row(h, change.rows)
    return F.linear(h, change.B.to(x.dtype)) * change.scale


class Mask(NamedTuple):
    """Which inputs are kept: made from its seed whenever it is asked for, so that nothing is held for the backward."""

    seed: int
    dropout: float

    def __call__(self, x: Tensor) -> Tensor:
        """1 where an input is kept, else 0, in x's shape and dtype."""
        generator, kept = torch.Generator(x.device).manual_seed(self.seed), torch.empty_like(x)
        bound, rest = divmod(256 * self.dropout, 1)
        if x.device.type != "cpu" or bound == 255:
            return kept.bernoulli_(1 - self.dropout, generator=generator)
        # eight bytes for a draw, a sixth of the time; the seed rounds the bound, so that each is kept with 1 - dropout
        bound += self.seed % 2**16 < rest * 2**16
        draws = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None, generator=generator)
        return torch.ge(draws.view(torch.uint8)[: x.numel()].view(x.shape), int(bound), out=kept)


def _mask(dropout: float) -> Mask | None:
    return None if dropout == 0 else Mask(int(torch.randint(2**62, ())), dropout)


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gain: Tensor | None,
        scales: list[float],
        masks: list[Mask | None],
        rows: list[Tensor | None],
        *factors: Tensor,
    ) -> Tensor:
        own = product_dtype(x)
        wide = x.to(own)
        y = _base_linear(wide, weight, bias, gain)  # (tokens, out)
        kept: list[Tensor | None] = []
        for A, B, scale, mask, row in zip(factors[::2], factors[1::2], scales, masks, rows, strict=True):
            A, B = A.to(own), B.to(own)
            h = (wide if mask is None else mask(wide).mul_(wide)) @ A.t()  # (tokens, r)
            h = h if row is None else by_row(h, row)
            y.addmm_(h, B.t(), alpha=scale)
            kept += [A, B, h, row]
        ctx.save_for_backward(x, weight, gain, *kept)
        ctx.masks, ctx.scales, ctx.dtypes = masks, scales, [factor.dtype for factor in factors]
        ctx.base = (weight.dtype, None if bias is None else bias.dtype)
        return y.to(x.dtype, memory_format=torch.contiguous_format)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad.device.type, enabled=False):
            return _FusedLinear.gradients(ctx, grad)

    @staticmethod
    def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, gain, *kept = ctx.saved_tensors
        need_x, need_weight, need_bias, need_gain, _, _, _, *need_factors = ctx.needs_input_grad
        dtype, own = x.dtype, product_dtype(x)
        x, grad = x.to(own), grad.to(own)
        through = grad if gain is None else by_row(grad, (1 + gain).to(own))  # what reaches W x
        dx = wide_product(through, weight) if need_x else None  # (tokens, in)
        dfactors: list[Tensor | None] = []
        for i, scale in enumerate(ctx.scales):
            A, B, h, row = kept[4 * i : 4 * i + 4]
            mask = None if ctx.masks[i] is None else ctx.masks[i](x)
            need_A, need_B = need_factors[2 * i : 2 * i + 2]
            dB = (h.t() @ grad).mul_(scale).t().to(ctx.dtypes[2 * i + 1]) if need_B else None
            dh = (grad @ B).mul_(scale) if need_A or need_x else None  # (tokens, r)
            dh = dh if dh is None or row is None else by_row(dh, row)
            dA = None
            if need_A and dh is not None:
                dA = (dh.t() @ (x if mask is None else x * mask)).to(ctx.dtypes[2 * i])
            if dx is not None and dh is not None:
                dx = dx.addmm_(dh, A) if mask is None else dx.add_((dh @ A).mul_(mask))
            dfactors += [dA, dB]
        dweight = (through.t() @ x).to(ctx.base[0]) if need_weight else None
        dbias = grad.sum(0).to(ctx.base[1]) if need_bias else None
        dgain = None
        if need_gain:  # W x is made again: keeping it would cost as much memory as all the rest of the layer
            each = (grad * wide_linear(x, weight)).view(len(gain), -1, len(weight))
            dgain = each.sum(1, dtype=gain.dtype)  # (rows, out)
        return (None if dx is None else dx.to(dtype), dweight, dbias, dgain, None, None, None, *dfactors)
