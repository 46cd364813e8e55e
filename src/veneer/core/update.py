"""`Update`: the change that one adapter makes to one layer. A method is a subclass."""

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

from torch import Tensor, nn


class Factors(NamedTuple):
    """A low-rank change: ΔW = scale · B A."""

    A: Tensor  # (r, in)
    B: Tensor  # (out, r)
    scale: float


class Update(nn.Module, ABC):
    """What a method must say: its parameters (`__init__`) and what it does to a matrix (`delta`).

    Everything else, merging, exporting, combining, is derived from `delta`; a method whose change is a product
    of two thin matrices may also give its `factors`, and gets the fast forward of its layer's kind.
    """

    file_names: ClassVar[dict[str, str]]  # own parameter name → its name in a PEFT file
    dropout: float = 0.0  # probability that an input of the change is dropped in training

    @abstractmethod
    def delta(self, weight: Tensor) -> Tensor:
        """ΔW for the base's `weight`, both `(out, in)`, in the precision of the method's parameters."""

    def factors(self) -> Factors | None:
        """The same change as two thin matrices, where it is one."""
        return None
