"""One method, one file. A method is known by its `peft_type`."""

from torch import Tensor

from veneer.core.config import LoraConfig
from veneer.core.errors import AdapterError, listed, nearest
from veneer.core.methods.dora import Dora
from veneer.core.methods.loha import Loha
from veneer.core.methods.lokr import Lokr
from veneer.core.methods.lora import Lora
from veneer.core.update import Update

METHODS: dict[str, type[Update]] = {"LORA": Lora, "LOHA": Loha, "LOKR": Lokr}


def method(peft_type: str) -> type[Update]:
    """The method of that name. Raises `AdapterError` when there is none."""
    if peft_type not in METHODS:
        hint = nearest(peft_type, METHODS)
        raise AdapterError(f"peft_type {peft_type!r} is not a method of veneer: it has {listed(METHODS)}{hint}")
    return METHODS[peft_type]


def update_for(weight: Tensor, config: LoraConfig) -> Update:
    """A fresh update that `config` describes, for a layer's `weight` as an `(out, in)` matrix."""
    update = method(config.peft_type)(weight, config)
    return Dora(weight, update) if config.use_dora else update


def file_names(config: LoraConfig) -> dict[str, str]:
    """Name of a tensor of such an update → its name in a PEFT file."""
    return {**method(config.peft_type).file_names, **(Dora.file_names if config.use_dora else {})}
