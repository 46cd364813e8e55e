"""LoRA (Hu et al. 2021, arXiv:2106.09685), with rsLoRA's scale."""

import math
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
from veneer.core.start import FROM_DATA, FROM_THE_START, FROM_WEIGHT, PLAIN, start, start_from_weight
from veneer.core.update import Factors, Option, Update, own_precision, switch

if TYPE_CHECKING:
    from veneer.core.search import Search


class Lora(Update):
    """ΔW = scale · B A, with A `(r, in)`, B `(out, r)` and scale = α / r, or α / √r with rsLoRA.

    Where A and B start from W (PiSSA, OLoRA) or its gradient (LoRA-GA), ΔW = scale · (B A - B₀ A₀) is counted from the
    start, and the base is never touched: its trajectory is that of B A on the base W - scale · B₀ A₀. It is a LoRA of
    rank 2r, [B - B₀, B₀] [A; A - A₀], which is zero to the bit at the start, and is computed and saved as such.

    With `freeze_A`, only B learns (LoRA-FA, Zhang et al. 2023, arXiv:2308.03303). With `lora_bias`, B has a bias b
    `(out)`, which starts at 0: Δb = scale · b. The layers that `fused` names are changed in their parts, each with a
    rank of its own (`PartedLora`).
    """

    file_names: ClassVar = {"A": "lora_A.weight", "B": "lora_B.weight", "b": "lora_B.bias"}
    reads_weight: ClassVar = False
    forms: ClassVar = {"A": "A", "B": "B"}
    options: ClassVar = {
        "freeze_A": switch(False),
        "lora_bias": switch(False),
        "fused": Option({}, lambda value: is_fused(value), '{name: ranks of its parts}, as {"c_attn": [8, 0, 4]}'),
    }
    peft_names: ClassVar = {"freeze_A": None, "fused": None}
    faster: ClassVar[tuple[str, ...]] = ("B",)
    starts: ClassVar = (*PLAIN, "orthogonal", *FROM_WEIGHT, *FROM_DATA)
    A: nn.Parameter
    B: nn.Parameter
    A0: Tensor  # only where the change is counted from the start
    B0: Tensor

    def __init__(self, weight: Tensor, config: LoraConfig) -> None:
        super().__init__()
        (rows, columns), dtype = weight.shape, own_precision(weight)
        A, B = (weight.new_empty(size, dtype=dtype) for size in ((config.r, columns), (rows, config.r)))
        self._parameters.update(A=nn.Parameter(A), B=nn.Parameter(B))  # a third of the time of registering them
        if config.options["lora_bias"]:
            self.register_parameter("b", nn.Parameter(weight.new_zeros(rows, dtype=dtype)))
        how = start_of(config)
        saved = self.saved_config(config) if how in FROM_THE_START else config
        simple = type(self) is Lora and how not in FROM_THE_START and not config.options["lora_bias"]
        vars(self).update(scale=scaling(saved.r, saved.lora_alpha, saved.use_rslora), simple=simple)
        if how in FROM_WEIGHT:
            start_from_weight(self.A, self.B, str(config.init_lora_weights), weight, self.scale)
        else:
            start(self.A, self.B, config.init_lora_weights)
        if how in FROM_THE_START:
            self.register_buffer("A0", self.A.detach().clone())
            self.register_buffer("B0", self.B.detach().clone())
        if config.options["freeze_A"]:
            self.A.requires_grad_(False)

    def factors(self) -> Factors:
        if "A0" not in self._buffers:
            return Factors(self.A, self.B, self.scale)
        A = torch.cat([self.A, self.A - self.A0])
        return Factors(A, torch.cat([self.B - self.B0, self.B0], dim=1), self.scale)

    @classmethod
    def shifts(cls, config: LoraConfig) -> bool:
        return config.options["lora_bias"]

    def shift(self, bias: Tensor | None) -> Tensor | None:
        b = self._parameters.get("b")
        return None if b is None else self.scale * b

    @torch.no_grad()
    def start_at(self, A: Tensor, B: Tensor) -> None:
        """Start again, from these; the change is zero to the bit if B is, or if it is counted from the start."""
        self.A.data, self.B.data = (new.to(self.A.dtype, copy=True).contiguous() for new in (A, B))  # of any rank
        if "A0" in self._buffers:
            self.A0.copy_(self.A)
            self.B0.copy_(self.B)

    def tensors(self) -> dict[str, Tensor]:
        A, B, _ = self.factors()
        b = self._parameters.get("b")
        return {"A": A.detach(), "B": B.detach(), **({} if b is None else {"b": b.detach()})}

    @classmethod
    def placed(cls, config: LoraConfig, search: "Search", paths: list[str]) -> dict[str, dict[str, Any]]:
        """The options of each layer, whose `fused` is `{path: {"r": …, "sizes": …}}` or nothing."""
        names = config.options["fused"]
        if not names:
            return {}
        fused: dict[str, Any] = {path: {} for path in paths}
        for path, name in search.named(names, "fused", paths, "adapted layer").items():
            known = _known(search.modules, path)
            split = {"sizes": known, **_spelt(names[name])}
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

    @classmethod
    def saved_config(cls, config: LoraConfig) -> LoraConfig:
        how = start_of(config)
        if how not in FROM_THE_START:
            return ordinary(replace(config, init_lora_weights=True) if how in FROM_DATA else config)
        more = math.sqrt(2) if config.use_rslora else 2  # that the scale is the same at twice the rank
        return replace(
            config,
            r=2 * config.r,
            lora_alpha=more * config.lora_alpha,
            rank_pattern={key: 2 * r for key, r in config.rank_pattern.items()},
            alpha_pattern={key: more * alpha for key, alpha in config.alpha_pattern.items()},
            init_lora_weights=True,
        )


