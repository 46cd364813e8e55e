"""One method, one file. A method is known by its `peft_type`."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from veneer.core.config import LoraConfig
from veneer.core.methods.dora import Dora
from veneer.core.methods.full import Full
from veneer.core.methods.ia3 import Ia3
from veneer.core.methods.loha import Loha
from veneer.core.methods.lokr import Lokr
from veneer.core.methods.lora import Lora, PartedLora
from veneer.core.methods.vera import Vera
from veneer.core.update import Stack, Update

METHODS: dict[str, type[Update]] = {"LORA": Lora, "LOHA": Loha, "LOKR": Lokr, "VERA": Vera, "IA3": Ia3, "FULL": Full}


def maker(config: LoraConfig, layers: Iterable[tuple[Tensor, LoraConfig]]) -> Callable[..., Update]:
    """What makes the fresh updates of one adapter; `layers`: its weights `(out, in)`, each with its config.

    It takes a weight, its config, and what the kind of layer does to the starting values.
    """
    share = config.method.share
    common: list[Any] = [share(given)] if share and (given := list(layers)) else []

    def make(weight: Tensor, own: LoraConfig, start: Callable[[Update, bool | str], None]) -> Update:
        if weight.ndim == 3:
            return Stack(lambda matrix: make(matrix, own, start), weight)
        update = (PartedLora if own.options.get("fused") else own.method)(weight, own, *common)
        if own.lora_dropout:
            update.dropout = own.lora_dropout
        start(update, own.init_lora_weights)
        return Dora(weight, update) if own.use_dora else update

    return make
