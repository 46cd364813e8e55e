"""Norms are those of ΔW, whatever the method; what is wrong with values is told."""

import pytest
import torch
from torch import nn

from veneer import Adapter, LoraConfig, get_peft_model
from veneer.analyse.summary import summary
from veneer.analyse.values import norm_of, overflows, subnormal, values_of
from veneer.apart.changes import Change, changes


def net():
    return nn.ModuleDict({"one": nn.Linear(24, 20), "two": nn.Conv2d(4, 6, 3), "three": nn.Linear(6, 40)}).double()


def lora(layers: dict[str, tuple[int, int]], r: int = 4, dtype: torch.dtype = torch.float32) -> Adapter:
    tensors = {
        path: {"A": torch.randn(r, columns).to(dtype), "B": torch.randn(rows, r).to(dtype)}
        for path, (rows, columns) in layers.items()
    }
    return Adapter(LoraConfig(r=r, target_modules=[*layers]), tensors)


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_alpha": 3},
        {"use_rslora": True, "lora_alpha": -5},
        {"rank_pattern": {"one": 5}, "alpha_pattern": {"two": 9}},
        {"peft_type": "LOHA"},
        {"peft_type": "LOHA", "r": 2},
        {"peft_type": "LOKR"},
        {"peft_type": "LOKR", "r": 1, "options": {"decompose_both": True}},
        {"peft_type": "VERA", "target_modules": ["one", "three"]},
    ],
    ids=str,
)
def test_the_norm_is_that_of_what_merging_adds(settings):
    model = net()
    before = {name: own.clone() for name, own in model.state_dict().items()}
    config = {"r": 3, "target_modules": ["one", "two", "three"], "init_lora_weights": False, **settings}
    model = get_peft_model(model, LoraConfig(**config))
    adapter = model.get_adapter()
    found = values_of(adapter, changes(adapter))
    after = model.merge_and_unload().state_dict()
    for path in config["target_modules"]:
        change = after[f"{path}.weight"] - before[f"{path}.weight"]
        if settings.get("peft_type") == "VERA":
            assert found.norms[path] is None  # its size is the layer's
        else:
            assert found.norms[path] == pytest.approx(change.norm().item(), rel=1e-9)
    if settings.get("peft_type") != "VERA":
        total = sum((after[name] - before[name]).square().sum() for name in before) ** 0.5
        assert found.among(found.norms) == pytest.approx(total.item(), rel=1e-9)


def test_with_dora_it_is_that_of_the_change_before_rows_are_rescaled():
    plain = Change(LoraConfig(r=2, lora_alpha=6), {"A": torch.randn(2, 9), "B": torch.randn(7, 2)})
    dora = Change(LoraConfig(r=2, lora_alpha=6, use_dora=True), {**plain.tensors, "magnitude": torch.rand(7)})
    expected = (3 * plain.tensors["B"] @ plain.tensors["A"]).norm().item()
    assert norm_of(dora) == norm_of(plain) == pytest.approx(expected, rel=1e-5)


def test_what_depends_on_the_weight_has_no_norm():
    model = get_peft_model(net(), LoraConfig(peft_type="IA3", target_modules=["one"]))
    adapter = model.get_adapter()
    assert values_of(adapter, changes(adapter)).norms == {"one": None}


def test_dead_layers_twins_and_nan_are_told():
    adapter = lora({"model.a": (6, 5), "model.b": (6, 5), "model.c": (6, 5), "model.d": (6, 5)})
    adapter.tensors["model.a"]["B"].zero_()
    adapter.tensors["model.c"] = {name: own.clone() for name, own in adapter.tensors["model.b"].items()}
    adapter.tensors["model.d"]["A"][1, 2] = torch.nan
    found = summary(adapter)
    assert found.values.dead == ("model.a",)
    assert found.faults == ("NaN or infinity in: model.d.A",)
    assert "model.d" not in found.values.norms
    told = "\n".join(found.doubts)
    assert "as if never trained: model.a" in told
    assert "model.b = model.c" in told
    assert summary(lora({"model.a": (6, 5), "model.b": (6, 5)})).doubts == ()


def test_values_that_float16_does_not_hold():
    adapter = lora({"a": (6, 5), "b": (6, 5)})
    adapter.tensors["a"]["B"][0, 0] = -70000.0
    assert "cannot hold: a.B" in "\n".join(summary(adapter).doubts)
    small = lora({"a": (6, 5), "b": (6, 5)}, dtype=torch.float16)
    small.tensors["b"]["A"] *= 1e-6
    assert "loses digits: b.A" in "\n".join(summary(small).doubts)
    assert subnormal(torch.tensor([1e-6, 1e-2, 0, 1e-5], dtype=torch.float16)) == 0.5
    assert subnormal(torch.tensor([1e-6])) == 0
    assert not overflows(torch.tensor([65504.0]))
    assert overflows(torch.tensor([65505.0]))
    assert not overflows(torch.zeros(0))
