"""Switching costs the same whatever the model's size; a thousand merges leave nothing behind."""

import sys

import pytest
import torch
from torch import nn

from veneer import LoraConfig, get_peft_model


def carrying(layers: int, dtype: torch.dtype = torch.float32):
    model = nn.Sequential(*(nn.Linear(8, 8, dtype=dtype) for _ in range(layers)))
    config = LoraConfig(r=2, target_modules=[str(i) for i in range(layers)], init_lora_weights=False)
    model = get_peft_model(model, config, "a")
    model.add_adapter("b", config)
    return model


def calls(action) -> int:
    """How many functions are called, Python's and C's."""
    count = 0

    def tick(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(tick)
    try:
        action()
    finally:
        sys.setprofile(before)
    return count


def test_switching_costs_the_same_for_2_layers_and_for_200():
    def switches(model):
        with model.using({"a": 0.5, "b": 0.5}), model.disable_adapter():
            model.set_adapter("a")

    few, many = carrying(2), carrying(200)
    for model in (few, many):
        switches(model)  # what is found once is found
    for action in (lambda model: model.set_adapter("b"), switches):
        assert calls(lambda own=action: own(few)) == calls(lambda own=action: own(many))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_thousand_merges_leave_the_bits_as_they_were(dtype):
    model, x = carrying(2, dtype), torch.randn(3, 8, dtype=dtype)
    before, live = {name: tensor.clone() for name, tensor in model.state_dict().items()}, model(x)
    for i in range(1000):
        model.merge_adapter({"a": 1.0 + i % 3, "b": -0.5})
        model.unmerge_adapter()
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(model(x), live)
