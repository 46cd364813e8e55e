"""`Update`: the change that one adapter makes to one layer. A method is a subclass."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call


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

    def forward(self, weight: Tensor) -> Tensor:
        return self.delta(weight)

    def factors(self) -> Factors | None:
        """The same change as two thin matrices, where it is one."""
        return None

    def parts(self) -> dict[str, "Update"]:
        """The updates of the layer's matrices, by part; most layers are one matrix, called ""."""
        return {"": self}


class Parts(nn.ModuleDict):
    """The updates that one adapter has on a layer of several matrices, by part."""

    dropout = 0.0

    def parts(self) -> dict[str, Update]:
        return dict(self.items())  # type: ignore[arg-type]


class Stack(Update):
    """ΔW[i] = the change of any method for W[i], of a stack of matrices `(number, out, in)`.

    Its parameters are the method's, each with a first dimension more.
    """

    def __init__(self, build: Callable[[Tensor, Any], Update], weight: Tensor, config: Any) -> None:
        super().__init__()
        each = [build(matrix, config) for matrix in weight]
        self.file_names, self.dropout = each[0].file_names, each[0].dropout  # type: ignore[misc]
        for name in dict(each[0].named_parameters()):
            self.register_parameter(name, nn.Parameter(torch.stack([update.get_parameter(name) for update in each])))
        self._one = [each[0].to("meta")]  # in a list, so that it is no part of the module: only its code is used

    def delta(self, weight: Tensor) -> Tensor:
        def one(values: dict[str, Tensor], matrix: Tensor) -> Tensor:
            return functional_call(self._one[0], values, (matrix,))

        return torch.vmap(one)(dict(self.named_parameters()), weight)
