"""The table that every law runs over: each method × each layer kind, and one method that only tests know."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from veneer import LoraConfig, PeftModel, get_peft_model
from veneer.core.inject import adapted_layers
from veneer.core.kinds import KINDS
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
        self.A = nn.Parameter(weight.new_empty(config.r, weight.shape[1], dtype=dtype))
        self.B = nn.Parameter(weight.new_empty(weight.shape[0], config.r, dtype=dtype))
        self.dropout = config.lora_dropout
        start(self.A, self.B, config.init_lora_weights)

    def delta(self, weight: Tensor) -> Tensor:
        return weight * (self.B @ self.A)


@dataclass(frozen=True)
class Example:
    """A genuine base layer, an input of it for a batch's shape, and its formula for a weight matrix `(out, in)`."""

    make: Callable[[], nn.Module]
    inputs: Callable[..., Tensor]
    formula: Callable[[Tensor, Tensor | None, Tensor], Tensor]
    batches: tuple[tuple[int, ...], ...]


class Halving(nn.Linear):
    """A subclass with a forward of its own: y = W x + b / 2."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias / 2


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(5, 6)
    nn.init.normal_(layer.bias)
    return layer


def affine(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    y = x @ weight.T
    return y if bias is None else y + bias


def _linear(make: Callable[[], nn.Module]) -> Example:
    return Example(make, lambda *batch: torch.randn(*batch, 6), affine, ((3,), (), (2, 3), (2, 3, 4), (0,), (2, 0)))


# A kind that is added gives its examples here, by name; a kind without any fails every law.
EXAMPLES: Mapping[str, dict[str, Example]] = {
    "AdaptedLinear": {
        "linear": _linear(lambda: nn.Linear(6, 5)),
        "linear-without-bias": _linear(lambda: nn.Linear(6, 5, bias=False)),
    },
    "AdaptedOwnLinear": {
        "linear-of-its-own": Example(
            lambda: Halving(6, 5),
            lambda *batch: torch.randn(*batch, 6),
            lambda weight, bias, x: affine(weight, bias, x) - bias / 2,
            ((3,), (), (2, 3), (2, 3, 4), (0,), (2, 0)),
        )
    },
    "AdaptedConv1D": {"conv1d": _linear(conv1d)},
}


@dataclass(frozen=True)
class Case:
    """One method on one example of a kind."""

    method: str
    kind: type[AdaptedLayer]
    example: Example

    def config(self, targets: str | list[str] = "layer", **settings: Any) -> LoraConfig:
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
        matrix = self.kind.matrix(layer.weight)
        changes = [weight * layer.adapters[name].delta(matrix) for name, weight in weights.items()]
        return self.example.formula(sum(changes, start=matrix), layer.bias, x)


_TABLE = [
    pytest.param((method, kind, example), id=f"{method}-{name}")
    for method in (*METHODS, "HADAMARD")
    for kind in KINDS
    for name, example in EXAMPLES.get(kind.__name__, {kind.__name__: None}).items()
]


@pytest.fixture(params=_TABLE)
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Case:
    method, kind, example = request.param
    if example is None:
        pytest.fail(f"{kind.__name__} has no example: add one to EXAMPLES in tests/laws/conftest.py")
    monkeypatch.setitem(METHODS, "HADAMARD", Hadamard)
    return Case(method, kind, example)
