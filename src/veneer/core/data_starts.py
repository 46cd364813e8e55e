"""Starting values of a fresh LoRA from a few batches: EVA and LoRA-GA. The base is not moved, and is left as it was."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.core.config import LoraConfig, scaling
from veneer.core.errors import AdapterError, collapsed, shown
from veneer.core.inject import adapted_layers
from veneer.core.methods import Lora
from veneer.core.model import PeftModel
from veneer.core.plan import terms_of
from veneer.core.ranges import is_finite

MEMORY = 2 << 30  # bytes of sums that are held at once; what is more takes another pass over the batches


def outputs_of(model: nn.Module, batch: Any) -> Any:
    """What the model gives for a batch of named inputs, of several, or of one."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


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
    """A = the first r right-singular vectors of X - μ, B = 0 (EVA, Paischer et al. 2024, arXiv:2410.07170).

    X `(tokens, in)` are the layer's inputs in all the batches, μ their mean. The vectors are exact: they come from
    Σ x xᵀ in fp64, which is made once for layers that share their inputs. `counts(batch)` says which tokens count; an
    input of another shape counts whole.

    With `rho` above 1, the sum of all ranks is dealt out anew, to the vectors that explain the largest shares of their
    layers' variance: a layer gets from 1 to rho · r of them, and `lora_alpha` such that its scale stays as it was.
    Raises `AdapterError`, with nothing changed.
    """
    batches, layers, loras = _fresh(model, adapter_name, "eva", batches)
    if not is_finite(rho) or rho < 1:
        raise AdapterError(f"rho should be a number of at least 1, found {shown(rho)}")
    most = {path: min(round(rho * len(lora.A)), *lora.A.shape[1:]) for path, lora in loras.items()}
    found: dict[str, tuple[Tensor, Tensor]] = {}
    mask: Tensor | None = None

    def add(sums: Tensor, x: Tensor) -> None:
        x = x[mask.to(x.device)] if mask is not None and mask.shape == x.shape[:-1] else x
        x = F.pad(x.reshape(-1, x.shape[-1]).to(torch.float64), (0, 1), value=1.0)  # (tokens, in + 1)
        sums.addmm_(x.t(), x)

    with _base_alone(model):
        firsts = _shared(model, layers, batches[0])
        widths = {path: loras[path].A.shape[1] + 1 for path in firsts.values()}
        for group in _groups({path: 8 * width**2 for path, width in widths.items()}, memory):
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


@torch.no_grad()
def initialize_lora_ga_weights(
    model: PeftModel,
    batches: Iterable[Any],
    adapter_name: str = "default",
    loss: Callable[[nn.Module, Any], Tensor] = lambda model, batch: outputs_of(model, batch).loss,
    stable_gamma: float = 16,
    memory: int = MEMORY,
) -> None:
    """A = c · V[:r]ᵀ and B = c · U[r:2r] with c = ⁴√out / √γ, where U S Vᵀ is W's gradient, summed over the batches
    (LoRA-GA, Wang et al. 2024, arXiv:2407.05000): the first step moves W along its best approximation of rank 2r.

    The gradient is taken in evaluation, without dropout; the change is counted from this start. Raises `AdapterError`,
    with nothing changed.
    """
    batches, layers, loras = _fresh(model, adapter_name, "lora_ga", batches)
    if wide := [path for path, lora in loras.items() if 2 * len(lora.A) > min(len(lora.B), lora.A.shape[1])]:
        raise AdapterError(
            f"lora_ga needs r of at most half of a layer's smaller side, and it is more in {collapsed(wide)}"
        )
    found: dict[str, tuple[Tensor, Tensor]] = {}
    with _base_alone(model):
        for group in _groups({path: 8 * layer.weight.numel() for path, layer in layers.items()}, memory):
            weights = [layers[path].weight.requires_grad_() for path in group]
            sums = [
                torch.zeros_like(weight, dtype=loras[path].A.dtype) for path, weight in zip(group, weights, strict=True)
            ]
            for batch in batches:
                with torch.enable_grad():
                    value = loss(model, batch)
                    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
                        raise AdapterError(
                            f"loss should give a number that depends on the weights, found {shown(value)}"
                        )
                    gradients = torch.autograd.grad(value, weights, allow_unused=True)
                for total, gradient in zip(sums, gradients, strict=True):
                    total += 0 if gradient is None else gradient
            for path, weight, total in zip(group, weights, sums, strict=True):
                weight.requires_grad_(False)
                if not total.any() or not total.isfinite().all():
                    raise AdapterError(f"{path} has no gradient in these batches, or one that is not finite")
                r, G = len(loras[path].A), layers[path].matrix(total)
                U, _, V = torch.svd_lowrank(G, min(4 * r, *G.shape), niter=4)
                c = len(G) ** 0.25 / stable_gamma**0.5
                found[path] = c * V[:, :r].t(), c * U[:, r : 2 * r]
    for path, lora in loras.items():
        lora.start_at(*found[path])


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
        rank_pattern={f"^{path}": r for path, r in ranks.items()},
        alpha_pattern={f"^{path}": alpha for path, alpha in alphas.items()},
    )


def _fresh(
    model: PeftModel, name: str, how: str, batches: Iterable[Any]
) -> tuple[list[Any], dict[str, Any], dict[str, Lora]]:
    """The batches, and the adapter's layers and their LoRAs by path. Raises `AdapterError` if it cannot start so."""
    terms_of(name, model.peft_config)
    if (found := model.peft_config[name].init_lora_weights) != how:
        raise AdapterError(f"{name!r} was made with init_lora_weights={shown(found)}: make it with {how!r}")
    if not (batches := list(batches)):
        raise AdapterError("no batches to start from: give some")
    carrying = {path: layer for path, layer in adapted_layers(model) if name in layer.adapters}
    updates = {path: layer.adapters[name].modules() for path, layer in carrying.items()}
    loras = {path: own for path, inner in updates.items() for own in inner if isinstance(own, Lora)}
    layers = {path: carrying[path] for path in loras}  # not what is trained beside the method
    if others := [path for path, layer in layers.items() if not layer.linear]:
        raise AdapterError(f"init_lora_weights={how!r} is for linear layers, not for {collapsed(others)}")
    if begun := [path for path, lora in loras.items() if not lora.is_fresh()]:
        raise AdapterError(f"{name!r} has learned something already, in {collapsed(begun)}: start a fresh adapter")
    return batches, layers, loras


@contextmanager
def _base_alone(model: PeftModel) -> Iterator[None]:
    """The base, evaluating and frozen; afterwards all is as it was before, also on an error."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            model.eval().requires_grad_(False)
            yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, trains in flags:
            parameter.requires_grad_(trains)


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


def _groups(sizes: Mapping[str, int], most: int) -> Iterator[list[str]]:
    """The paths in groups of at most so many bytes, or of one path."""
    group: list[str] = []
    for path, size in sizes.items():
        if group and sum(sizes[own] for own in group) + size > most:
            yield group
            group = []
        group.append(path)
    yield group
