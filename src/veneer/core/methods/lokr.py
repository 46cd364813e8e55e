"""LoKr (Edalati et al. 2022, KronA, arXiv:2212.10650; Yeh et al. 2023, LyCORIS, arXiv:2309.14859)."""

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.core.config import LoraConfig, scaling
from veneer.core.start import start
from veneer.core.update import LYCORIS_NAMES, Option, Update, flat, own_precision, switch


class Lokr(Update):
    """ΔW = scale · C ⊗ D, with C `(l, m)` and D `(k, n)`, where out = l·k and in = m·n.

    D is a product of rank r where r < max(k, n) / 2; so is C where r < max(l, m) / 2 and `decompose_both` is set.
    `decompose_factor` is the most that l and m may be; -1 takes the divisors nearest to the square roots. Both say how
    an adapter begins: what a file holds may be divided and decomposed in any way.
    """

    reads_weight: ClassVar = False
    file_names: ClassVar = {
        "C": "lokr_w1", "C_B": "lokr_w1_a", "C_A": "lokr_w1_b", "D": "lokr_w2", "D_B": "lokr_w2_a", "D_A": "lokr_w2_b"
    }  # fmt: skip
    peft_names: ClassVar = LYCORIS_NAMES
    options: ClassVar = {
        "decompose_both": switch(False),
        "decompose_factor": Option(
            -1, lambda value: type(value) is int and (value == -1 or value > 0), "-1 or a whole number of at least 1"
        ),
    }

    def __init__(self, weight: Tensor, config: LoraConfig) -> None:
        super().__init__()
        self.size, self.dtype = tuple(weight.shape), own_precision(weight)
        factor = config.options["decompose_factor"]
        outer, inner = zip(*(divided(side, factor) for side in weight.shape), strict=True)  # (l, m), (k, n)
        most = config.r if config.options["decompose_both"] else max(outer)
        self._add("C", weight.new_empty(outer, dtype=self.dtype), most, config.init_lora_weights)
        self._add("D", weight.new_empty(inner, dtype=self.dtype), config.r, False)
        self.scale = scaling(config.r, config.lora_alpha, config.use_rslora)

    def _add(self, name: str, whole: Tensor, r: int, how: bool | str) -> None:
        """The parameter `name`, or the two whose product it is."""
        A, B = whole.new_empty(r, whole.shape[1]), whole.new_empty(len(whole), r)
        if 2 * r >= max(whole.shape):
            own, A, B = {name: whole}, torch.empty_like(whole), whole  # as a B: zero, unless the change is to be seen
        else:
            own = {f"{name}_B": B, f"{name}_A": A}
        start(A, B, how)
        for key, value in own.items():
            self.register_parameter(key, nn.Parameter(value))

    @classmethod
    def sides(cls, tensors: Mapping[str, Tensor]) -> tuple[int, int] | None:
        """(l·k, m·n), where both C and D are there, each whole or as a product."""
        own = {name: flat(tensor) for name, tensor in tensors.items()}
        made = []
        for name in "CD":
            B, A = own.get(f"{name}_B"), own.get(f"{name}_A")
            if A and B and A[0] == B[1] and name not in own:
                made.append((B[0], A[1]))
            elif name in own and not A and not B:
                made.append(own[name])
        return (made[0][0] * made[1][0], made[0][1] * made[1][1]) if len(made) == 2 else None

    def fit(self, tensors: Mapping[str, Tensor], biased: bool) -> None:
        if self.sides(tensors) == self.size:
            self._parameters.clear()
            for name in filter(tensors.__contains__, self.file_names):
                value = torch.empty(flat(tensors[name]), dtype=self.dtype, device="meta")
                self.register_parameter(name, nn.Parameter(value))

    def _product(self, name: str) -> Tensor:
        if name in self._parameters:
            return getattr(self, name)
        return getattr(self, f"{name}_B") @ getattr(self, f"{name}_A")

    def delta(self, weight: Tensor) -> Tensor:
        return self.scale * torch.kron(self._product("C"), self._product("D"))


def divided(side: int, factor: int) -> tuple[int, int]:
    """`side` as a product of two whole numbers, the first the smaller: `factor` itself where it divides `side`, else
    the largest divisor that is at most `factor` and √side.
    """
    if factor > 0 and side % factor == 0:
        return factor, side // factor
    most = math.isqrt(side) if factor == -1 else min(factor, math.isqrt(side))
    first = next(number for number in range(most, 0, -1) if side % number == 0)
    return first, side // first
