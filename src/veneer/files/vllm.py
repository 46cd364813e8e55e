"""PEFT's folder as vLLM serves it: which of its rules an adapter breaks, and what meets them to the bit.

vLLM (0.4 to 0.17) reads LoRA alone, on linear layers and embeddings, with the one `r` and `lora_alpha` of the config
for all layers: patterns it drops in silence, so here they are folded into B and the ranks filled up with zeros.
"""

import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from veneer.apart.changes import Change, adapter_of, beside, changes, checked
from veneer.core.adapter import Adapter
from veneer.core.config import LoraConfig, scaling
from veneer.core.errors import AdapterError, collapsed, listed
from veneer.files.factors import folded

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank may be; 1 in newer versions
_SERVE_MERGED = "merge it into its base (veneer merge) and serve that"
_RESIZE = "make it a plain LoRA (veneer resize --rank R)"


class Export(NamedTuple):
    """What was written, and how vLLM is to be started."""

    path: Path
    r: int
    max_lora_rank: int
    notes: list[str]  # what was changed to meet its rules


def export(adapter: Adapter, path: str | os.PathLike[str], *, pad_rank: bool = False, force: bool = False) -> Export:
    """Write the folder that vLLM reads; with `pad_rank`, of the next rank that `--max-lora-rank` can be.

    Raises `AdapterError` that names every rule that fails, each with the way out; nothing is written then.
    """
    from veneer import files  # which knows formats, and this is none

    checked(changes(adapter))
    if broken := broken_rules(adapter):
        raise AdapterError("\n".join(["vLLM would not serve this adapter:", *(f"- {rule}" for rule in broken)]))
    fitted, notes = _fitted(adapter, pad_rank)
    r = fitted.config.r
    return Export(files.write(fitted, path, "peft", force), r, next(rank for rank in RANKS if rank >= r), notes)


def broken_rules(adapter: Adapter) -> list[str]:
    """What of the adapter vLLM does not take, a sentence each, with the way out."""
    if adapter.parts:
        return [f"it is of a pipeline's parts ({listed(adapter.parts, say=str)}), and vLLM serves language models"]
    every, rest, config = changes(adapter), beside(adapter), adapter.config
    told: list[tuple[str, list[str]]] = []
    for method in dict.fromkeys(change.config.peft_type for change in every.values()):
        paths = [path for path, change in every.items() if change.config.peft_type == method]
        told += [] if method == "LORA" else [(f"{method} is not LoRA: {_RESIZE}", paths)]
    loras = {path: change for path, change in every.items() if change.config.peft_type == "LORA"}
    wide = [path for path, change in loras.items() if change.config.r > RANKS[-1]]
    told += [
        (f"no DoRA: {_RESIZE} or {_SERVE_MERGED}", [path for path, own in every.items() if own.config.use_dora]),
        (f"no lora_bias: {_SERVE_MERGED}", [path for path, own in loras.items() if "b" in own.tensors]),
        (f"no convolutions: {_SERVE_MERGED}", [path for path, own in loras.items() if own.tensors["A"].ndim > 2]),
        (f"no parts of nn.MultiheadAttention: {_SERVE_MERGED}", [path for path in loras if ".base_layer" in path]),
        (f"a rank of at most {RANKS[-1]}: veneer resize --rank {RANKS[-1]}", wide),
    ]
    biases = [path for path, own in rest.items() if path.endswith(".bias") and config.bias != "none"]
    tokens = [path for path, own in rest.items() if "rows" in own]
    stacks = [path for path, own in rest.items() if not own.keys() & {"rows", "value"}]
    whole = [path for path in rest if path not in {*biases, *tokens, *stacks}]
    told += [
        (f"no modules_to_save: {_SERVE_MERGED}", whole),
        (f'bias="none" alone: {_SERVE_MERGED}', biases),
        (f"no trainable_token_indices: {_SERVE_MERGED}", tokens),
        (f"no target_parameters, which its versions read differently: {_SERVE_MERGED}", stacks),
    ]
    return [f"{rule} ({collapsed(paths, 8)})" for rule, paths in told if paths]


def _fitted(adapter: Adapter, pad_rank: bool) -> tuple[Adapter, list[str]]:
    """The same changes of one rank and one scale, and what was done for that."""
    every, notes = changes(adapter), []
    scales = {path: scaling(own.config.r, own.config.lora_alpha, own.config.use_rslora) for path, own in every.items()}
    ranks = {own.config.r for own in every.values()}
    r, ((scale, _),) = max(ranks), Counter(filter(None, scales.values())).most_common(1) or [(1.0, 0)]
    if pad_rank:
        r = next(rank for rank in RANKS if rank >= r)
    if ranks != {r}:
        notes.append(f"ranks {listed(sorted(ranks), say=str)} are filled up with zeros to {r}")
    if len(set(scales.values())) > 1:
        notes.append(f"{len(set(scales.values()))} scales became one, {scale:g}, the rest of each is in B")
    one = len({(own.config.r, own.config.lora_alpha, own.config.use_rslora) for own in every.values()}) == 1
    if one and ranks == {r}:
        config = next(iter(every.values())).config
    else:
        alpha = scale * r
        config = LoraConfig(r=r, lora_alpha=int(alpha) if alpha == int(alpha) else alpha)
    made = {path: Change(config, _filled(own.tensors, r, scales[path] / scale)) for path, own in every.items()}
    base, task_type = adapter.config.base_model_name_or_path, adapter.config.task_type
    fitted = adapter_of(made, metadata=adapter.metadata, embeddings=adapter.embeddings, base=base, task_type=task_type)
    return fitted, notes


def _filled(own: dict[str, Tensor], r: int, scale: float) -> dict[str, Tensor]:
    A, B = folded(own["A"], own["B"], scale)
    return {"A": F.pad(A, (0, 0, 0, r - len(A))), "B": F.pad(B, (0, r - B.shape[1]))}
