"""A trained copy: what `modules_to_save` and `bias` train beside an adapter's method."""

from typing import ClassVar

from torch import Tensor, nn

from veneer.core.update import Update, own_precision


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
