"""The adapters of a live model and their folders: how they are saved, and read into those that act."""

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from veneer.core.adapter import Adapter
from veneer.core.errors import AdapterError, collapsed
from veneer.core.inject import carrying, entries, prepared, said
from veneer.core.trainer import own_state
from veneer.files.folder import put
from veneer.safe.ordered import save_ordered

if TYPE_CHECKING:
    from veneer.core.trainer import Trainable

# all that adapters are, to the bit and under the model's own names: what Trainer reads back into a model that is not of
# PEFT's own class
_STATE = "model.safetensors"


def save(model: "Trainable", folder: Path, adapter_name: str | None, is_main_process: bool) -> Path:
    """What `save_pretrained` says."""
    acting = model.active_adapters
    resumable = re.fullmatch(r"checkpoint-\d+", folder.name) is not None
    several = resumable and len(acting) > 1 and adapter_name is None
    names = {folder / name: name for name in acting} if several else {folder: adapter_name}
    adapters = {path: model.get_adapter(name) for path, name in names.items()}
    state = own_state(model) if resumable else {}
    if is_main_process:
        for path, adapter in adapters.items():
            adapter.save(path)
        if resumable:
            put({folder / _STATE: lambda path: save_ordered(state, path, {"format": "pt"})}, folder)
    return folder


@torch.no_grad()
def hotswap(model: "Trainable", name: str, values: Adapter) -> None:
    """Copy `values` into the live adapter `name`: compiled code, CUDA graphs and optimizers go on with its tensors.

    A smaller rank is filled up with zeros. The live scale stays, as compiled code holds it: B is multiplied by the
    ratio of the scales. So the config stays too, and what is saved gives the same outputs. Raises one `AdapterError`
    with all that does not fit, before anything is copied.
    """
    config, found, faults = model.peft_config[name], values.config, values.faults
    loras = all(each.peft_type == "LORA" for own in (config, found) for each in own.by_method())
    if not loras or found.use_dora != config.use_dora:
        one, other = (own.peft_type + " with use_dora" * own.use_dora for own in (config, found))
        differ = f"{name!r} is {one} and the other is {other}"
        faults.append(f"{differ}: one LORA is hot-swapped with another, use_dora alike")
    elif replace(config.method.saved_config(config), init_lora_weights=config.init_lora_weights) != config:
        faults.append(f"{name!r} did not start as the LoRA that its file holds, so it cannot be swapped: load it again")
    if found.trainable_token_indices != config.trainable_token_indices:
        faults.append("trainable_token_indices are other tokens than the live adapter's")
    live, new = entries(carrying(model, name)), entries(prepared(model, values)[0])
    fitted, larger = {}, []
    for key in [key for key in live if key in new]:
        (own, *_, scale), (value, *_, its_scale) = live[key], new[key]
        if value.ndim != own.ndim or any(found > room for found, room in zip(value.shape, own.shape, strict=True)):
            larger.append(key)
            continue
        if key[1] in ("B", "b"):
            value = value * (its_scale / scale if scale else torch.nan)
        fitted[key] = torch.zeros_like(own, dtype=value.dtype)
        fitted[key][tuple(map(slice, value.shape))] = value
    told = {
        "only in one of the two": [key for key in [*live, *new] if key not in live or key not in new],
        "of another form or a larger rank than the live one": larger,
        "cannot be told at the live scale": [key for key, value in fitted.items() if not value.isfinite().all()],
    }
    if faults := [f"{what}: {collapsed(map(said, keys))}" for what, keys in told.items() if keys]:
        raise AdapterError(f"{name!r} cannot be hot-swapped: " + "; ".join(faults))
    for key, value in fitted.items():
        live[key].tensor.copy_(value)
