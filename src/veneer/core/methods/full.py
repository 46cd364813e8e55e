"""A change of full size: LyCORIS's `diff` and `diff_b`, and what two whole models differ in."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.core.config import LoraConfig
from veneer.core.update import Update, flat, own_precision


class Full(Update):
    """ΔW = D and, where a file has b, Δb = b: D `(out, in)`, b `(out)`.

    D starts at 0. There is neither rank nor scale: `r` and `lora_alpha` say nothing here. A norm layer's D has a column
    for its scale and one for its bias; a file may also have them as D `(n)` and b `(n)`, and b without D.
    """

    file_names: ClassVar = {"D": "diff", "b": "diff_b"}
    reads_weight: ClassVar = False
    is_split: bool = False  # whether D and b are the columns of a norm layer's matrix
    D: nn.Parameter

    def __init__(self, weight: Tensor, config: LoraConfig) -> None:
        super().__init__()
        self.D = nn.Parameter(torch.zeros_like(weight, dtype=own_precision(weight)).contiguous())
        if config.init_lora_weights is False:
            nn.init.normal_(self.D)

    @classmethod
    def sides(cls, tensors: Mapping[str, Tensor]) -> tuple[int, int] | None:
        return flat(tensors["D"]) if "D" in tensors else None

    def fit(self, tensors: Mapping[str, Tensor], biased: bool) -> None:
        D = self.D
        rows, columns = D.shape[-2:]
        own = tensors["D"].numel() if "D" in tensors else rows
        self.is_split = not biased and D.ndim == 2 and (columns, own) == (2, rows)
        if "b" in tensors and (biased or self.is_split):
            self.register_parameter("b", nn.Parameter(D.new_empty(rows)))
        if "D" not in tensors and "b" in self._parameters:
            del self.D
        elif self.is_split:
            self.D = nn.Parameter(D.detach()[:, :1])

    def delta(self, weight: Tensor) -> Tensor:
        D, b = self._parameters.get("D"), self._parameters.get("b")
        if self.is_split:
            one = next(self.parameters())
            columns = [one.new_zeros(len(one)) if column is None else column.flatten() for column in (D, b)]
            return torch.stack(columns, 1)
        return torch.zeros_like(weight, dtype=own_precision(weight)) if D is None else D

    def shift(self, bias: Tensor | None) -> Tensor | None:
        return None if self.is_split else self._parameters.get("b")
