"""Attention of diffusers' layers: softmax(q kᵀ · scale) v by the CPU's flash kernel in fp32, also of half precision.

Where products of half precision are slow, the kernel takes half the time in fp32, both ways, and rounds less.
"""

from collections.abc import Callable
from functools import cache
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from veneer.core.fused import is_traced, product_dtype
from veneer.train.pieces.piece import Piece

PLAIN = "AttnProcessor2_0"


class _Flash(torch.autograd.Function):
    """Keeps q, k, v and y as they are, and the logarithms of the softmax's sums."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, own: torch.dtype) -> Tensor:
        y, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q.to(own), k.to(own), v.to(own))
        y = y.to(q.dtype)
        ctx.save_for_backward(q, k, v, y, sums)
        ctx.own = own
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, sums = ctx.saved_tensors
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        wide = [tensor.to(ctx.own) for tensor in (grad, *inputs)]
        return (*(gradient.to(grad.dtype) for gradient in kernel(*wide, sums, 0.0, False)), None)


def attention(query: Tensor, key: Tensor, value: Tensor, **more: Any) -> Tensor:
    """As PyTorch's `scaled_dot_product_attention`, q `(rows, heads, tokens, size)`."""
    asked = any(isinstance(setting, Tensor) or setting for setting in more.values())  # a mask, dropout, a scale, …
    alike = query.dtype == key.dtype == value.dtype and query.ndim == key.ndim == value.ndim == 4
    sizes = alike and query.shape[-1] == value.shape[-1] and query.shape[:2] == key.shape[:2] == value.shape[:2]
    if not asked and sizes and query.numel() and not torch.is_autocast_enabled(query.device.type):
        own = product_dtype(query.reshape(-1, query.shape[-1]))
        if own != query.dtype:
            return _Flash.apply(query, key, value, own)
    return F.scaled_dot_product_attention(query, key, value, **more)


@cache
def _quick(call: FunctionType) -> Callable[..., Tensor]:
    """The same function, to which `F` means other attention."""
    functions = SimpleNamespace(**{**vars(F), "scaled_dot_product_attention": attention})
    quick = FunctionType(call.__code__, {**call.__globals__, "F": functions}, call.__name__, call.__defaults__)
    quick.__kwdefaults__ = call.__kwdefaults__
    return quick


class QuickAttention(Piece):
    """An attention layer of diffusers, as long as its processor is the plain one."""

    processor: Any

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        processor, others = self.processor, {name: value for name, value in kwargs.items() if value is not None}
        usual = _is_plain(processor) and not args and others.keys() <= {"encoder_hidden_states", "attention_mask"}
        if not usual or is_traced():
            return self.own(hidden_states, *args, **kwargs)
        return _quick(type(processor).__call__)(processor, self, hidden_states, **others)


def _is_plain(processor: Any) -> bool:
    cls = type(processor)
    return cls.__name__ == PLAIN and cls.__module__.startswith("diffusers.")


def quick_attention(module: nn.Module) -> type[Piece] | None:
    """What can take the module's place, if it is such a layer."""
    cls = type(module)
    known = cls.__name__ == "Attention" and cls.__module__ == "diffusers.models.attention_processor"
    return QuickAttention if known and _is_plain(getattr(module, "processor", None)) else None
