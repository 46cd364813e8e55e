"""What a start from batches begins with: LoRAs that have learned nothing, on a base that is left as it was."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

from torch import nn

from veneer.core.errors import AdapterError, collapsed, shown
from veneer.core.inject import adapted_layers
from veneer.core.methods.lora import Lora
from veneer.core.model import PeftModel
from veneer.core.plan import terms_of

MEMORY = 2 << 30  # bytes of sums that are held at once, about; what is more takes another pass over the batches


def outputs_of(model: nn.Module, batch: Any) -> Any:
    """What the model gives for a batch of named inputs, of several, or of one."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def fresh(
    model: PeftModel, name: str, how: str, batches: Iterable[Any]
) -> tuple[list[Any], dict[str, Any], dict[str, Lora]]:
    """The batches, and the adapter's layers and their LoRAs by path. Raises `AdapterError` if it cannot start so."""
    terms_of(name, model.peft_config)
    if (found := model.peft_config[name].init_lora_weights) != how:
        raise AdapterError(f"{name!r} was made with init_lora_weights={shown(found)}: make it with {how!r}")
    if not (batches := list(batches)):
        raise AdapterError("no batches to start from: give some")
    carrying = {path: layer for path, layer in adapted_layers(model) if name in layer.adapters}
    loras = {  # not what is trained beside the method
        path: own for path, layer in carrying.items() for own in layer.adapters[name].modules() if isinstance(own, Lora)
    }
    if others := [path for path in loras if not carrying[path].linear]:
        raise AdapterError(f"init_lora_weights={how!r} is for linear layers, not for {collapsed(others)}")
    if begun := [path for path, lora in loras.items() if lora.delta(lora.A).any()]:
        raise AdapterError(f"{name!r} has learned something already, in {collapsed(begun)}: start a fresh adapter")
    return batches, {path: carrying[path] for path in loras}, loras


@contextmanager
def base_alone(model: PeftModel) -> Iterator[None]:
    """The base, evaluating and frozen; afterwards all is as it was before, also on an error."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            model.eval().requires_grad_(False)
            yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, trains in flags:
            parameter.requires_grad_(trains)


def in_groups(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """The paths in groups, each of about `most` bytes, or of one path."""
    groups: dict[int, list[str]] = defaultdict(list)
    for path, end in zip(sizes, accumulate(sizes.values()), strict=True):
        groups[(end - 1) // most].append(path)
    return list(groups.values())
