"""One method, one file. A method is known by its `peft_type`."""

from veneer.core.errors import AdapterError, listed, nearest, shown
from veneer.core.methods.lora import Lora
from veneer.core.update import Update

METHODS: dict[str, type[Update]] = {"LORA": Lora}


def method(peft_type: str) -> type[Update]:
    """The method of that name. Raises `AdapterError` when there is none."""
    if peft_type not in METHODS:
        hint = nearest(peft_type, METHODS)
        raise AdapterError(f"peft_type {shown(peft_type)} is not a method of veneer: it has {listed(METHODS)}{hint}")
    return METHODS[peft_type]
