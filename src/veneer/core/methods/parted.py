"""Which parts a fused projection has, and which ranks the config gives them."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from veneer.core.config import LoraConfig
from veneer.core.errors import shown
from veneer.core.ranges import start_of
from veneer.core.start import FROM_DATA, FROM_WEIGHT

if TYPE_CHECKING:
    from veneer.core.search import Search

_MOST = 1_000  # names of fused layers

# How transformers splits its projections: the rows of the parts, which repeat where the heads are interleaved.
_KNOWN: dict[str, Callable[[Any], list[int]]] = {
    "GPT2Attention.c_attn": lambda own: [own.split_size] * (2 if own.is_cross_attention else 3),
    "Phi3Attention.qkv_proj": lambda own: [
        own.head_dim * heads for heads in (own.config.num_attention_heads, *[own.num_key_value_heads] * 2)
    ],
    "Phi3MLP.gate_up_proj": lambda own: [own.config.intermediate_size] * 2,
    "GPTNeoXAttention.query_key_value": lambda own: [own.head_size] * 3,
    "BloomAttention.query_key_value": lambda own: [own.head_dim] * 3,
    "FalconAttention.query_key_value": lambda own: [
        own.head_dim * heads
        for heads in (own.num_heads // own.num_kv_heads if own.new_decoder_architecture or own.multi_query else 1, 1, 1)
    ],
}


def is_fused(value: object) -> bool:
    """Whether it is `{name: ranks}`, or `{name: {"r": ranks, "sizes": rows}}`."""
    if not isinstance(value, dict) or len(value) > _MOST:
        return False
    return all(isinstance(name, str) and name and _is_split(**_spelt(split)) for name, split in value.items())


def _is_split(r: Any = None, sizes: Any = (1,), **more: Any) -> bool:
    lists = isinstance(r, list) and isinstance(sizes, (list, tuple)) and not more
    return lists and all(type(n) is int and 0 <= n <= 2**20 for n in (*r, *sizes)) and any(r) and all(sizes)


def _spelt(split: Any) -> dict[str, Any]:
    return {str(key): value for key, value in split.items()} if isinstance(split, dict) else {"r": split}


def placed(config: LoraConfig, search: "Search", paths: list[str]) -> dict[str, dict[str, Any]]:
    """The options of each layer, whose `fused` is `{path: {"r": …, "sizes": …}}` or nothing."""
    fused: dict[str, Any] = {path: {} for path in paths}
    for path, name in search.named(config.options["fused"], "fused", paths, "adapted layer").items():
        known = _known(search.modules, path)
        split = {"sizes": known, **_spelt(config.options["fused"][name])}
        fused[path] = {path: split}
        if split["sizes"] is None:
            search.fault(
                "fused",
                f"how {path} is split is not known: give {{'r': …, 'sizes': …}}, sizes being the rows of "
                "its parts (of one head's, where the heads are interleaved)",
            )
        elif known and split["sizes"] != known:
            search.fault("fused", f"{path} is split into parts of {known} rows, not of {shown(split['sizes'])}")
    if start_of(config) in (*FROM_WEIGHT, *FROM_DATA):
        how = config.init_lora_weights
        search.fault("fused", f"parts cannot start from the weight or from data, as init_lora_weights={how!r} asks")
    return {path: {"options": {**config.options, "fused": split}} for path, split in fused.items()}


def _known(modules: Mapping[str, nn.Module], path: str) -> list[int] | None:
    holder, _, name = path.rpartition(".")
    own = modules.get(holder)
    split = _KNOWN.get(f"{type(own).__name__}.{name}")
    return split(own) if split and type(own).__module__.startswith("transformers.") else None


def ordinary(config: LoraConfig) -> LoraConfig:
    """The config of the same adapter as a LoRA: the ranks of the fused layers are those of all their parts."""
    ranks = {re.escape(name): sum(_spelt(split)["r"]) for name, split in config.options["fused"].items()}
    others = {key: r for key, r in config.rank_pattern.items() if key not in ranks}
    return replace(config, rank_pattern=ranks | others, options={**config.options, "fused": {}}) if ranks else config
