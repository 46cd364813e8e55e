"""Identity: a fresh adapter changes nothing, exactly."""

import pytest
import torch

from veneer import get_peft_model


@pytest.mark.parametrize("start", [{}, {"init_lora_weights": "gaussian"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_fresh_adapter_changes_nothing(case, dtype, start):
    model = case.base(dtype)
    inputs = [case.x(*batch, dtype=dtype) for batch in case.example.batches]
    before = [model(x) for x in inputs]
    model = get_peft_model(model, case.config(**start))
    for x, y in zip(inputs, before, strict=True):
        assert torch.equal(model(x), y)


def test_a_fresh_adapter_with_dropout_changes_nothing_in_training(case):
    model, x = case.base().train(), case.x(3)
    before = model(x)
    assert torch.equal(get_peft_model(model, case.config(lora_dropout=0.5))(x), before)


def test_a_fresh_adapter_merges_to_the_same_weight(case, bits):
    model = case.base()
    before = bits(model)
    model = get_peft_model(model, case.config())
    assert bits(model.merge_and_unload()) == before


def test_the_base_keeps_its_paths_parameters_and_hooks(case, bits):
    model, x = case.base(), case.x(3)
    before, parameters, seen = bits(model), dict(model.named_parameters()), []
    model.layer.register_forward_hook(lambda *_: seen.append(1))
    kind = type(model.layer)
    model = get_peft_model(model, case.config())
    model(x)
    assert isinstance(model.layer, kind)
    assert {key: bits(model)[key] for key in before} == before
    assert all(dict(model.named_parameters())[name] is parameter for name, parameter in parameters.items())
    assert {key for key in bits(model) if key not in before} == {
        f"layer.adapters.default.{name}" for name in model.layer.adapters["default"].state_dict()
    }
    assert seen == [1]
