"""The table that every law runs over: each method × each layer kind, and one method that only tests know."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from laws.examples import EXAMPLES, Example
from veneer import LoraConfig, PeftModel, get_peft_model
from veneer.core.inject import adapted_layers
from veneer.core.kinds import KINDS
from veneer.core.kinds.dense import AdaptedParameters
from veneer.core.kinds.layer import AdaptedLayer
from veneer.core.methods import METHODS
from veneer.core.start import start
from veneer.core.update import Update


class Hadamard(Update):
    """ΔW = W ⊙ (B A): depends on the weight, has no factors, and is all that a new method needs to be."""

    file_names: ClassVar = {"A": "hadamard_A", "B": "hadamard_B"}

    def __init__(self, weight: Tensor, config: LoraConfig) -> None:
        super().__init__()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.A = nn.Parameter(torch.empty(config.r, weight.shape[1], dtype=dtype))
        self.B = nn.Parameter(torch.empty(weight.shape[0], config.r, dtype=dtype))
        self.dropout = config.lora_dropout
        start(self.A, self.B, config.init_lora_weights)

    def delta(self, weight: Tensor) -> Tensor:
        return weight * (self.B @ self.A)


@dataclass(frozen=True)
class Case:
    """One method on one example of a kind."""

    method: str
    kind: type[AdaptedLayer]
    example: Example

    def config(self, targets: str | list[str] = "layer", **settings: Any) -> LoraConfig:
        if settings.get("lora_dropout") and not self.kind.drops:
            pytest.skip("this kind has no dropout and refuses it")
        if self.example.parameters and "layer" in targets:
            settings["target_parameters"] = [f"layer.{name}" for name in self.example.parameters]
            targets = [] if targets == "layer" else [target for target in targets if target != "layer"]
        return LoraConfig(r=2, lora_alpha=3, peft_type=self.method, target_modules=targets, **settings)

    def base(self, dtype: torch.dtype = torch.float64) -> nn.Sequential:
        model = nn.Sequential()
        model.add_module("layer", self.example.make())
        return model.to(dtype).eval()

    def stack(self, dtype: torch.dtype = torch.float64) -> nn.Sequential:
        """Two layers, the second one linear."""
        model = self.base(torch.float32)
        model.add_module("head", nn.Linear(model(self.x(2, dtype=torch.float32)).shape[-1], 4))
        return model.to(dtype).eval()

    def adapted(
        self, *names: str, base: nn.Module | None = None, dtype: torch.dtype = torch.float64, **settings: Any
    ) -> PeftModel:
        """A model whose adapters, called `names`, are trained: no longer what they were at the start."""
        names = names or ("default",)
        config = self.config(**settings)
        model = get_peft_model(self.base(dtype) if base is None else base, config, names[0])
        for name in names[1:]:
            model.add_adapter(name, config)
        for parameter in self.parameters(model):
            nn.init.normal_(parameter, std=0.5)
        return model

    @staticmethod
    def parameters(model: nn.Module) -> list[nn.Parameter]:
        """The parameters that adapters added, in the model's order."""
        return [parameter for _, layer in adapted_layers(model) for parameter in layer.adapters.parameters()]

    def x(self, *batch: int, dtype: torch.dtype = torch.float64) -> Tensor:
        x = self.example.inputs(*batch)
        return x.to(dtype) if x.is_floating_point() else x

    def dense(self, layer: AdaptedLayer, weights: Mapping[str, float], x: Tensor) -> Tensor:
        """The definition: the base's formula for W + Σ weight · ΔW."""
        changed = self.changed(layer, weights)
        return self.example.formula(layer, changed.get("", changed), x)

    def changed(self, layer: AdaptedLayer, weights: Mapping[str, float]) -> dict[str, Tensor]:
        """W + Σ weight · ΔW by part, in the precision of the sum."""
        originals = {
            part: matrix.to(torch.promote_types(matrix.dtype, torch.float32))
            for part, matrix in self.kind.matrices(layer).items()
        }
        for name, weight in weights.items():
            for part, update in layer.adapters[name].parts().items():
                original = self.kind.matrices(layer)[part]
                originals[part] = originals[part] + weight * update.delta(original)
        return originals


_TABLE = [
    pytest.param((method, kind, example), id=f"{method}-{name}")
    for method in (*METHODS, "HADAMARD")
    for kind in (*KINDS, AdaptedParameters)
    for name, example in EXAMPLES.get(kind.__name__, {kind.__name__: None}).items()
]


@pytest.fixture(params=_TABLE)
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Case:
    method, kind, example = request.param
    if example is None:
        pytest.fail(f"{kind.__name__} has no example: add one to EXAMPLES in tests/laws/conftest.py")
    monkeypatch.setitem(METHODS, "HADAMARD", Hadamard)
    return Case(method, kind, example)
