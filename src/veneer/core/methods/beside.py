"""What is trained beside an adapter's method: copies of parameters, rows of a table; and what is trained elsewhere."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.core.update import Factors, Few, Update, own_precision


class Copy(Update):
    """ΔW = W′ - W for a parameter W of any shape, where W′ is trained and starts as W, to the bit."""

    file_names: ClassVar = {"value": ""}  # a file has it under the parameter's own path

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(weight.detach().to(own_precision(weight), copy=True))

    def delta(self, weight: Tensor) -> Tensor:
        return self.value - weight

    def onto(self, weight: Tensor) -> Tensor:
        return self.value


class Tokens(Update):
    """W′[:, ids] = Rᵀ, where R `(ids, dim)` is trained and starts as those columns of W `(dim, tokens)`, to the bit."""

    file_names: ClassVar = {"rows": "token_adapter.trainable_tokens_delta"}
    ids: Tensor

    def __init__(self, weight: Tensor, ids: Sequence[int]) -> None:
        super().__init__()
        self._ids = tuple(ids)
        self.register_buffer("ids", torch.tensor(self._ids, device=weight.device), persistent=False)
        self.rows = nn.Parameter(weight.detach()[:, self.ids].t().to(own_precision(weight)).contiguous())

    def delta(self, weight: Tensor) -> Tensor:
        return self.onto(weight) - weight

    def onto(self, weight: Tensor) -> Tensor:
        return weight.to(self.rows.dtype).index_copy(1, self.ids, self.rows.t())

    def few(self, weight: Tensor) -> Few:
        return Few(self.ids, self.rows.to(own_precision(self.rows)) - weight[:, self.ids].t())

    def materialise(self, device: torch.device) -> None:
        super().materialise(device)
        self.ids = torch.tensor(self._ids, device=device)


class Tied(Update):
    """The change that another layer with the same parameter has: ΔW, or ΔWᵀ where this layer is its transpose.

    What is trained is the other's; a file has it here too where it is factors, and else there alone.
    """

    def __init__(self, of: Update, turned: bool) -> None:
        super().__init__()
        self.of, self.turned = of, turned
        self.dropout, self.scale = of.dropout, of.scale

    def _turn(self, matrix: Tensor) -> Tensor:
        return matrix.t() if self.turned else matrix

    def delta(self, weight: Tensor) -> Tensor:
        return self._turn(self.of.delta(self._turn(weight)))

    def added(self, total: Tensor, weight: Tensor, share: float) -> Tensor:
        return self._turn(self.of.added(self._turn(total), self._turn(weight), share))

    def factors(self) -> Factors | None:
        factors = self.of.factors()
        return Factors(factors.B.t(), factors.A.t(), factors.scale) if factors and self.turned else factors

    def few(self, weight: Tensor) -> Few | None:
        return self.of.few(self._turn(weight))

    def tensors(self) -> dict[str, Tensor]:
        factors = self.factors()
        return {"A": factors.A.detach(), "B": factors.B.detach()} if factors else {}
