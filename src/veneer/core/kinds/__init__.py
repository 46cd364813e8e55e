"""How a base layer is seen as a matrix, and how a change is applied to its output. One family, one file."""

from torch import nn

from veneer.core.kinds.conv import AdaptedConv, AdaptedOwnConv
from veneer.core.kinds.dense import AdaptedAttention, AdaptedModule, AdaptedNorm, AdaptedParameters
from veneer.core.kinds.embedding import AdaptedEmbedding, AdaptedOwnEmbedding
from veneer.core.kinds.layer import AdaptedLayer
from veneer.core.kinds.linear import AdaptedConv1D, AdaptedLinear, AdaptedOwnLinear
from veneer.core.reclass import mixin_of

KINDS: tuple[type[AdaptedLayer], ...] = (
    AdaptedLinear,
    AdaptedOwnLinear,
    AdaptedConv1D,
    AdaptedEmbedding,
    AdaptedOwnEmbedding,
    AdaptedConv,
    AdaptedOwnConv,
    AdaptedNorm,
    AdaptedAttention,
)


def kind_of(layer: nn.Module) -> type[AdaptedLayer] | None:
    """The kind that can adapt `layer` (or already does) when the layer itself is named, or None."""
    if isinstance(layer, AdaptedLayer):
        return None if isinstance(layer, AdaptedParameters | AdaptedModule) else mixin_of(layer)  # type: ignore[return-value]
    return next((kind for kind in KINDS if kind.handles(layer)), None)
