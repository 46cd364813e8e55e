"""(IA)³ (Liu et al. 2022, arXiv:2205.05638)."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.core.config import LoraConfig
from veneer.core.ranges import is_names
from veneer.core.update import Option, Update, own_precision, switch


class Ia3(Update):
    """y = l ⊙ (W x + b), that is ΔW = (l - 1) ⊙ W by rows and Δb = (l - 1) ⊙ b, with l `(out, 1)`.

    In the layers that `feedforward_modules` names, whose inputs are the feed-forward's inner activations,
    y = W (l ⊙ x) + b, that is ΔW = W ⊙ (l - 1) by columns, with l `(1, in)`. l starts at 1. There is neither rank nor
    scale: `r` and `lora_alpha` say nothing here. On a convolution a column is an input channel at one place of the
    kernel, which for a kernel of a single point is what PEFT's files hold; a file may have one l for all places of a
    channel. With `scales_bias` false, Δb = 0, as in LyCORIS's files.
    """

    file_names: ClassVar = {"l": "ia3_l"}
    forms: ClassVar = {"l": "l"}
    peft_names: ClassVar = {"r": None, "init_lora_weights": "init_ia3_weights", "scales_bias": None}
    naming: ClassVar = ("feedforward_modules",)
    options: ClassVar = {
        "feedforward_modules": Option(
            [], lambda value: value == [] or (value is not None and is_names(value)), "names of layers"
        ),
        "scales_bias": switch(True),
    }

    def __init__(self, weight: Tensor, config: LoraConfig) -> None:
        super().__init__()
        rows, self.columns = weight.shape
        self.shifts_bias = config.options["scales_bias"]
        self.scales_inputs = bool(config.options["feedforward_modules"])
        shape = (1, self.columns) if self.scales_inputs else (rows, 1)
        self.l = nn.Parameter(torch.ones(shape, dtype=own_precision(weight), device=weight.device))
        if config.init_lora_weights is False:
            nn.init.normal_(self.l)

    @classmethod
    def placed(cls, config: LoraConfig, search: Any, paths: list[str]) -> dict[str, dict[str, Any]]:
        """In one layer's config, `feedforward_modules` is whether it is one of them."""
        names = config.options["feedforward_modules"]
        if not names or not paths:
            return {}
        inner = set(search.matching(names, "feedforward_modules among the adapted layers", paths))
        return {path: {"options": {**config.options, "feedforward_modules": path in inner}} for path in paths}

    @classmethod
    def shifts(cls, config: LoraConfig) -> bool:
        return config.options["scales_bias"]

    def fit(self, tensors: Mapping[str, Tensor], biased: bool) -> None:
        number = tensors["l"].numel() if "l" in tensors else 0
        if self.scales_inputs and 0 < number < self.columns and self.columns % number == 0:
            self.l, self.forms = nn.Parameter(self.l.new_empty(1, number)), {}  # type: ignore[misc]

    def delta(self, weight: Tensor) -> Tensor:
        change = self.by_columns()
        return weight * (self.l - 1 if change is None else change)

    def shift(self, bias: Tensor | None) -> Tensor | None:
        left = self.scales_inputs or not self.shifts_bias or bias is None
        return None if left else bias * (self.l.squeeze(1) - 1)  # type: ignore[operator]

    def by_rows(self, weight: Tensor) -> tuple[Tensor, None] | None:
        """Not where an input of the change is dropped."""
        return None if self.scales_inputs or self.dropout else (self.l.squeeze(1) - 1, None)

    def by_columns(self) -> Tensor | None:
        if not self.scales_inputs:
            return None
        gains = self.l.squeeze(0) - 1
        return gains.repeat_interleave(self.columns // len(gains)) if len(gains) < self.columns else gains