class PartedLora(Lora):
    """ΔW = the rows of ΔWₚ for each part p of W's rows, ΔWₚ = scaleₚ · Bₚ Aₚ with a rank rₚ of its own, or 0: loralib's
    `MergedLinear`, for any ranks, sizes and interleaving.

    A `(Σ rₚ, in)` holds all Aₚ, and Bₚ is `(rows of p, rₚ)`; scaleₚ = α / rₚ, or α / √rₚ with rsLoRA. As a whole it is
    a LoRA of rank Σ rₚ, whose B `(out, Σ rₚ)` is zero outside of the parts' blocks; it is computed and saved as such.
    Read back it is one, and all of B trains. Raises `AdapterError` when the parts do not fill W's rows.
    """

    def __init__(self, weight: Tensor, config: LoraConfig) -> None:
        nn.Module.__init__(self)
        ((path, split),) = config.options["fused"].items()
        self.ranks, self.sizes = split["r"], split["sizes"]
        (rows, columns), dtype, total = weight.shape, own_precision(weight), sum(self.ranks)
        if rows % sum(self.sizes) or len(self.ranks) != len(self.sizes):
            raise AdapterError(
                f"fused: {path} has {rows} rows in parts of {shown(self.sizes)}, which do not fill it with ranks "
                f"{shown(self.ranks)}, one for each part"
            )
        self.repeats = rows // sum(self.sizes)
        self.scale = scaling(total, config.lora_alpha, config.use_rslora)
        self.A = nn.Parameter(weight.new_empty(total, columns, dtype=dtype))
        if config.options["lora_bias"]:
            self.b = nn.Parameter(weight.new_zeros(rows, dtype=dtype))
        self.shares = {}  # scaleₚ / scale
        for part, (r, size) in enumerate(zip(self.ranks, self.sizes, strict=True)):
            if r:
                B = weight.new_empty(self.repeats * size, r, dtype=dtype)
                self.register_parameter(f"B{part}", nn.Parameter(B))
                start(self.A.detach().split(self.ranks)[part], B, config.init_lora_weights)
                self.shares[part] = scaling(r, 1, config.use_rslora) / scaling(total, 1, config.use_rslora)
        self.faster = tuple(f"B{part}" for part in self.shares)  # type: ignore[misc]
        self.A.requires_grad_(not config.options["freeze_A"])

    def factors(self) -> Factors:
        before, blocks, total = 0, [], len(self.A)
        for part, (r, size) in enumerate(zip(self.ranks, self.sizes, strict=True)):
            B = self.shares[part] * self.get_parameter(f"B{part}") if r else self.A.new_zeros(self.repeats * size, 0)
            blocks.append(F.pad(B.view(self.repeats, size, r), (before, total - before - r)))  # (repeats, size, Σ r)
            before += r
        return Factors(self.A, torch.cat(blocks, 1).flatten(0, 1), self.scale)


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
