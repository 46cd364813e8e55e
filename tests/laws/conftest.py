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
from veneer.core.kinds.dense import AdaptedModule, AdaptedParameters
from veneer.core.kinds.layer import AdaptedLayer
from veneer.core.methods import METHODS, dora
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


class Shifted:
    """A layer with another bias, for its formula."""

    def __init__(self, layer: nn.Module, bias: Tensor) -> None:
        self.layer, self.bias = layer, bias

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)


@dataclass(frozen=True)
class Case:
    """One method on one example of a kind."""

    method: str
    settings: Mapping[str, Any]
    kind: type[AdaptedLayer]
    example: Example

    @property
    def is_copy(self) -> bool:
        """Whether the layer is trained whole, and no method is asked."""
        return self.kind is AdaptedModule

    def config(self, targets: str | list[str] = "layer", **settings: Any) -> LoraConfig:
        if settings.get("lora_dropout") and not self.kind.drops:
            pytest.skip("this kind has no dropout and refuses it")
        if "layer" not in targets and self.settings.keys() & {"options", "method_pattern"}:
            settings |= {"method_pattern": {}}  # which names the layer, as these do
            settings |= {"options": {}} if "fused" in self.settings.get("options", {}) else {}
        if self.is_copy and "layer" in targets:
            settings["modules_to_save"] = ["layer"]
            targets = [target for target in targets if target != "layer"] if isinstance(targets, list) else []
        if self.example.parameters and "layer" in targets:
            settings["target_parameters"] = [f"layer.{name}" for name in self.example.parameters]
            targets = [] if targets == "layer" else [target for target in targets if target != "layer"]
        chosen = {"r": 2, "lora_alpha": 3, "peft_type": self.method, **self.settings, **settings}
        return LoraConfig(target_modules=targets, **chosen)

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
        """The parameters that adapters added and that are trained, in the model's order."""
        return Case.trained(*(layer.adapters for _, layer in adapted_layers(model)))

    @staticmethod
    def trained(*modules: nn.Module) -> list[nn.Parameter]:
        return [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]

    def x(self, *batch: int, dtype: torch.dtype = torch.float64) -> Tensor:
        x = self.example.inputs(*batch)
        return x.to(dtype) if x.is_floating_point() else x

    def dense(self, layer: AdaptedLayer, weights: Mapping[str, float], x: Tensor) -> Tensor:
        """The definition: the base's formula for W + Σ weight · ΔW."""
        changed = self.changed(layer, weights)
        shifts = [
            weight * shift
            for name, weight in weights.items()
            for update in layer.adapters[name].parts().values()
            if self.kind.biased and (shift := update.shift(layer.bias)) is not None
        ]
        shifted = Shifted(layer, sum(shifts, 0 if layer.bias is None else layer.bias)) if shifts else layer
        return self.example.formula(shifted, changed.get("", changed), x)

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
        if self.is_copy and list(weights.values()) == [1]:
            return {part: update.value for part, update in layer.adapters[next(iter(weights))].parts().items()}
        return originals


