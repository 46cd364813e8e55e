"""PEFT's folder: `adapter_config.json` and `adapter_model.safetensors`."""

from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from veneer.core.adapter import Adapter, examine

NAME = "peft"


def detects(names: Collection[str], about: Mapping[str, str]) -> bool:
    """Whether the layers' names are PEFT's."""
    return any(name.startswith("base_model.") for name in names)


def read(tensors: Mapping[str, Tensor], about: Mapping[str, str], where: str) -> Adapter:
    """The adapter of a folder. Raises `AdapterError`."""
    return examine(where)


def write(adapter: Adapter, path: Path) -> None:
    """Raises `AdapterError` when the folder cannot be written."""
    adapter.save(path)
