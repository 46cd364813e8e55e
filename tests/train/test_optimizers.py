"""LoRA+: B learns faster, everything that trains is in exactly one group."""

import pytest
import torch
from torch import nn

from veneer import AdapterError, LoraConfig, get_peft_model, lora_plus_groups


@pytest.mark.parametrize("dora", [False, True])
def test_b_has_the_larger_rate_and_nothing_is_left_out(dora):
    model = get_peft_model(
        nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), LoraConfig(target_modules="0|1", use_dora=dora)
    )
    slow, fast = lora_plus_groups(model, 1e-3, 8)
    assert (slow["lr"], fast["lr"]) == (1e-3, 8e-3)
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(names[id(parameter)].endswith(".B") for parameter in fast["params"])
    assert len(fast["params"]) == 2
    assert {id(parameter) for parameter in slow["params"] + fast["params"]} == set(names)
    torch.optim.AdamW([slow, fast], lr=1.0)


def test_a_model_without_b_is_refused():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(target_modules=["0"], peft_type="LOHA"))
    with pytest.raises(AdapterError, match="trains none"):
        lora_plus_groups(model, 1e-3)
