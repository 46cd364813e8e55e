"""The gated activation of diffusers' feed-forward layers: y = up ⊙ a(gate), where (up, gate) = W x."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from veneer.core.fused import is_traced
from veneer.train.pieces.gated import Activation, of_each_activation
from veneer.train.pieces.piece import ROWS, Piece, StandIn, agrees, samples


class _Halves(torch.autograd.Function):
    """Keeps W x alone; a(gate) is made again."""

    @staticmethod
    def forward(ctx: Any, both: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(both)
        ctx.activation = activation
        up, gate = both.chunk(2, -1)
        return activation(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (both,) = ctx.saved_tensors
        up, gate = both.chunk(2, -1)
        gradient = torch.empty_like(both)
        dup, dgate = gradient.chunk(2, -1)
        torch.mul(ctx.activation(gate), grad, out=dup)
        dgate.copy_(ctx.activation.backward(grad * up, gate))
        return gradient, None


class QuickHalves(Piece):
    """A layer a(W_gate x) ⊙ W_up x, whose W is one projection that is called as a module."""

    activation: ClassVar[Activation]
    proj: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or is_traced():
            return self.own(*args, **kwargs)
        return _Halves.apply(self.proj(args[0]), self.activation)


HALVES = of_each_activation(QuickHalves, "Halves")


def quick_halves(module: nn.Module) -> type[Piece] | None:
    """What can take the module's place, if it is such a layer."""
    if [name for name, _ in module.named_children()] != ["proj"] or list(module.parameters(recurse=False)):
        return None
    x, both = samples(ROWS, 64, dtype=torch.float64, number=2)

    def own(both: Tensor) -> Any:
        return type(module).forward(StandIn(module, training=True, proj=lambda _: both * 1), x)

    for piece in HALVES:
        if agrees(own, lambda both, by=piece: _Halves.apply(both, by.activation), [both]):
            return piece
    return None
