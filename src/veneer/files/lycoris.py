"""LyCORIS's files (Yeh et al. 2023, arXiv:2309.14859): LoRA, LoHa, LoKr, (IA)³ and whole changes, a method a layer.

Layers are called as in kohya's files, or `lycoris_…` where they are those of one model. Each has an α of its own.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path

from veneer.apart.changes import changes
from veneer.core.adapter import Adapter
from veneer.files.kohya import is_flat, is_lycoris, read, store
from veneer.files.kohya_layers import alpha_of, own_of

__all__ = ["NAME", "detects", "read", "write"]

NAME = "lycoris"
_ALGORITHMS = {"LORA": "locon", "LOHA": "loha", "LOKR": "lokr", "FULL": "full", "IA3": "ia3"}


def detects(names: Collection[str], about: Mapping[str, str]) -> bool:
    """Whether the layers' names are kohya's or LyCORIS's own, and some are of what LyCORIS alone has."""
    return any(map(is_flat, names)) and is_lycoris(names)


def write(adapter: Adapter, path: Path) -> None:
    """Write it, each layer in its own method's form. Raises `AdapterError` with all that the format cannot hold."""
    every = changes(adapter)
    configs = [change.config for change in every.values()]
    ranked = [config for config in configs if config.peft_type not in ("FULL", "IA3")]
    about = {
        "ss_network_module": "lycoris.kohya",
        "ss_network_dim": _one([config.r for config in ranked]),
        "ss_network_alpha": _one([alpha_of(config) for config in ranked]),
    }
    algorithms = {_ALGORITHMS.get(config.peft_type) for config in configs}
    if len(algorithms) == 1 and adapter.metadata.get("ss_network_module") != about["ss_network_module"]:
        about["ss_network_args"] = json.dumps({"algo": algorithms.pop()})
    store(adapter, every, path, own_of, about, NAME)


def _one(numbers: Collection[float]) -> str:
    """The number that all layers have; kohya's programs say "Dynamic" where they differ."""
    return str(next(iter(numbers))) if len(set(numbers)) == 1 else "Dynamic"
