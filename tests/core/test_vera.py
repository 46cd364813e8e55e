"""VeRA: one projection for all layers, wherever the model goes."""

import copy
import pickle

import pytest
import torch
from torch import nn

from veneer import LoraConfig, PeftModel, get_peft_model


def adapted(**options: object) -> PeftModel:
    config = LoraConfig(r=4, peft_type="VERA", target_modules=["0", "1"], options=options)
    return get_peft_model(nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 5)), config)


@pytest.mark.parametrize("move", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), nn.Module.half])
def test_all_layers_share_one_projection_that_is_in_no_state_dict(move):
    model = move(adapted())
    first, second = (layer.adapters["default"].shared for layer in model)
    assert first is second
    assert (first.A.shape, first.B.shape) == ((4, 12), (12, 4))
    assert len({tensor.data_ptr() for tensor in model.buffers()}) == 2
    assert not any(".shared." in key for key in model.state_dict())


def test_a_copy_has_a_projection_of_its_own():
    model = adapted()
    twin = copy.deepcopy(model)
    twin[0].adapters["default"].shared.A.zero_()
    assert model[0].adapters["default"].shared.A.any()


def test_the_key_gives_the_projection_back(tmp_path):
    model = adapted(save_projection=False, projection_prng_key=3)
    nn.init.normal_(model[0].adapters["default"].b)
    model.save_pretrained(tmp_path)
    other = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 5))
    other.load_state_dict({key: value for key, value in model.state_dict().items() if "adapters" not in key})
    x = torch.randn(3, 8)
    assert torch.equal(PeftModel.from_pretrained(other, tmp_path)(x), model(x))
    assert "" not in model.get_adapter().tensors
    assert set(adapted().get_adapter().tensors[""]) == {"A", "B"}
