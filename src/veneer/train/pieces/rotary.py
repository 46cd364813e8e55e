"""Rotary positions (Su et al. 2021, arXiv:2104.09864): y = x ⊙ cos + turned(x) ⊙ sin, turned(x₁, x₂) = (-x₂, x₁).

Attention layers find the function that does it among the globals of their module. Here a layer's own forward runs with
other globals, and the module keeps its own: other models of the process see nothing.
"""

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from veneer.core.fused import is_traced
from veneer.core.reclass import base_of
from veneer.train.pieces.piece import ROWS, Piece, agrees, samples

NAME = "apply_rotary_pos_emb"


def _turned(x: Tensor, cos: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """(x₁ ⊙ cos₁ - x₂ ⊙ first, x₂ ⊙ cos₂ + x₁ ⊙ second), x `(rows, heads, tokens, head)`."""
    half = x.shape[-1] // 2
    y = x * cos
    y[..., :half].addcmul_(x[..., half:], first, value=-1)
    y[..., half:].addcmul_(x[..., :half], second)
    return y


class _Rotary(torch.autograd.Function):
    """Of a query and a key; keeps nothing of them."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        first, second = sin.chunk(2, -1)
        return _turned(q, cos, first, second), _turned(k, cos, first, second)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        first, second = sin.neg().chunk(2, -1)
        return _turned(dq, cos, second, first), _turned(dk, cos, second, first), None, None


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q and k `(rows, heads, tokens, head)`, cos and sin `(rows, tokens, head)` without a gradient."""
    return _Rotary.apply(q, k, cos.unsqueeze(1), sin.unsqueeze(1))


def _quick(own: Callable[..., Any]) -> Callable[..., Any]:
    def either(*args: Any, **kwargs: Any) -> Any:
        usual = len(args) == 4 and not kwargs and all(isinstance(tensor, Tensor) for tensor in args)
        return rotary(*args) if usual and _fit(*args) else own(*args, **kwargs)

    return either


def _fit(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    sized = q.ndim == k.ndim == 4 and cos.ndim == 3 and cos.shape == sin.shape and cos.shape[-1] % 2 == 0
    alike = {q.dtype, k.dtype, cos.dtype, sin.dtype} == {q.dtype}
    return sized and alike and q.shape[-1] == k.shape[-1] == cos.shape[-1] and not cos.requires_grad


@cache
def _is_rotary(function: Callable[..., Any]) -> bool:
    q, cos, sin = samples(ROWS, 2, 3, 8, dtype=torch.float64, number=3)
    cos, sin = cos[:, 0], sin[:, 0]
    return agrees(lambda q, k: function(q, k, cos, sin), lambda q, k: rotary(q, k, cos, sin), [q, q[:, :1].flip(2)])


def _own_rotary(forward: Any) -> Callable[..., Any] | None:
    """The function that this forward calls, if it does what it is called."""
    named = isinstance(forward, FunctionType) and NAME in forward.__code__.co_names
    found = forward.__globals__.get(NAME) if named else None
    return found if callable(found) and _is_rotary(found) else None


class QuickRotary(Piece):
    """An attention layer: its own forward, with a quick rotary among its globals."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        forward: Any = base_of(self).forward
        rotary = None if is_traced() else _own_rotary(forward)
        if rotary is None:
            return forward(self, *args, **kwargs)
        seen = {**forward.__globals__, NAME: _quick(rotary)}
        quick = FunctionType(forward.__code__, seen, forward.__name__, forward.__defaults__, forward.__closure__)
        quick.__kwdefaults__ = forward.__kwdefaults__
        return quick(self, *args, **kwargs)


def quick_rotary(module: nn.Module) -> type[Piece] | None:
    """What can take the module's place, if it calls such a function."""
    return None if _own_rotary(type(module).forward) is None else QuickRotary
