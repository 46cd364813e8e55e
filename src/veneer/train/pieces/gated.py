"""The gated activation of a feed-forward layer (Shazeer 2020, arXiv:2002.05202): a(W_gate x) ⊙ W_up x."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from veneer.core.fused import is_traced
from veneer.train.pieces.piece import ROWS, Piece, StandIn, agrees, samples

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Activation:
    """a(x), and a′(x) ⊙ grad, by PyTorch's own kernels."""

    name: str
    options: dict[str, str] = field(default_factory=dict)

    def __call__(self, x: Tensor) -> Tensor:
        return getattr(F, self.name)(x, **self.options)

    def backward(self, grad: Tensor, x: Tensor, **into: Tensor) -> Tensor:
        """a′(x) ⊙ grad; `grad_input=grad` puts it in the place of grad."""
        kernels = getattr(torch.ops.aten, f"{self.name}_backward")
        return (kernels.grad_input if into else kernels.default)(grad, x, **self.options, **into)


ACTIVATIONS = {
    "Silu": Activation("silu"),
    "Gelu": Activation("gelu"),
    "GeluTanh": Activation("gelu", {"approximate": "tanh"}),
}


class _Gated(torch.autograd.Function):
    """Keeps gate and up alone; a(gate) is made again."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation, kernels: Any) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation, ctx.kernels = activation, kernels
        return kernels[0](gate.detach(), up.detach()) if kernels else activation(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        if ctx.kernels:
            return (*ctx.kernels[1](grad.data, gate.detach(), up.detach()), None, None)
        dup = ctx.activation(gate).mul_(grad) if ctx.needs_input_grad[1] else None
        dgate = None
        if ctx.needs_input_grad[0]:
            dgate = ctx.activation.backward(product := grad * up, gate, grad_input=product)
        return dgate, dup, None, None


def gated(gate: Tensor, up: Tensor, activation: Activation, kernels: Any = None) -> Tensor:
    """a(gate) ⊙ up."""
    if gate.dtype != up.dtype or gate.shape != up.shape:
        return activation(gate) * up
    flat = [x.reshape(-1, x.shape[-1]) for x in (gate, up)] if kernels else (gate, up)
    return _Gated.apply(*flat, activation, kernels).view(gate.shape)


class QuickGated(Piece):
    """A feed-forward layer W_down (a(W_gate x) ⊙ W_up x), its projections called as modules."""

    activation: ClassVar[Activation]
    kernels: ClassVar[Any] = None  # compiled ones, of the forward and of the backward
    inputs: ClassVar[int] = 2
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    @property
    def width(self) -> int:
        return getattr(self.down_proj, "in_features", 64)

    @property
    def example(self) -> Tensor:
        return next(self.down_proj.parameters())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or is_traced():
            return self.own(*args, **kwargs)
        return self.down_proj(self.run(self.gate_proj(args[0]), self.up_proj(args[0]), self.kernels))

    def run(self, gate: Tensor, up: Tensor, kernels: Any) -> Tensor:
        return gated(gate, up, self.activation, kernels)


def of_each_activation(piece: Any, prefix: str) -> list[Any]:
    """The piece for each activation that is known, named by both."""
    return [type(f"{prefix}{name}", (piece,), {"activation": own}) for name, own in ACTIVATIONS.items()]


GATED = of_each_activation(QuickGated, "Gated")


def quick_gated(module: nn.Module) -> type[Piece] | None:
    """What can take the module's place, if it is such a layer and nobody listens to its activation."""
    parts = dict(module.named_children())
    inner = [own for name, part in parts.items() if name not in PROJECTIONS for own in part.modules()]
    if not parts.keys() >= set(PROJECTIONS) or any(part._forward_hooks or part._forward_pre_hooks for part in inner):
        return None
    x, gate, up = samples(ROWS, 64, dtype=torch.float64, number=3)

    def own(gate: Tensor, up: Tensor) -> Any:
        stand_in = StandIn(
            module,
            training=True,
            gate_proj=lambda _: gate * 1,
            up_proj=lambda _: up * 1,
            down_proj=lambda product: product * 1,
        )
        return type(module).forward(stand_in, x)

    with _in_training(inner):
        for piece in GATED:
            if agrees(own, lambda gate, up, by=piece: gated(gate, up, by.activation), [gate, up]):
                return piece
    return None


@contextmanager
def _in_training(parts: Sequence[nn.Module]) -> Iterator[None]:
    """A dropout shows in training alone."""
    before = [part.training for part in parts]
    try:
        for part in parts:
            part.training = True
        yield
    finally:
        for part, training in zip(parts, before, strict=True):
            part.training = training
