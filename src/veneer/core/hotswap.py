"""Hot swap: a live LoRA takes the values of another one, and every tensor stays where it is."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.adapter import Adapter
from veneer.core.config import LoraConfig
from veneer.core.errors import AdapterError, collapsed
from veneer.core.inject import adapted_layers, prepared
from veneer.core.methods import method
from veneer.core.methods.beside import Tied


@torch.no_grad()
def hotswap(model: nn.Module, name: str, config: LoraConfig, values: Adapter) -> None:
    """Copy `values` into the live adapter `name`: compiled code, CUDA graphs and optimizers go on with its tensors.

    A smaller rank is filled up with zeros. The live scale stays, as compiled code holds it: B is multiplied by the
    ratio of the scales. So the config stays too, and what is saved gives the same outputs. Raises one `AdapterError`
    with all that does not fit, before anything is copied.
    """
    faults, found = values.faults, values.config
    if found.peft_type != "LORA" or config.peft_type != "LORA" or found.use_dora != config.use_dora:
        one, other = (own.peft_type + " with use_dora" * own.use_dora for own in (config, found))
        faults.append(
            f"{name!r} is {one} and the other is {other}: one LORA is hot-swapped with another, use_dora alike"
        )
    elif replace(method("LORA").saved_config(config), init_lora_weights=config.init_lora_weights) != config:
        faults.append(
            f"{name!r} did not start as the LoRA that its file holds, and cannot be hot-swapped: load it again"
        )
    if found.trainable_token_indices != config.trainable_token_indices:
        faults.append("trainable_token_indices are other tokens than the live adapter's")
    _, updates, _ = prepared(model, values)
    live = _held({path: own.adapters[name] for path, own in adapted_layers(model) if name in own.adapters})
    new = _held(updates)
    fitted, larger = {}, []
    for key in [key for key in live if key in new]:
        (own, scale), (value, its_scale) = live[key], new[key]
        if any(found > room for found, room in zip(value.shape, own.shape, strict=True)):
            larger.append(key)
            continue
        if key.endswith((".B", ".b")):
            value = value * (its_scale / scale if scale else torch.nan)
        fitted[key] = torch.zeros_like(own, dtype=value.dtype)
        fitted[key][tuple(map(slice, value.shape))] = value
    said = {
        "only in one of the two": [key for key in [*live, *new] if key not in live or key not in new],
        "of a larger rank than the live one": larger,
        "cannot be told at the live scale": [key for key, value in fitted.items() if not value.isfinite().all()],
    }
    if faults := [f"{what}: {collapsed(keys)}" for what, keys in said.items() if keys]:
        raise AdapterError(f"{name!r} cannot be hot-swapped: " + "; ".join(faults))
    for key, value in fitted.items():
        live[key][0].copy_(value)


def _held(updates: Mapping[str, Any]) -> dict[str, tuple[Tensor, float]]:
    """The parameters, each with the scale of its update."""
    return {
        f"{'.'.join(filter(None, (path, part)))}.{key}": (parameter, own.scale)
        for path, update in updates.items()
        for part, own in update.parts().items()
        for key, parameter in own.named_parameters()
        if not isinstance(own, Tied)  # it has those of another layer
    }
