"""Gradient checkpointing (Chen et al. 2016, arXiv:1604.06174): each layer runs again in the backward."""

from typing import Any

from torch import nn

from veneer.core.errors import AdapterError

# transformers' name of today, its name until 5.22, and that of diffusers
_SWITCHES: dict[str, tuple[Any, ...]] = {
    "activation_checkpointing_enable": ({"use_reentrant": False},),
    "gradient_checkpointing_enable": ({"use_reentrant": False},),
    "enable_gradient_checkpointing": (),
}


def recompute_layers(model: nn.Module) -> None:
    """From now on, in training, each layer keeps its input only; losses and gradients stay what they are, to the bit.

    Which parts of it are layers is the model's own knowledge. Raises `AdapterError` where it has none.
    """
    name = type(model).__name__
    for switch, arguments in _SWITCHES.items():
        if hasattr(model, switch):
            try:
                getattr(model, switch)(*arguments)
            except ValueError as error:
                raise AdapterError(f"train.gradient_checkpointing: {name} cannot do it; leave it off") from error
            return
    raise AdapterError(f"train.gradient_checkpointing: {name} does not say what its layers are; leave it off")
