"""Copy: a deep copy and a pickle are the same model, and independent of the first."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from veneer import PeftModel


def _through_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _through_old_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model, protocol=0))


COPIES = [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), _through_old_pickle, _through_torch_save]
IDS = ["deepcopy", "pickle", "pickle-0", "torch.save"]


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("duplicate", COPIES, ids=IDS)
def test_a_copy_is_the_same_and_independent(case, bits, duplicate, merged):
    model, x = case.adapted("a", "b", base=case.stack(), targets=["layer", "head"]), case.x(3)
    model.set_adapter({"a": 0.7, "b": 0.3})
    if merged:
        model.merge_adapter()
    before, y = bits(model), model(x)
    twin = duplicate(model)
    assert isinstance(twin, PeftModel)
    assert type(twin) is type(model)
    assert type(twin.layer) is type(model.layer)
    assert bits(twin) == before
    assert torch.equal(twin(x), y)

    if merged:
        twin.unmerge_adapter()
    twin.set_adapter("b")
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    twin.add_adapter("c", case.config())
    twin.unload()
    assert bits(model) == before
    assert model.active_adapters == ["a", "b"]
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("duplicate", COPIES, ids=IDS)
def test_a_copy_shares_one_plan_among_its_layers_and_learns(case, duplicate):
    twin = duplicate(case.adapted(base=case.stack(), targets=["layer", "head"]))
    assert twin.layer.adapters.plan is twin.head.adapters.plan is twin.adapter_plan
    twin(case.x(3)).sum().backward()
    assert all(parameter.grad is not None for parameter in case.parameters(twin))


@pytest.mark.parametrize("duplicate", COPIES, ids=IDS)
def test_a_copy_of_one_layer_carries_its_plan(case, duplicate):
    model, x = case.adapted(), case.x(3)
    assert torch.equal(duplicate(model.layer)(x), model(x))
