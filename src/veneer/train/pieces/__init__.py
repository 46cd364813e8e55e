"""Frozen layers and what remains between them, in few passes and with few bytes kept for the backward.

Frozen linear layers and convolutions, diffusers' attention, norms, gated activations, activations and rotary positions
of the live model are replaced while it trains. A class's name proves nothing: except where PyTorch's or diffusers' own
forward is called by name, a piece is replaced only where, on random inputs from tiny to huge, its outputs and gradients
are those of the layer's own forward to rounding.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from veneer.core.reclass import Reclassed, reclass, restore
from veneer.train.pieces.activation import quick_activation
from veneer.train.pieces.attention import quick_attention
from veneer.train.pieces.compiled import compiled, make_kernels, saving
from veneer.train.pieces.frozen import quick_frozen
from veneer.train.pieces.gated import quick_gated
from veneer.train.pieces.halves import quick_halves
from veneer.train.pieces.norm import quick_norm
from veneer.train.pieces.piece import Piece
from veneer.train.pieces.rotary import quick_rotary

KINDS = (quick_frozen, quick_attention, quick_norm, quick_gated, quick_halves, quick_activation, quick_rotary)


@dataclass
class Pieces:
    """What was replaced, by path, and the seconds that compiling took."""

    replaced: dict[str, Piece] = field(default_factory=dict)
    seconds: float = 0.0

    def payback(self, tokens: int) -> str:
        """A sentence: after how many steps of so many tokens compiling has paid, as measured now."""
        saved = saving(self.replaced.values(), tokens)
        pays = f"paid back after {self.seconds / saved:,.0f} steps" if saved > 0 else "never paid back: do without"
        return f"compiled in {self.seconds:.0f} s, saves {1000 * saved:.0f} ms a step of {tokens:,} tokens: {pays}"


@contextmanager
def quick_pieces(model: nn.Module, compile: bool = False) -> Iterator[Pieces]:
    """Inside, the model's pieces run in few passes; with `compile`, norms and gated activations in one. Then as before.

    Adapted layers, and modules whose `forward` or a part was taken over by something else, are left alone. Copies and
    pickles that are made inside are plain. Raises `AdapterError` where compiling fails.
    """
    quick = {}
    for path, module in model.named_modules():
        if not isinstance(module, Reclassed) and "forward" not in vars(module):
            piece = next(filter(None, (kind(module) for kind in KINDS)), None)
            if piece is not None:
                quick[path] = compiled(piece) if compile else piece  # type: ignore[arg-type]
    pieces = Pieces()
    with ExitStack() as afterwards:
        for path, piece in quick.items():
            found: Any = model.get_submodule(path)
            reclass(found, piece)
            afterwards.callback(restore, found)
            pieces.replaced[path] = found
        pieces.seconds = make_kernels(pieces.replaced.values()) if compile else 0.0
        yield pieces