# What a method can be besides itself with its defaults: the laws hold for these too.
VARIANTS: Mapping[str, dict[str, dict[str, Any]]] = {
    "LORA": {
        f"LORA-{start}": {"init_lora_weights": start}
        for start in ("orthogonal", "pissa", "pissa_niter_2", "olora", "lora_ga")
    }
    | {"LORA-FA": {"options": {"freeze_A": True}}, "LORA-bias": {"options": {"lora_bias": True}}}
    | {"LORA-fused": {"options": {"fused": {"layer": {"r": [2, 0, 3], "sizes": [1, 2, 2]}}}}}
    | {"LORA-mixed": {"method_pattern": {"layer": {"peft_type": "LOHA", "use_rslora": True}}}}
    | {"LORA-pissa-DORA": {"init_lora_weights": "pissa", "use_dora": True}},
    "VERA": {"VERA-key": {"options": {"save_projection": False, "projection_prng_key": 7}}},
    "LOHA": {"LOHA-dense": {"r": 3}},
    "IA3": {"IA3-columns": {"options": {"feedforward_modules": ".*"}}},
    "LOKR": {"LOKR-both": {"r": 1, "options": {"decompose_both": True, "decompose_factor": 5}}, "LOKR-whole": {"r": 4}},
}
_COMBINATIONS = {
    f"{variant}-{name}": (method, settings, kind, example)
    for method in (*METHODS, "HADAMARD")
    for variant, settings in {
        method: {},
        f"{method}-DORA": {"use_dora": True},
        **VARIANTS.get(method, {}),
    }.items()
    for kind in (*KINDS, AdaptedParameters)
    for name, example in EXAMPLES.get(kind.__name__, {kind.__name__: None}).items()
} | {f"COPY-{name}": ("LORA", {}, AdaptedModule, example) for name, example in EXAMPLES["AdaptedModule"].items()}
# Every law runs over LoRA and the method that only tests know on everything, over DoRA once for each kind, over most
# that methods can be on a linear layer; test_law_combinations goes quickly through all.
_LIKE_OTHERS = (
    "LORA-olora-",
    "LORA-lora_ga-",
    "LORA-pissa_niter_2-",
    "LOHA-DORA-",
    "LOKR-DORA-",
    "VERA-DORA-",
    "IA3-DORA-",
    "FULL-DORA-",
)


def _is_run_over(name: str) -> bool:
    method, settings, kind, _ = _COMBINATIONS[name]
    if method in ("LORA", "HADAMARD") and not settings:
        return True
    first = next(iter(EXAMPLES.get(kind.__name__, {kind.__name__: None})))
    dora = name == f"LORA-DORA-{first}"
    return dora or (name.endswith("-linear") and not name.startswith(_LIKE_OTHERS))


def refused(name: str) -> str | None:
    """What is said of a combination that is not built."""
    method, settings, kind, example = _COMBINATIONS[name]
    if method == "VERA" and not kind.linear:
        return "VERA adapts linear layers alone"
    if method in METHODS and METHODS[method].shifts(LoraConfig(peft_type=method, **settings)) and not kind.biased:
        return "this adapter changes biases too"
    counted = _from_weight(settings) or settings.get("init_lora_weights") == "lora_ga"
    trained_alone = not settings.get("use_dora") and not counted
    if example and "stack" in example.parameters and not trained_alone:
        return "a stack of matrices .* is adapted by trained factors alone"
    if "fused" in settings.get("options", {}) and not kind.linear and "Embedding" not in kind.__name__:
        return "do not fill it|a stack of matrices"  # the examples of other kinds have other sizes
    if _from_weight(settings) and example and example.vectors:
        return "needs r of at most 1"
    return None


def _from_weight(settings: Mapping[str, Any]) -> bool:
    return str(settings.get("init_lora_weights")).startswith(("pissa", "olora"))


def _made(name: str, monkeypatch: pytest.MonkeyPatch) -> Case:
    method, settings, kind, example = _COMBINATIONS[name]
    if example is None:
        pytest.fail(f"{kind.__name__} has no example: add one to EXAMPLES in tests/laws/examples.py")
    monkeypatch.setitem(METHODS, "HADAMARD", Hadamard)
    return Case(method, settings, kind, example)


@pytest.fixture(params=[name for name in _COMBINATIONS if _is_run_over(name) and not refused(name)])
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Case:
    return _made(request.param, monkeypatch)


@pytest.fixture(params=_COMBINATIONS)
def combination(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Case, str | None]:
    """A method on a kind, and the reason if it is refused."""
    return _made(request.param, monkeypatch), refused(request.param)


@pytest.fixture
def constants_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """What counts as a constant in a method's gradient stays what it first was, so that differences see one too."""
    norms: dict[Update, Tensor] = {}
    row_norms = dora.row_norms
    monkeypatch.setattr(dora, "row_norms", lambda weight, update: norms.setdefault(update, row_norms(weight, update)))
