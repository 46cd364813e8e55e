"""`Adapter`: plain data, no model. Config + tensors by layer path."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from veneer.core.config import LoraConfig


@dataclass
class Adapter:
    """What a file holds, and what combining and analysing work on.

    `tensors[path][name]` is the parameter `name` of the method (`A`, `B`, …) for the layer at `path`; what all layers
    share stands under "". `embeddings` are the paths of lookup tables, whose tensors PEFT's files name otherwise;
    `bases` are tables of the base that PEFT's files repeat; `faults` is what is wrong with the file that it is from.
    `metadata` is what the file says of itself (a kohya file's `ss_…`, `modelspec.…`). Of a pipeline's adapter, `parts`
    are those that the first word of each path names: "unet", "text_encoder", …; of one model's, there are none.
    """

    config: LoraConfig
    tensors: dict[str, dict[str, Tensor]]
    embeddings: frozenset[str] = frozenset()
    bases: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    parts: tuple[str, ...] = ()
    faults: list[str] = field(default_factory=list, repr=False)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `adapter_config.json` and `adapter_model.safetensors`, both whole or not at all.

        PEFT reads them where it can say the same: it has no FULL, one method for all layers, and DoRA on rows.

        Killed at any moment, it leaves the old adapter or the new one, and never one's config with the other's tensors.

        Raises `AdapterError` when the folder cannot be written, or the adapter is that of several `parts`.
        """
        from veneer.files.folder import save

        return save(self, Path(folder))

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Adapter":
        """Read a PEFT folder. Raises `AdapterError` that says all that is missing or wrong in it."""
        from veneer.files.folder import load

        return load(Path(folder))

    @classmethod
    def examined(cls, folder: str | os.PathLike[str]) -> "Adapter":
        """The same with its `faults`, for what does not fit a model to be told with them; no value is read yet.

        Raises `AdapterError` when there is no config or no tensors to go on with.
        """
        from veneer.files.folder import examine

        return examine(Path(folder))
