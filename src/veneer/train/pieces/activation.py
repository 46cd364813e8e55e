"""An activation that is composed of many operations, by PyTorch's own kernel: one pass, and x alone is kept."""

import re
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.core.fused import is_traced
from veneer.train.pieces.gated import Activation, of_each_activation
from veneer.train.pieces.piece import ROWS, Piece, agrees, kept_bytes, samples

NAMES = re.compile("gelu|silu|swish|activation", re.IGNORECASE)  # to look at; what they are is found out


class QuickActivation(Piece):
    """a(x), entry by entry."""

    activation: ClassVar[Activation]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.own(x, *args, **kwargs) if args or kwargs or is_traced() else self.activation(x)


QUICK = of_each_activation(QuickActivation, "Quick")


def quick_activation(module: nn.Module) -> type[Piece] | None:
    """What can take the module's place, if it is one of these activations and keeps more than it must."""
    if not NAMES.search(type(module).__name__) or [*module.parameters(), *module.buffers(), *module.children()]:
        return None

    def own(x: Tensor) -> Any:
        return type(module).forward(module, x)

    (x,) = samples(ROWS, 64, dtype=torch.float64, number=1)
    for piece in QUICK:
        if agrees(own, piece.activation, [x]) and kept_bytes(own, x) > kept_bytes(piece.activation, x):
            return piece
    return None
