"""The norm and the gated activation by kernels that `torch.compile` makes: one pass forward, one pass backward.

Making them needs a compiler and takes some 10 to 30 seconds, a few where it was done before on the machine; they pay
that back in some hundred steps of 1000 tokens.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.errors import AdapterError
from veneer.train.pieces.gated import Activation, QuickGated
from veneer.train.pieces.norm import QuickNorm
from veneer.train.pieces.piece import Piece


@cache
def compiled(piece: type[Piece]) -> type[Piece]:
    """The same piece by compiled kernels, where there are some."""
    kernels: tuple[Callable[..., Any], Callable[..., Any]]
    if issubclass(piece, QuickNorm):
        kernels = (_norm, _norm_backward)
    elif issubclass(piece, QuickGated):
        kernels = _gated(piece.activation)
    else:
        return piece
    made = tuple(torch.compile(kernel, dynamic=True) for kernel in kernels)
    return type(f"Compiled{piece.__name__}", (piece,), {"kernels": made})


def make_kernels(modules: Iterable[nn.Module]) -> float:
    """Compile for these pieces, in their dtype and on their device; the seconds that it took."""
    began = time.perf_counter()
    for piece in _kinds(modules):
        try:
            for rows in (3, 5):  # so that no kernel is for one number of rows
                _trial(piece, rows, piece.kernels)
        except Exception as error:  # a missing compiler shows as any of many errors
            said = str(error).strip().partition("\n")[0]
            raise AdapterError(
                f"pieces of the model cannot be compiled here: {said}. Train without compiling"
            ) from error
    return time.perf_counter() - began


def saving(modules: Iterable[nn.Module], tokens: int) -> float:
    """The seconds that compiled pieces save in each forward and backward of so many tokens, as measured now."""
    saved = 0.0
    for piece, number in _kinds(modules).items():
        few, one = (min(_trial(piece, tokens, kernels) for _ in range(5)) for kernels in (None, piece.kernels))
        saved += number * (few - one)
    return saved


def _kinds(modules: Iterable[nn.Module]) -> dict[Any, int]:
    """One piece of each kind that was compiled, and how many there are."""
    pieces: list[Any] = [module for module in modules if getattr(type(module), "kernels", None)]
    pieces = [piece for piece in pieces if piece.example.is_floating_point()]
    kinds = [(type(piece), piece.width, piece.example.dtype, piece.example.device) for piece in pieces]
    number = Counter(kinds)
    return {piece: number[kind] for kind, piece in dict(zip(kinds, pieces, strict=True)).items()}


def _trial(piece: Any, rows: int, kernels: Any) -> float:
    """The seconds of a forward and backward."""
    like = {"dtype": piece.example.dtype, "device": piece.example.device}
    inputs = [torch.ones(rows, piece.width, **like).requires_grad_() for _ in range(piece.inputs)]
    direction = torch.ones(rows, piece.width, **like)
    began = time.perf_counter()
    with torch.enable_grad():
        torch.autograd.grad(piece.run(*inputs, kernels), inputs, direction)
    if direction.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - began


def _norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.float()
    rstd = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (wide * rstd * weight).to(x.dtype), rstd


def _norm_backward(grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    normed, h = x.float() * rstd, grad.float() * weight
    return ((h - normed * (h * normed).mean(-1, keepdim=True)) * rstd).to(x.dtype)


def _gated(activation: Activation) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def forward(gate: Tensor, up: Tensor) -> Tensor:
        return activation(gate) * up

    def backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        return activation.backward(grad * up, gate), activation(gate) * grad

    return forward, backward
