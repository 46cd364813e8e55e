"""A change of the bias: it acts, is merged and unmerged as that of the weight is, or is refused by name."""

from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from laws.examples import Doubled, Halving, conv1d, normal
from veneer import AdapterError, LoraConfig, get_peft_model
from veneer.core.methods import METHODS, Lora


class Shifting(Lora):
    """LoRA with Δb = s ⊙ (b + 1)."""

    file_names: ClassVar = {**Lora.file_names, "s": "s"}

    def __init__(self, weight: Tensor, config: LoraConfig) -> None:
        super().__init__(weight, config)
        self.s = nn.Parameter(torch.zeros(len(weight), dtype=self.A.dtype))

    @classmethod
    def shifts(cls, config: LoraConfig) -> bool:
        return True

    def shift(self, bias: Tensor | None) -> Tensor:
        return self.s * (1 if bias is None else bias + 1)


class ShiftingDense(Shifting):
    """The same, whose layers are given ΔW alone."""

    def factors(self) -> None:
        return None

    def delta(self, weight: Tensor) -> Tensor:
        return self.B @ self.A


LAYERS = {
    "linear": (lambda bias: nn.Linear(6, 5, bias=bias), (6,)),
    "conv1d of transformers": (lambda bias: conv1d(), (6,)),
    "conv1": (lambda bias: nn.Conv1d(6, 5, 2, bias=bias), (6, 4)),
    "conv2": (lambda bias: nn.Conv2d(2, 5, 2, bias=bias), (2, 3, 4)),
    "conv2 with groups": (lambda bias: nn.Conv2d(2, 4, 2, groups=2, bias=bias), (2, 3, 4)),
}
OWN = {
    "linear of its own": (lambda bias: Halving(6, 5), (6,)),
    "conv of its own": (lambda _: Doubled(2, 3, 2), (2, 3, 3)),
}
ALL = {**LAYERS, **OWN}


@pytest.fixture(params=[Shifting, ShiftingDense])
def config(request, monkeypatch) -> LoraConfig:
    monkeypatch.setitem(METHODS, "SHIFTING", request.param)
    return LoraConfig(r=2, peft_type="SHIFTING", target_modules=["0"])


def adapted(config, name: str, bias: bool = True, dtype=torch.float64):
    make, shape = ALL[name]
    model = get_peft_model(nn.Sequential(normal(make(bias))).to(dtype), config, "a")
    model.add_adapter("b", config)
    for update in model[0].adapters.values():
        normal(update)
    return model, torch.randn(4, *shape, dtype=dtype)


@pytest.mark.parametrize("name", ALL)
def test_merged_is_live_and_unmerging_gives_the_bits_back(config, bits, name):
    for dtype in (torch.float64, torch.bfloat16):
        model, x = adapted(config, name, dtype=dtype)
        model.set_adapter({"a": 0.7, "b": -1.3})
        layer, before = model[0], bits(model)
        updates, bias = layer.adapters, layer.bias.detach()
        total = bias.to(updates["a"].s.dtype) + 0.7 * updates["a"].shift(bias) - 1.3 * updates["b"].shift(bias)
        live = model(x)
        model.merge_adapter()
        assert torch.equal(layer.bias, total.to(dtype))
        near = 1e-12 if dtype == torch.float64 else 0.2
        torch.testing.assert_close(model(x), live, rtol=near, atol=near)
        model.unmerge_adapter()
        assert bits(model) == before


@pytest.mark.parametrize("name", ALL)
def test_the_gradient_is_that_of_the_definition(config, name):
    model, x = adapted(config, name)
    layer, update = model[0], model[0].adapters["a"]
    changed = {
        "weight": layer.matrix(layer.weight) + update.delta(layer.matrix(layer.weight)),
        "bias": layer.bias + update.shift(layer.bias),
    }
    changed["weight"] = layer.values(layer, {"": changed["weight"]})["weight"]
    y, wanted = model(x), layer.own_forward(changed, x)
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    own = list(update.parameters())
    torch.testing.assert_close(
        *[torch.autograd.grad(y.square().sum(), own) for y in (y, wanted)], rtol=1e-11, atol=1e-11
    )


@pytest.mark.parametrize("name", [*LAYERS, "conv of its own"])
def test_rows_are_shifted_each_by_its_own(config, name):
    model, x = adapted(config, name)
    rows = ["a", "__base__", {"a": 0.5, "b": 2.0}, "b"]
    y = model(x, adapter_names=rows)
    for i, row in enumerate(rows):
        with model.using([] if row == "__base__" else row):
            torch.testing.assert_close(y[i : i + 1], model(x[i : i + 1]))
    with model.disable_adapter():
        assert torch.equal(y[1], model(x)[1])


def test_a_linear_forward_of_its_own_has_one_bias_for_all_rows(config):
    model, x = adapted(config, "linear of its own")
    with pytest.raises(AdapterError, match="cannot be mixed by rows"):
        model(x, adapter_names=["a", "b", "a", "b"])


@pytest.mark.parametrize("name", ["linear", "conv2"])
def test_a_layer_without_a_bias_is_shifted_live_and_refuses_the_merge(config, bits, name):
    model, x = adapted(config, name, bias=False)
    with model.disable_adapter():
        base = model(x)
    update = model[0].adapters["a"]
    nn.init.zeros_(update.B)
    shape = (-1, *[1] * (x.ndim - 2))
    torch.testing.assert_close(model(x), base + update.s.view(shape))
    before = bits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(AdapterError, match=r"layers that have none: '0\.bias'"):
            merge()
    assert bits(model) == before


@pytest.mark.parametrize("layer", [nn.Embedding(6, 5), nn.LayerNorm(6), nn.MultiheadAttention(4, 2)], ids=str)
def test_kinds_that_cannot_are_refused_by_name(config, bits, layer):
    base = nn.Sequential(layer)
    before = bits(base)
    with pytest.raises(AdapterError, match=r"0 is a \w+ and this adapter changes biases too"):
        get_peft_model(base, config)
    assert bits(base) == before
