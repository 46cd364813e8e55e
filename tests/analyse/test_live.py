"""What a model says that it carries, and that PEFT says the same of the same adapters."""

import torch
from torch import nn

from veneer import LoraConfig, get_peft_model


def _base() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3, dtype=torch.float64))


def test_layers_and_model_say_what_they_carry():
    model = get_peft_model(_base(), LoraConfig(r=2, target_modules=["0", "1"], use_dora=True))
    model.add_adapter("b", LoraConfig(r=2, target_modules=["2"], options={"freeze_A": True}))
    model.set_adapter({"default": 0.5, "b": 2})
    first, second, third = model.get_layer_status()
    assert [(status.name, status.module_type, status.kind) for status in (first, second, third)] == [
        ("0", "Linear", "Linear"),
        ("1", "LayerNorm", "Norm"),
        ("2", "Linear", "Linear"),
    ]
    assert (first.available_adapters, first.peft_types) == (["default"], {"default": "LORA-DORA"})
    assert (third.active_adapters, third.requires_grad) == (["b"], {"b": "irregular"})
    assert (third.devices, third.dtypes) == ({"b": ["cpu"]}, {"b": ["float64"]})
    status = model.get_model_status()
    assert (status.base_model_type, status.num_adapter_layers, status.enabled) == ("Sequential", 3, True)
    assert (status.trainable_params, status.total_params) == model.get_nb_trainable_parameters()
    assert status.weights == {"default": 0.5, "b": 2.0}
    assert status.dtypes == {"default": ["float32"], "b": ["float64"]}
    assert "num_adapter_layers: 3\n" in str(status)
    assert str(first).startswith("name: 0\nmodule_type: Linear\nkind: Linear\npeft_types: ")


def test_it_follows_what_acts():
    model = get_peft_model(_base(), LoraConfig(r=2, target_modules=["0"]))
    model.add_adapter("b", LoraConfig(r=2, target_modules=["2"]))
    assert [status.active_adapters for status in model.get_layer_status()] == [["default"], []]
    with model.disable_adapter():
        assert not model.get_model_status().enabled
    model.merge_adapter()
    status = model.get_model_status()
    assert status.merged_adapters == status.active_adapters == ["default"]
    assert [status.merged_adapters for status in model.get_layer_status()] == [["default"], []]


def test_peft_says_the_same():
    import peft

    settings = {"r": 2, "target_modules": ["0", "2"]}
    ours = get_peft_model(_base(), LoraConfig(**settings)).get_model_status()
    theirs = peft.get_peft_model(_base(), peft.LoraConfig(**settings)).get_model_status()
    same = set(vars(theirs)) - {"adapter_model_type", "quantization_backend"}
    assert {name: getattr(ours, name) for name in same} == {name: getattr(theirs, name) for name in same}
