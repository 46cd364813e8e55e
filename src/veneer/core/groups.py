"""LoRA+ (Hayou et al. 2024, arXiv:2402.12354): a larger learning rate for B than for A."""

from typing import Any

from torch import nn

from veneer.core.errors import AdapterError
from veneer.core.inject import adapted_layers
from veneer.core.update import Update


def lora_plus_groups(model: nn.Module, lr: float, ratio: float = 16.0) -> list[dict[str, Any]]:
    """All that trains, as groups for an optimizer: rate `ratio · lr` for each B, `lr` for the rest.

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
