"""Adapters as plain data, of every method, and what they do to each layer as a dense matrix in fp64."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from veneer import LoraConfig
from veneer.apart.changes import Change, adapter_of, changes
from veneer.core.adapter import Adapter

OUT, IN = 12, 10


def change(method: str, r: int = 2, out: int = OUT, columns: int = IN, **fields: Any) -> Change:
    """A trained change of a layer `(out, columns)`."""
    from veneer.core.methods import maker

    config = LoraConfig(peft_type=method, r=r, lora_alpha=3.0, init_lora_weights=False, **fields)
    weight = torch.randn(out, columns, dtype=torch.float64)
    update = maker(config, [(weight, config)])(weight, config, lambda *_: None)
    tensors = {name: torch.randn_like(tensor) for name, tensor in update.tensors().items()}
    return Change(LoraConfig(**{**vars(config), "init_lora_weights": True}), tensors)


@pytest.fixture
def make() -> Callable[..., Adapter]:
    """`make(q="LORA", v=("LORA", 3))`: an adapter of layers with random values in fp64."""

    def build(**layers: Any) -> Adapter:
        own = {}
        for path, said in layers.items():
            method, r, fields = (*said, {})[:3] if isinstance(said, tuple) else (said, 2, {})
            own[path] = change(method, r, **fields)
        return adapter_of(own)

    return build


@pytest.fixture
def deltas() -> Callable[..., dict[str, Tensor]]:
    """ΔW of each layer, from its definition."""

    def of(adapter: Adapter, weights: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        found = {}
        for path, own in changes(adapter).items():
            weight = (weights or {}).get(f"{path}.weight", torch.empty(OUT, IN, device="meta"))
            with torch.no_grad():
                found[path] = own.update(weight).delta(weight).detach().double()
        return found

    return of


@pytest.fixture
def weights() -> dict[str, Tensor]:
    return {f"{path}.weight": torch.randn(OUT, IN, dtype=torch.float64) for path in ("q", "v")}
