"""LyCORIS's files (Yeh et al. 2023, arXiv:2309.14859): LoRA, LoHa, LoKr, (IA)³ and whole changes, a method a layer.

Layers are called as in kohya's files, or `lycoris_…` where they are those of one model. Each has an α of its own.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

from veneer.core.adapter import Adapter
from veneer.core.apart import changes
from veneer.files.kohya import is_flat, is_lycoris, network_args, read, store
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
    ranks = {change.config.r for change in every.values()}
    alphas = {alpha_of(change.config) for change in every.values()}
    about = {
        "ss_network_module": "lycoris.kohya",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(alphas.pop()) if len(alphas) == 1 else "Dynamic",
        "ss_network_args": network_args(_ALGORITHMS.get(change.config.peft_type, "") for change in every.values()),
    }
    store(adapter, every, path, own_of, about, NAME)
