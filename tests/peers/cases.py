"""`Case`: a file of known factors, the change that it means, and what a peer makes of it where it errs."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from peers.pipelines import Deltas


@dataclass
class Case:
    """`tensors` and `metadata` are the file's; `wanted` is the formula's ΔW for every weight that it changes.

    `peer` reads it too. In the weights that `mistaken` names it finds that ΔW in place of the wanted one; `refused` is
    what it says where it reads nothing. `part` is the one model that the file is for, where it is not for a pipeline;
    `config` makes it a PEFT folder; `asked` is what veneer must be told. A `.pt` is a pickle: of names and tensors, or
    of the tensors alone where the names would say what a header does.
    """

    family: str
    peer: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    wanted: Deltas = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    mistaken: Deltas = field(default_factory=dict)
    refused: str = ""
    part: str = ""
    config: dict[str, object] = field(default_factory=dict)
    asked: dict[str, object] = field(default_factory=dict)
    suffix: str = ".safetensors"

    def write(self, folder: Path) -> Path:
        """The file, or the folder for a PEFT adapter."""
        if self.config:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "adapter_config.json").write_text(json.dumps(self.config))
            save_file(self.tensors, folder / "adapter_model.safetensors", {"format": "pt"})
            return folder
        path = folder / f"lora{self.suffix}"
        if self.suffix == ".pt":
            torch.save(list(self.tensors.values()) if self.metadata else self.tensors, path)
        else:
            save_file(self.tensors, path, self.metadata or None)
        return path

    def found_by_peer(self) -> Deltas:
        """What the peer is expected to find; weights that it leaves alone are not named."""
        found = {**self.wanted, **self.mistaken}
        return {name: delta for name, delta in found.items() if delta.any()}

    def mistakes(self, factors: Mapping[str, float]) -> None:
        """The peer multiplies the changes of these weights by these factors."""
        self.mistaken |= {name: self.wanted[name] * factor for name, factor in factors.items() if factor != 1}


Builders = dict[str, Callable[[], Case]]


def commonest(values: Iterable[float]) -> float:
    """The value that stands there most often, and of several the first."""
    counted = list(values)
    return max(dict.fromkeys(counted), key=counted.count)
