"""`nn.MultiheadAttention`, which reads its projections' weights itself and calls none of them."""

from torch import nn

from veneer.core.kinds.dense import AdaptedParts
from veneer.core.update import Update


class AdaptedAttention(AdaptedParts):
    """y = attention(q, k, v; W + Σ weight · ΔW), for the projections of the inputs and that of the output at once.

    The inputs' projections are one matrix `(3 · dim, dim)`, or three where keys or values have sizes of their own.
    """

    rowwise = False  # batch_first and the masks say which dimension it is

    @classmethod
    def handles(cls, layer: nn.Module) -> bool:
        return isinstance(layer, nn.MultiheadAttention)

    @classmethod
    def names(cls, layer: nn.Module) -> dict[str, str]:
        together = getattr(layer, "in_proj_weight", None) is not None
        inputs = ("in_proj",) if together else ("q_proj", "k_proj", "v_proj")
        return {**{name: f"{name}_weight" for name in inputs}, "out_proj": "out_proj.weight"}

    @classmethod
    def places(cls, update: Update) -> dict[str, str]:
        """The inputs' projection stands at the layer itself, the output's inside PEFT's wrapper; PEFT has no others."""
        own = {"in_proj": "", "out_proj": ".base_layer.out_proj"}
        return {part: own.get(part, f".{part}") for part in update.parts()}
