"""What remains between matrix products, in few passes and with few bytes kept for the backward.

Norms, gated activations, activations and rotary positions of the live model are replaced while it trains. A class's
name proves nothing: a piece is replaced only where, on random inputs from tiny to huge, its outputs and gradients are
those of the layer's own forward to rounding.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from veneer.core.reclass import Reclassed, reclass, restore
from veneer.train.pieces.activation import quick_activation
from veneer.train.pieces.gated import quick_gated
from veneer.train.pieces.norm import quick_norm
from veneer.train.pieces.piece import Piece
from veneer.train.pieces.rotary import quick_rotary

KINDS = (quick_norm, quick_gated, quick_activation, quick_rotary)


@contextmanager
def quick_pieces(model: nn.Module) -> Iterator[dict[str, type[Piece]]]:
    """Inside, the model's pieces run in few passes; gives what was replaced, by path. Afterwards it is as it was.

    Adapted layers, and modules whose `forward` or a part was taken over by something else, are left alone. Copies and
    pickles that are made inside are plain.
    """
    quick: dict[str, type[Piece]] = {}
    for path, module in model.named_modules():
        if not isinstance(module, Reclassed) and "forward" not in vars(module):
            piece = next(filter(None, (kind(module) for kind in KINDS)), None)
            if piece is not None:
                quick[path] = piece
    replaced: list[Piece] = []
    try:
        for path, piece in quick.items():
            module = model.get_submodule(path)
            reclass(module, piece)
            replaced.append(module)  # type: ignore[arg-type]
        yield quick
    finally:
        for module in replaced:
            restore(module)
