"""LoRA (Hu et al. 2021, arXiv:2106.09685), with rsLoRA's scale."""

import math
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from veneer.core.config import LoraConfig, scaling
from veneer.core.ranges import start_of
from veneer.core.start import FROM_WEIGHT, PLAIN, start, start_from_weight
from veneer.core.update import Factors, Option, Update, own_precision


class Lora(Update):
    """ΔW = scale · B A, with A `(r, in)`, B `(out, r)` and scale = α / r, or α / √r with rsLoRA.

    Where A and B start from W (PiSSA, OLoRA), ΔW = scale · (B A - B₀ A₀) is counted from the start, and the base is
    never touched: its trajectory is that of B A on the base W - scale · B₀ A₀. It is a LoRA of rank 2r,
    [B - B₀, B₀] [A; A - A₀], which is zero to the bit at the start, and is computed and saved as such.

    With `freeze_A`, only B learns (LoRA-FA, Zhang et al. 2023, arXiv:2308.03303).
    """

    file_names: ClassVar = {"A": "lora_A.weight", "B": "lora_B.weight"}
    reads_weight: ClassVar = False
    options: ClassVar = {"freeze_A": Option(False, lambda value: isinstance(value, bool), "true or false")}
    peft_names: ClassVar = {"freeze_A": None}
    faster: ClassVar = ("B",)
    starts: ClassVar = (*PLAIN, "orthogonal", *FROM_WEIGHT)
    A0: Tensor | None
    B0: Tensor | None

    def __init__(self, weight: Tensor, config: LoraConfig) -> None:
        super().__init__()
        (rows, columns), dtype = weight.shape, own_precision(weight)
        self.A = nn.Parameter(weight.new_empty(config.r, columns, dtype=dtype))
        self.B = nn.Parameter(weight.new_empty(rows, config.r, dtype=dtype))
        saved = self.saved_config(config)
        self.scale = scaling(saved.r, saved.lora_alpha, saved.use_rslora)
        self.dropout = config.lora_dropout
        self.A0 = self.B0 = None
        self.simple = not _from_weight(config)
        if isinstance(config.init_lora_weights, str) and not self.simple:
            start_from_weight(self.A, self.B, config.init_lora_weights, weight, self.scale)
            del self.A0, self.B0
            self.register_buffer("A0", self.A.detach().clone())
            self.register_buffer("B0", self.B.detach().clone())
        else:
            start(self.A, self.B, config.init_lora_weights)
        self.A.requires_grad_(not config.options["freeze_A"])

    def delta(self, weight: Tensor) -> Tensor:
        A, B, scale = self.factors()
        return scale * (B @ A)

    def factors(self) -> Factors:
        if self.A0 is None or self.B0 is None:
            return Factors(self.A, self.B, self.scale)
        A = torch.cat([self.A, self.A - self.A0])
        return Factors(A, torch.cat([self.B - self.B0, self.B0], dim=1), self.scale)

    def tensors(self) -> dict[str, Tensor]:
        A, B, _ = self.factors()
        return {"A": A.detach(), "B": B.detach()}

    @classmethod
    def saved_config(cls, config: LoraConfig) -> LoraConfig:
        if not _from_weight(config):
            return config
        more = math.sqrt(2) if config.use_rslora else 2  # that the scale is the same at twice the rank
        return replace(
            config,
            r=2 * config.r,
            lora_alpha=more * config.lora_alpha,
            rank_pattern={key: 2 * r for key, r in config.rank_pattern.items()},
            alpha_pattern={key: more * alpha for key, alpha in config.alpha_pattern.items()},
            init_lora_weights=True,
        )


def _from_weight(config: LoraConfig) -> bool:
    return start_of(config) in FROM_WEIGHT
