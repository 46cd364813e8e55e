"""LoRA (Hu et al. 2021, arXiv:2106.09685), with rsLoRA's scale."""

from typing import ClassVar

from torch import Tensor, nn

from veneer.core.config import LoraConfig, scaling
from veneer.core.start import start
from veneer.core.update import Factors, Update, own_precision


class Lora(Update):
    """ΔW = scale · B A, with A `(r, in)`, B `(out, r)` and scale = α / r, or α / √r with rsLoRA."""

    file_names: ClassVar = {"A": "lora_A.weight", "B": "lora_B.weight"}

    def __init__(self, weight: Tensor, config: LoraConfig) -> None:
        super().__init__()
        dtype = own_precision(weight)
        rows, columns = weight.shape
        self.A = nn.Parameter(weight.new_empty(config.r, columns, dtype=dtype))
        self.B = nn.Parameter(weight.new_empty(rows, config.r, dtype=dtype))
        self.scale = scaling(config.r, config.lora_alpha, config.use_rslora)
        self.dropout = config.lora_dropout
        start(self.A, self.B, config.init_lora_weights)

    def delta(self, weight: Tensor) -> Tensor:
        return self.scale * (self.B @ self.A)

    def factors(self) -> Factors:
        return Factors(self.A, self.B, self.scale)
