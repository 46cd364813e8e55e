"""LoRA-GA (Wang et al. 2024, arXiv:2407.05000): LoRA starts along the gradient."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.errors import AdapterError, collapsed, shown
from veneer.core.model import PeftModel
from veneer.core.update import own_precision
from veneer.starts.fresh import MEMORY, base_alone, fresh, in_groups, outputs_of


@torch.no_grad()
def initialize_lora_ga_weights(
    model: PeftModel,
    batches: Iterable[Any],
    adapter_name: str = "default",
    loss: Callable[[nn.Module, Any], Tensor] = lambda model, batch: outputs_of(model, batch).loss,
    stable_gamma: float = 16,
    memory: int = MEMORY,
) -> None:
    """A = c · V[:r]ᵀ and B = c · U[r:2r] with c = ⁴√out / √γ, where U S Vᵀ is W's gradient, summed over the batches:
    the first step moves W along its best approximation of rank 2r.

    The gradient is taken in evaluation, without dropout; the change is counted from this start. Raises `AdapterError`,
    with nothing changed.
    """
    batches, layers, loras = fresh(model, adapter_name, "lora_ga", batches)
    if wide := [path for path, lora in loras.items() if 2 * len(lora.A) > min(len(lora.B), lora.A.shape[1])]:
        raise AdapterError(
            f"lora_ga needs r of at most half of a layer's smaller side, and it is more in {collapsed(wide)}"
        )
    found: dict[str, tuple[Tensor, Tensor]] = {}
    with base_alone(model):
        for group in in_groups({path: 8 * layer.weight.numel() for path, layer in layers.items()}, memory):
            weights = [layers[path].weight for path in group]
            sums = [torch.zeros_like(weight, dtype=own_precision(weight)) for weight in weights]
            for batch in batches:
                for total, gradient in zip(sums, _gradients(loss, model, batch, weights), strict=True):
                    total += 0 if gradient is None else gradient
            for path, total in zip(group, sums, strict=True):
                if not total.any() or not total.isfinite().all():
                    raise AdapterError(f"{path} has no gradient in these batches, or one that is not finite")
                r, G = len(loras[path].A), layers[path].matrix(total)
                U, _, V = torch.svd_lowrank(G, min(4 * r, *G.shape), niter=4)
                c = len(G) ** 0.25 / stable_gamma**0.5
                found[path] = c * V[:, :r].t(), c * U[:, r : 2 * r]
    for path, lora in loras.items():
        lora.start_at(*found[path])


def _gradients(
    loss: Callable[[nn.Module, Any], Tensor], model: nn.Module, batch: Any, weights: list[Tensor]
) -> tuple[Tensor | None, ...]:
    model.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_()
    with torch.enable_grad():
        value = loss(model, batch)
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        raise AdapterError(f"loss should give a number that depends on the weights, found {shown(value)}")
    return torch.autograd.grad(value, weights, allow_unused=True)
