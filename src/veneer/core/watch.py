"""Are the adapted layers called at all? Looked at once, in the first forward in training."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from veneer.core.errors import collapsed
from veneer.core.inject import adapted_layers
from veneer.core.plan import Plan


@contextmanager
def watching(model: nn.Module, plan: Plan) -> Iterator[None]:
    """Warn of the layers with acting adapters that were not called inside: they would learn nothing."""
    acting = {term.adapter for term in plan.terms}
    idle: dict[nn.Module, str] = {
        layer: path for path, layer in adapted_layers(model) if acting.intersection(layer.adapters)
    }

    def called(layer: nn.Module, inputs: object) -> None:
        idle.pop(layer, None)

    handles = [layer.register_forward_pre_hook(called) for layer in idle]
    try:
        yield
        plan.watched |= acting
    finally:
        for handle in handles:
            handle.remove()
    if idle:
        told = collapsed(idle.values())
        warnings.warn(f"adapted layers that the model did not call, so they learn nothing: {told}", stacklevel=3)
