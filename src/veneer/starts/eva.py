"""EVA (Paischer et al. 2024, arXiv:2410.07170): LoRA's A starts at what its inputs vary along."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.core.config import LoraConfig, scaling
from veneer.core.errors import AdapterError, shown
from veneer.core.methods.lora import Lora
from veneer.core.model import PeftModel
from veneer.core.ranges import is_finite
from veneer.starts.fresh import MEMORY, base_alone, fresh, in_groups, outputs_of


def tokens_that_count(batch: Any) -> Tensor | None:
    """`(batch, tokens)`: neither padding nor left out of the loss; None where a batch says nothing of it."""
    named = batch if isinstance(batch, Mapping) else {}
    masks = [named[key] != no for key, no in (("attention_mask", 0), ("labels", -100)) if key in named]
    return torch.stack(masks).all(0) if masks and len({mask.shape for mask in masks}) == 1 else None


@torch.no_grad()
def initialize_lora_eva_weights(
    model: PeftModel,
    batches: Iterable[Any],
    adapter_name: str = "default",
    rho: float = 1.0,
    counts: Callable[[Any], Tensor | None] = tokens_that_count,
    memory: int = MEMORY,
) -> None:
    """A = the first r right-singular vectors of X - μ, B = 0.

    X `(tokens, in)` are the layer's inputs in all the batches, μ their mean. The vectors are exact: they come from
    Σ x xᵀ in fp64, which is made once for layers that share their inputs. `counts(batch)` says which tokens count; an
    input of another shape counts whole.

    With `rho` above 1, the sum of all ranks is dealt out anew, to the vectors that explain the largest shares of their
    layers' variance: a layer gets from 1 to rho · r of them, and `lora_alpha` such that its scale stays as it was.
    Raises `AdapterError`, with nothing changed.
    """
    batches, layers, loras = fresh(model, adapter_name, "eva", batches)
    if not is_finite(rho) or rho < 1:
        raise AdapterError(f"rho should be a number of at least 1, found {shown(rho)}")
    most = {path: min(round(rho * len(lora.A)), *lora.A.shape[1:]) for path, lora in loras.items()}
    found: dict[str, tuple[Tensor, Tensor]] = {}
    mask: Tensor | None = None

    def add(sums: Tensor, x: Tensor) -> None:
        x = x[mask.to(x.device)] if mask is not None and mask.shape == x.shape[:-1] else x
        x = F.pad(x.reshape(-1, x.shape[-1]).to(torch.float64), (0, 1), value=1.0)  # (tokens, in + 1)
        sums.addmm_(x.t(), x)

    with base_alone(model):
        firsts = _shared(model, layers, batches[0])
        widths = {path: loras[path].A.shape[1] + 1 for path in firsts.values()}
        for group in in_groups({path: 8 * width**2 for path, width in widths.items()}, memory):
            sums = {path: loras[path].A.new_zeros(widths[path], widths[path], dtype=torch.float64) for path in group}
            with _seeing({path: layers[path] for path in group}, lambda path, x: add(sums[path], x)):  # noqa: B023
                for batch in batches:
                    mask = counts(batch)
                    outputs_of(model, batch)
            for path, own in sums.items():
                found[path] = _directions(own, max(most[other] for other in firsts if firsts[other] == path), path)
    ranks = {path: len(lora.A) for path, lora in loras.items()}
    if rho > 1:
        ranks = _dealt({path: found[firsts[path]][1][: most[path]] for path in firsts}, sum(ranks.values()))
        model.peft_config[adapter_name] = _with_ranks(model.peft_config[adapter_name], ranks, loras)
    for path, lora in loras.items():
        lora.start_at(found[firsts[path]][0][: ranks[path]], lora.B.new_zeros(len(lora.B), ranks[path]))


def _directions(sums: Tensor, r: int, path: str) -> tuple[Tensor, Tensor]:
    """Those of the largest variance first `(r, in)`, and their shares of it `(r)`; the inputs' last number is 1."""
    tokens = int(sums[-1, -1])
    if tokens <= r or not sums.isfinite().all():
        raise AdapterError(f"{path} should see more than r={r} tokens, all finite, found {tokens} in these batches")
    covariance = sums[:-1, :-1] - torch.outer(sums[-1, :-1], sums[-1, :-1]) / tokens
    variances, vectors = torch.linalg.eigh(covariance)
    return vectors[:, -r:].flip(1).t(), variances[-r:].flip(0) / variances.sum()


def _dealt(shares: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """How many of each layer's shares are among the largest; the first of each is."""
    others = [(-share, path) for path, own in shares.items() for share in own[1:].tolist()]
    return Counter([*shares, *(path for _, path in sorted(others)[: budget - len(shares)])])


def _with_ranks(config: LoraConfig, ranks: Mapping[str, int], loras: Mapping[str, Lora]) -> LoraConfig:
    """The config as it reads when these layers have these ranks, and the scales that they had."""
    alphas = {path: loras[path].scale / scaling(r, 1.0, config.use_rslora) for path, r in ranks.items()}
    return replace(
        config,
        rank_pattern={f"^{re.escape(path)}": r for path, r in ranks.items()},
        alpha_pattern={f"^{re.escape(path)}": alpha for path, alpha in alphas.items()},
    )


@contextmanager
def _seeing(layers: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Inside, `see(path, x)` is called with each input of each layer."""

    def hook(path: str) -> Callable[..., None]:
        return lambda _, inputs, named: see(path, inputs[0] if inputs else next(iter(named.values())))

    with ExitStack() as hooks:
        for path, layer in layers.items():
            hooks.callback(layer.register_forward_pre_hook(hook(path), with_kwargs=True).remove)
        yield


def _shared(model: nn.Module, layers: Mapping[str, nn.Module], batch: Any) -> dict[str, str]:
    """Path → the first path whose layer is called with the very same inputs, one after the other, as q, k and v are."""
    calls: dict[str, list[int]] = {path: [] for path in layers}
    inputs: list[Tensor | None] = [None]

    def see(path: str, x: Tensor) -> None:
        if x is not inputs[-1]:
            inputs[-1:] = [None, x]  # only the last one is held
        calls[path].append(len(inputs))

    with _seeing(layers, see):
        outputs_of(model, batch)
    firsts: dict[Any, str] = {}
    return {path: firsts.setdefault(tuple(numbers) or path, path) for path, numbers in calls.items()}
