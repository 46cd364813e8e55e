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
        self.A = nn.Parameter(torch.empty(config.r, weight.shape[1], dtype=dtype))
        self.B = nn.Parameter(torch.empty(weight.shape[0], config.r, dtype=dtype))
        self.dropout = config.lora_dropout
        start(self.A, self.B, config.init_lora_weights)

    def delta(self, weight: Tensor) -> Tensor:
        return weight * (self.B @ self.A)


@dataclass(frozen=True)
class Example:
    """A genuine base layer, an input of it for a batch's shape, and its formula for a matrix `(out, in)`."""

    make: Callable[[], nn.Module]
    inputs: Callable[..., Tensor]
    formula: Callable[[Any, Tensor, Tensor], Tensor]
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


BATCHES = ((3,), (), (2, 3), (2, 3, 4), (0,), (2, 0))


def affine(layer: Any, weight: Tensor, x: Tensor) -> Tensor:
    y = x @ weight.T
    return y if layer.bias is None else y + layer.bias


def _linear(make: Callable[[], nn.Module], formula: Callable[[Any, Tensor, Tensor], Tensor] = affine) -> Example:
    return Example(make, lambda *batch: torch.randn(*batch, 6), formula, BATCHES)


def looked_up(layer: Any, table: Tensor, x: Tensor) -> Tensor:
    return nn.functional.embedding(x, table.T, layer.padding_idx)


def _table(make: Callable[[], nn.Module], formula: Callable[[Any, Tensor, Tensor], Tensor] = looked_up) -> Example:
    return Example(make, lambda *batch: torch.randint(0, 6, batch), formula, BATCHES)


def scaled_table() -> nn.Module:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    return Gemma3TextScaledWordEmbedding(6, 5, 2, embed_scale=1.5)


class Shifted(nn.Embedding):
    """A table with a forward of its own: y = W[x + 1]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 1)


def convolved(layer: Any, matrix: Tensor, x: Tensor) -> Tensor:
    """With the padding written out."""
    batched = x if x.ndim == layer.weight.ndim else x.unsqueeze(0)
    kernel = matrix.view_as(layer.weight)
    if layer.padding_mode != "zeros":
        padded = nn.functional.pad(batched, layer._reversed_padding_repeated_twice, layer.padding_mode)
    else:
        padded = nn.functional.pad(batched, layer._reversed_padding_repeated_twice)
    y = torch.convolution(
        padded, kernel, layer.bias, layer.stride, [0] * (kernel.ndim - 2), layer.dilation,
        False, [0] * (kernel.ndim - 2), layer.groups,
    )  # fmt: skip
    return y if x.ndim == layer.weight.ndim else y.squeeze(0)


def _conv(make: Callable[[], Any], *places: int) -> Example:
    return Example(
        make, lambda *batch: torch.randn(*batch, make().in_channels, *places), convolved, ((3,), (), (1,), (0,))
    )


class Doubled(nn.Conv2d):
    """A convolution with a forward of its own: y = 2 W ∗ x + b."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, 2 * self.weight, self.bias)


# A kind that is added gives its examples here, by name; a kind without any fails every law.
EXAMPLES: Mapping[str, dict[str, Example]] = {
    "AdaptedLinear": {
        "linear": _linear(lambda: nn.Linear(6, 5)),
        "linear-without-bias": _linear(lambda: nn.Linear(6, 5, bias=False)),
    },
    "AdaptedOwnLinear": {
        "linear-of-its-own": _linear(
            lambda: Halving(6, 5), lambda layer, weight, x: affine(layer, weight, x) - layer.bias / 2
        )
    },
    "AdaptedConv1D": {"conv1d": _linear(conv1d)},
    "AdaptedEmbedding": {
        "table": _table(lambda: nn.Embedding(6, 5)),
        "table-with-padding": _table(lambda: nn.Embedding(6, 5, padding_idx=2)),
        "table-scaled": _table(scaled_table, lambda layer, table, x: looked_up(layer, table, x) * 1.5),
    },
    "AdaptedOwnEmbedding": {
        "table-of-its-own": _table(lambda: Shifted(7, 5), lambda layer, table, x: looked_up(layer, table, x + 1))
    },
    "AdaptedConv": {
        "conv1": _conv(lambda: nn.Conv1d(2, 4, 3, stride=2, padding=1, padding_mode="circular"), 5),
        "conv2": _conv(lambda: nn.Conv2d(2, 4, (3, 2), (1, 2), (1, 0), dilation=(2, 1)), 4, 4),
        "conv2-same": _conv(lambda: nn.Conv2d(2, 3, (2, 3), padding="same", padding_mode="reflect", bias=False), 3, 3),
        "conv2-valid": _conv(lambda: nn.Conv2d(2, 3, 2, padding="valid", padding_mode="replicate"), 3, 3),
        "conv2-groups": _conv(lambda: nn.Conv2d(4, 6, 2, padding=1, groups=2), 3, 3),
        "conv3": _conv(lambda: nn.Conv3d(1, 2, 2, padding=1, padding_mode="replicate", dilation=2), 3, 3, 3),
    },
    "AdaptedOwnConv": {
        "conv-of-its-own": Example(
            lambda: Doubled(2, 3, 2),
            lambda *batch: torch.randn(*batch, 2, 3, 3),
            lambda layer, matrix, x: convolved(layer, 2 * matrix, x),
            ((3,), ()),
        )
    },
}


@dataclass(frozen=True)
class Case:
    """One method on one example of a kind."""

    method: str
    kind: type[AdaptedLayer]
    example: Example

    def config(self, targets: str | list[str] = "layer", **settings: Any) -> LoraConfig:
        if settings.get("lora_dropout") and not self.kind.drops:
            pytest.skip("this kind has no dropout and refuses it")
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
        matrix = self.kind.seen(layer)
        changes = [weight * layer.adapters[name].delta(matrix) for name, weight in weights.items()]
        return self.example.formula(layer, sum(changes, start=matrix), x)


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
