"""The adapter of a pipeline's parts on the disk: diffusers' one file; or a PEFT folder for each part, where that file
has no place for the method.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veneer import files
from veneer.apart.changes import Change, adapter_of, changes
from veneer.core.adapter import Adapter
from veneer.core.errors import AdapterError
from veneer.core.model import PeftModel
from veneer.files import diffusers
from veneer.files.attach import matched
from veneer.files.folder import content, put
from veneer.files.parts import by_part, joined
from veneer.files.stored import save
from veneer.safe.whole import Write

FILE = "pytorch_lora_weights.safetensors"  # which diffusers looks for


def adapter_of_parts(model: PeftModel, about: Mapping[str, str]) -> Adapter:
    """The adapter of a model whose children are a pipeline's parts, as files have it."""
    own = model.get_adapter()
    own.parts = tuple(dict.fromkeys(path.partition(".")[0] for path in own.tensors if path))
    own.metadata = dict(about)
    return joined(by_part(own))


def written(adapter: Adapter, folder: Path) -> dict[Path, Write]:
    """What `keep` writes there."""
    try:
        flat, about = diffusers.content(adapter)
    except AdapterError:  # no place for the method
        every = {folder / part: own for part, own in by_part(adapter).items()}
        return {path: write for place, own in every.items() for path, write in content(own, place).items()}
    return {folder / FILE: lambda path: save(flat, path, about)}


def keep(adapter: Adapter, folder: Path) -> None:
    """Write the adapter, whole or not at all. Raises `AdapterError`."""
    put(written(adapter, folder), folder)


def exchange(model: PeftModel, folder: Path, name: str = "default") -> None:
    """Let the model's adapter be the one that `keep` has written there. Raises `AdapterError` where it does not fit."""
    every, metadata = dict[str, Change](), dict[str, str]()
    for part, own in by_part(files.read(folder)).items():
        fitting = matched(model.get_submodule(part), own)
        every |= {f"{part}.{path}": change for path, change in changes(fitting).items()}
        metadata |= own.metadata
    what: Any = adapter_of(every, metadata=metadata, base=model.peft_config[name].base_model_name_or_path)
    model.delete_adapter(name)
    model.add_adapter(name, what)
    model.set_adapter(name)
