"""`AdaptedLayer`: what every layer kind shares. A kind says how a layer is seen as a matrix and applies changes."""

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.core.errors import AdapterError
from veneer.core.plan import Plan, Term
from veneer.core.reclass import Reclassed
from veneer.core.update import Update


def _never_called(module: nn.Module, inputs: object) -> None:
    """Adapters are a container: nobody calls them."""


class Adapters(nn.ModuleDict):
    """The one child that an adapted layer has more than its base: an `Update` for each adapter name."""

    original: Tensor | None  # the weight as it was, while adapters are merged into it

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.register_buffer("original", None, persistent=False)
        # nn.TransformerEncoderLayer reads its linear layers' weights itself, unless a module inside has a hook
        self.register_forward_pre_hook(_never_called)

    def acting(self, terms: tuple[Term, ...] | None = None) -> Iterator[tuple[Update, float]]:
        """The updates that act on this layer, with their weights: those of `terms`, or of the plan."""
        for update, term in self.acting_rows(terms):
            if term.rows is not None:
                raise AdapterError("this kind of layer cannot be mixed by rows: run each adapter's rows on their own")
            yield update, term.weight

    def acting_rows(self, terms: tuple[Term, ...] | None = None) -> Iterator[tuple[Update, Term]]:
        """The same with whole terms, for kinds that can give each row of a batch its own."""
        for term in self.plan.terms if terms is None else terms:
            if term.adapter in self._modules:
                yield self._modules[term.adapter], term  # type: ignore[misc]


class AdaptedLayer(Reclassed):
    """A layer that carries adapters and is still the layer: same place, same parameters, same keys."""

    adapters: Adapters
    weight: Tensor
    linear: ClassVar[bool] = False  # belongs to "all-linear"

    @classmethod
    def handles(cls, layer: nn.Module) -> bool:
        """Whether this kind can adapt `layer`."""
        raise NotImplementedError

    @staticmethod
    def matrix(weight: Tensor) -> Tensor:
        """The layer's weight seen as `(out, in)`, without a copy; its own inverse."""
        raise NotImplementedError

    def changed_weight(self, terms: tuple[Term, ...]) -> Tensor:
        """W + Σ weight · ΔW, summed in fp32 (fp64 for an fp64 base) and rounded once to the base's dtype."""
        original = self.matrix(self.weight)
        total = original.to(torch.promote_types(original.dtype, torch.float32))
        for update, weight in self.adapters.acting(terms):
            total = total + weight * update.delta(original)
        return self.matrix(total.to(original.dtype))
