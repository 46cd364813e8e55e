"""LoRA on the parts of a fused projection: loralib's `MergedLinear`, for any ranks, sizes and interleaving."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.core.config import LoraConfig, scaling
from veneer.core.errors import AdapterError, shown
from veneer.core.ranges import start_of
from veneer.core.start import FROM_DATA, FROM_WEIGHT, start
from veneer.core.update import Factors, Update, own_precision

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


class PartedLora(Update):
    """ΔW = the rows of ΔWₚ for each part p of W's rows, ΔWₚ = scaleₚ · Bₚ Aₚ with a rank rₚ of its own, or 0.

    A `(Σ rₚ, in)` holds all Aₚ, and Bₚ is `(rows of p, rₚ)`; scaleₚ = α / rₚ, or α / √rₚ with rsLoRA. As a whole it is
    a LoRA of rank Σ rₚ, whose B `(out, Σ rₚ)` is zero outside of the parts' blocks; it is computed and saved as such.
    Read back it is one, and all of B trains. Raises `AdapterError` when the parts do not fill W's rows.
    """

    file_names: ClassVar = {"A": "lora_A.weight", "B": "lora_B.weight", "b": "lora_B.bias"}
    forms: ClassVar = {"A": "A", "B": "B"}

    def __init__(self, weight: Tensor, config: LoraConfig) -> None:
        super().__init__()
        ((path, split),) = config.options["fused"].items()
        self.ranks, self.sizes = split["r"], split["sizes"]
        (rows, columns), dtype, total = weight.shape, own_precision(weight), sum(self.ranks)
        if rows % sum(self.sizes) or len(self.ranks) != len(self.sizes):
            raise AdapterError(
                f"fused: {path} has {rows} rows in parts of {shown(self.sizes)}, which do not fill it with ranks "
                f"{shown(self.ranks)}, one for each part"
            )
        self.repeats, self.dropout = rows // sum(self.sizes), config.lora_dropout
        self.scale = scaling(total, config.lora_alpha, config.use_rslora)
        self.A = nn.Parameter(weight.new_empty(total, columns, dtype=dtype))
        self.b = nn.Parameter(weight.new_zeros(rows, dtype=dtype)) if config.options["lora_bias"] else None
        self.shares = {}  # scaleₚ / scale
        for part, (r, size) in enumerate(zip(self.ranks, self.sizes, strict=True)):
            if r:
                B = weight.new_empty(self.repeats * size, r, dtype=dtype)
                self.register_parameter(f"B{part}", nn.Parameter(B))
                start(self.A.detach().split(self.ranks)[part], B, config.init_lora_weights)
                self.shares[part] = scaling(r, 1, config.use_rslora) / scaling(total, 1, config.use_rslora)
        self.faster = tuple(f"B{part}" for part in self.shares)  # type: ignore[misc]
        self.A.requires_grad_(not config.options["freeze_A"])

    def delta(self, weight: Tensor) -> Tensor:
        A, B, scale = self.factors()
        return scale * (B @ A)

    def factors(self) -> Factors:
        before, blocks, total = 0, [], len(self.A)
        for part, (r, size) in enumerate(zip(self.ranks, self.sizes, strict=True)):
            B = self.shares[part] * self.get_parameter(f"B{part}") if r else self.A.new_zeros(self.repeats * size, 0)
            blocks.append(F.pad(B.view(self.repeats, size, r), (before, total - before - r)))  # (repeats, size, Σ r)
            before += r
        return Factors(self.A, torch.cat(blocks, 1).flatten(0, 1), self.scale)

    def shift(self, bias: Tensor | None) -> Tensor | None:
        return None if self.b is None else self.scale * self.b

    def tensors(self) -> dict[str, Tensor]:
        A, B, _ = self.factors()
        return {"A": A.detach(), "B": B.detach(), **({} if self.b is None else {"b": self.b.detach()})}


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
