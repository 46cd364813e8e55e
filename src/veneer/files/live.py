"""`PeftModel.save_pretrained`: adapters of a live model into folders, and what transformers' Trainer resumes from."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

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
