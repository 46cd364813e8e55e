"""LoKr (Edalati et al. 2022, KronA, arXiv:2212.10650; Yeh et al. 2023, LyCORIS, arXiv:2309.14859)."""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.core.config import LoraConfig, scaling
from veneer.core.start import start
from veneer.core.update import LYCORIS_NAMES, Option, Update, own_precision


class Lokr(Update):
    """ΔW = scale · C ⊗ D, with C `(l, m)` and D `(k, n)`, where out = l·k and in = m·n.

    D is a product of rank r where r < max(k, n) / 2; so is C where r < max(l, m) / 2 and `decompose_both` is set.
    `decompose_factor` is the most that l and m may be; -1 takes the divisors nearest to the square roots.
    """

    reads_weight: ClassVar = False
    file_names: ClassVar = {
        "C": "lokr_w1", "C_B": "lokr_w1_a", "C_A": "lokr_w1_b", "D": "lokr_w2", "D_B": "lokr_w2_a", "D_A": "lokr_w2_b"
    }  # fmt: skip
    peft_names: ClassVar = LYCORIS_NAMES
    options: ClassVar = {
        "decompose_both": Option(False, lambda value: isinstance(value, bool), "true or false"),
        "decompose_factor": Option(
            -1, lambda value: type(value) is int and (value == -1 or value > 0), "-1 or a whole number of at least 1"
        ),
    }

    def __init__(self, weight: Tensor, config: LoraConfig) -> None:
        super().__init__()
        factor = config.options["decompose_factor"]
        outer, inner = zip(*(divided(side, factor) for side in weight.shape), strict=True)  # (l, m), (k, n)
        self._add("C", weight, outer, config.r if config.options["decompose_both"] else max(outer))
        self._add("D", weight, inner, config.r)
        self.scale = scaling(config.r, config.lora_alpha, config.use_rslora)
        self.dropout = config.lora_dropout
        self._start(config.init_lora_weights)

    def _add(self, name: str, weight: Tensor, shape: tuple[int, int], r: int) -> None:
        """The parameter `name`, or the two whose product it is."""
        whole = {name: shape} if 2 * r >= max(shape) else None
        for own, size in (whole or {f"{name}_B": (shape[0], r), f"{name}_A": (r, shape[1])}).items():
            self.register_parameter(own, nn.Parameter(weight.new_empty(size, dtype=own_precision(weight))))

    def _start(self, how: bool | str) -> None:
        for name, first in (("C", how), ("D", False)):
            if name in self._parameters:
                whole = self._parameters[name]
                assert whole is not None
                start(torch.empty_like(whole), whole, first)  # as a B: zero, unless the change is to be seen
            else:
                start(getattr(self, f"{name}_A"), getattr(self, f"{name}_B"), first)

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
