"""AdamW on what trains: matrices decay as said, biases and scales do not. And LoRA+: B learns faster than A."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from veneer.core.errors import AdapterError
from veneer.core.inject import adapted_layers
from veneer.core.update import Update

if TYPE_CHECKING:  # LoRA+ needs none of what reads recipes
    from veneer.train.settings import TrainSettings


def optimizer(model: nn.Module, settings: "TrainSettings") -> torch.optim.Optimizer:
    """Fused AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101) over the parameters that require gradients."""
    trains = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trains if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trains if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=True)


def lora_plus_groups(model: nn.Module, lr: float, ratio: float = 16.0) -> list[dict[str, Any]]:
    """LoRA+ (Hayou et al. 2024, arXiv:2402.12354): all that trains, as groups for an optimizer, with the rate
    `ratio · lr` for each B and `lr` for the rest.

    Raises `AdapterError` when no adapter of the model trains a B.
    """
    faster = {
        id(parameter)
        for _, layer in adapted_layers(model)
        for update in layer.adapters.modules()
        if isinstance(update, Update)
        for name, parameter in update.named_parameters(recurse=False)
        if name in update.faster and parameter.requires_grad
    }
    if not faster:
        raise AdapterError("LoRA+ gives the B of a LoRA a larger rate, and this model trains none")
    trains = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trains if id(parameter) not in faster], "lr": lr},
        {"params": [parameter for parameter in trains if id(parameter) in faster], "lr": ratio * lr},
    ]
