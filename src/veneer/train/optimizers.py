"""AdamW on what trains: matrices decay as said, biases and scales do not; its steps, with the loss scaled for fp16.

And LoRA+: B learns faster than A.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from veneer.core.errors import AdapterError
from veneer.core.inject import adapted_layers
from veneer.core.update import Update

if TYPE_CHECKING:  # LoRA+ needs none of what reads recipes
    from veneer.train.settings import TrainSettings

UNTRAINED = "no adapter got a gradient: the adapted layers were never called"


def optimizer(model: nn.Module, settings: "TrainSettings") -> torch.optim.Optimizer:
    """Fused AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101) over the parameters that require gradients."""
    trains = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trains if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trains if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=True)


class Stepper:
    """AdamW's steps. Over a base in float16 the loss is multiplied by a scale, and the gradients divided by it, so that
    small gradients do not vanish on their way through the base (Micikevicius et al. 2018, arXiv:1710.03740).

    A step whose gradients overflow is skipped and the scale halved; after 2000 good ones it is doubled.
    """

    def __init__(self, model: nn.Module, settings: "TrainSettings") -> None:
        self.model, self.longest = model, settings.max_grad_norm or math.inf
        self.optimizer = optimizer(model, settings)
        half = [p.device.type for p in model.parameters() if p.dtype == torch.float16]
        self.scaler = torch.amp.GradScaler(half[0] if half else "cpu", enabled=bool(half))
        self.skipped = 0  # steps, since the beginning

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a part of the step's loss. Raises `AdapterError` where it has none."""
        if not loss.requires_grad:
            raise AdapterError(UNTRAINED)
        self.scaler.scale(loss).backward()

    def step(self, lr: float) -> float:
        """Clip the gradients and take the step; their norm before. Where it is not finite, the step is not taken.

        Raises `AdapterError` when no adapter got a gradient.
        """
        trains = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        if not trains:
            raise AdapterError(UNTRAINED)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(trains, self.longest).item()
        if math.isfinite(norm) or self.scaler.is_enabled():
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def lowers(self, norm: float) -> bool:
        """Whether a norm that is not finite is fp16's overflow, which a lower scale mends: counted as skipped."""
        lowers = self.scaler.is_enabled() and not math.isfinite(norm) and self.scaler.get_scale() >= 1
        self.skipped += lowers
        return lowers


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
