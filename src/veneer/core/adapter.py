"""`Adapter`: plain data, no model. Config + tensors by layer path, and veneer's own folder, which is PEFT's."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from veneer.core.config import LoraConfig
from veneer.core.errors import AdapterError, nearest
from veneer.core.methods import file_names
from veneer.core.whole import write_whole

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_ON_EMBEDDINGS = {"lora_A.weight": "lora_embedding_A", "lora_B.weight": "lora_embedding_B"}  # PEFT's names there
_MODEL = "base_model"


@dataclass
class Adapter:
    """What a file holds, and what combining and analysing work on.

    `tensors[path][name]` is the parameter `name` of the method (`A`, `B`, …) for the layer at `path`; what all layers
    share stands under "". `embeddings` are the paths of lookup tables, whose tensors PEFT's files name otherwise.
    """

    config: LoraConfig
    tensors: dict[str, dict[str, Tensor]]
    embeddings: frozenset[str] = frozenset()

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `adapter_config.json` and `adapter_model.safetensors`, as PEFT reads them; both whole or not at all.

        Raises `AdapterError` when the folder cannot be written.
        """
        names = file_names(self.config)
        flat = {
            f"{_prefix(path)}.{_ending(names[name], path in self.embeddings)}": tensor.detach().contiguous().cpu()
            for path, tensors in self.tensors.items()
            for name, tensor in tensors.items()
        }
        text = json.dumps(self.config.to_dict(), indent=2, sort_keys=True) + "\n"
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(
                {
                    folder / WEIGHTS: lambda path: save_file(flat, path, metadata={"format": "pt"}),
                    folder / CONFIG: lambda path: path.write_text(text, encoding="utf-8"),
                }
            )
        except (OSError, SafetensorError) as error:
            raise AdapterError(f"cannot write the adapter to {folder}: {error}") from error
        return folder

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Adapter":
        """Read a PEFT folder. Raises `AdapterError` that says what is missing or wrong in it."""
        folder = Path(folder)
        config = read_config(folder)
        try:
            flat = load_file(_existing(folder, WEIGHTS))
        except (SafetensorError, OSError) as error:
            raise AdapterError(f"{folder / WEIGHTS} is not a whole safetensors file: {error}") from None
        endings = {ending: name for name, ending in file_names(config).items()}
        lookups = {_ON_EMBEDDINGS[ending]: name for ending, name in endings.items() if ending in _ON_EMBEDDINGS}
        endings |= lookups
        if config.use_dora:
            endings["lora_magnitude_vector.weight"] = "magnitude"  # as PEFT's readers take it too
        embeddings = set()
        tensors: dict[str, dict[str, Tensor]] = {}
        strangers, broken = [], []
        for key, tensor in flat.items():
            match = re.fullmatch(rf"{_MODEL}(?:\.model\.(.+))?\.({'|'.join(map(re.escape, endings))})", key)
            if match is None:
                strangers.append(key)
                continue
            tensors.setdefault(match[1] or "", {})[endings[match[2]]] = tensor
            if match[2] in lookups:
                embeddings.add(match[1])
            if not torch.isfinite(tensor).all():
                broken.append(key)
        problems = [f"unexpected tensors: {collapsed(strangers)}"] if strangers else []
        problems += [f"NaN or infinity in: {collapsed(broken)}"] if broken else []
        if problems:
            raise AdapterError(f"{folder / WEIGHTS}: " + "; ".join(problems))
        return cls(config, tensors, frozenset(embeddings))


def read_config(folder: Path) -> LoraConfig:
    """The config of a PEFT folder. Raises `AdapterError`."""
    path = _existing(folder, CONFIG)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise AdapterError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise AdapterError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return LoraConfig.from_dict(values, where=str(path))


def _prefix(path: str) -> str:
    return f"{_MODEL}.model.{path}" if path else _MODEL


def _ending(ending: str, of_embedding: bool) -> str:
    return _ON_EMBEDDINGS.get(ending, ending) if of_embedding else ending


def _existing(folder: Path, name: str) -> Path:
    if not folder.is_dir():
        siblings = [str(sibling) for sibling in folder.parent.glob("*")] if folder.parent.is_dir() else []
        raise AdapterError(f"adapter folder {folder} does not exist{nearest(str(folder), siblings)}")
    if not (folder / name).is_file():
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise AdapterError(f"{folder} is not an adapter folder: no {name}; it holds {there}")
    return folder / name


def collapsed(names: Iterable[str]) -> str:
    """Every name, with runs that differ only in numbers told once: `layers.*.q_proj.A (30)`."""
    counts = Counter(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in names)
    return ", ".join(f"{name} ({count})" if count > 1 else name for name, count in counts.items())
