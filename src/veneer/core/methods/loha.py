"""LoHa (Hyeon-Woo et al. 2021, FedPara, arXiv:2108.06098; Yeh et al. 2023, LyCORIS, arXiv:2309.14859)."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.core.config import LoraConfig, scaling
from veneer.core.start import start
from veneer.core.update import LYCORIS_NAMES, Factors, Update, flat, own_precision


class Loha(Update):
    """ΔW = scale · (B₁ A₁) ⊙ (B₂ A₂): the rank is up to r², for twice LoRA's parameters.

    A₁, A₂ `(r, in)`, B₁, B₂ `(out, r)`. The same change is a product of thin matrices of rank r² (its columns are
    all products of a column of B₁ and one of B₂), and is computed so where r² is less than both sides of W.
    """

    file_names: ClassVar = {"B1": "hada_w1_a", "A1": "hada_w1_b", "B2": "hada_w2_a", "A2": "hada_w2_b"}
    reads_weight: ClassVar = False
    peft_names: ClassVar = LYCORIS_NAMES

    def __init__(self, weight: Tensor, config: LoraConfig) -> None:
        super().__init__()
        (rows, columns), dtype = weight.shape, own_precision(weight)
        self.A1, self.A2 = (nn.Parameter(weight.new_empty(config.r, columns, dtype=dtype)) for _ in "12")
        self.B1, self.B2 = (nn.Parameter(weight.new_empty(rows, config.r, dtype=dtype)) for _ in "12")
        self.scale = scaling(config.r, config.lora_alpha, config.use_rslora)
        start(self.A1, self.B1, False)
        start(self.A2, self.B2, config.init_lora_weights)

    @classmethod
    def sides(cls, tensors: Mapping[str, Tensor]) -> tuple[int, int] | None:
        return (flat(tensors["B1"])[0], flat(tensors["A1"])[1]) if {"A1", "B1"} <= tensors.keys() else None

    def delta(self, weight: Tensor) -> Tensor:
        return self.scale * ((self.B1 @ self.A1) * (self.B2 @ self.A2))

    def factors(self) -> Factors | None:
        (rows, r), columns = self.B1.shape, self.A1.shape[1]
        if r * r >= min(rows, columns):
            return None
        A = torch.einsum("ri,si->rsi", self.A1, self.A2).reshape(r * r, columns)
        B = torch.einsum("or,os->ors", self.B1, self.B2).reshape(rows, r * r)
        return Factors(A, B, self.scale)
