"""A whole adapted model as an object: copied, pickled into another process, taken apart, on "meta", on many devices."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from veneer import AdapterError, LoraConfig, PeftModel, get_peft_model
from veneer.core.inject import adapted_layers

TOKENS = torch.arange(10).view(2, 5)
CONFIG = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)


@pytest.fixture(params=["live", "merged", "bf16"])
def model(request, tiny):
    model = get_peft_model(tiny("llama").to(torch.bfloat16 if request.param == "bf16" else torch.float32), CONFIG)
    model.add_adapter("b", LoraConfig(r=3, target_modules=["q_proj", "embed_tokens"], init_lora_weights=False))
    model.set_adapter({"default": 0.5, "b": 1.0})
    if request.param == "merged":
        model.merge_adapter()
    return model


def torch_saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), torch_saved])
def test_a_copy_is_the_same_model_and_goes_its_own_way(model, duplicate):
    before = model(TOKENS).logits
    twin = duplicate(model)
    assert torch.equal(twin(TOKENS).logits, before)
    assert twin.peft_config == model.peft_config
    if twin.adapter_plan.merged:
        twin.unmerge_adapter()
    twin.set_adapter("b")
    twin.delete_adapter("default")
    twin.unload()
    assert torch.equal(model(TOKENS).logits, before)
    assert model.active_adapters == ["default", "b"]


def test_a_pickle_is_read_in_a_process_that_has_not_adapted_anything(tiny, tmp_path):
    model = get_peft_model(tiny("llama"), CONFIG)
    model.merge_adapter()
    torch.save(model, tmp_path / "model.pt")
    code = (
        "import sys, torch; model = torch.load(sys.argv[1], weights_only=False);"
        "torch.save(model(torch.arange(10).view(2, 5)).logits, sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pt"), str(tmp_path / "logits.pt")], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), model(TOKENS).logits)


def test_the_copy_of_one_layer_is_not_one_of_all(model):
    layer = next(layer for _, layer in adapted_layers(model))
    assert len(pickle.dumps(layer)) < 4 * sum(t.nbytes for t in layer.state_dict().values()) + 20_000
    twin = copy.deepcopy(layer)
    assert {id(u) for by_layer in twin.adapters.plan.updates.values() for u in by_layer.values()} == {
        id(update) for update in twin.adapters.values()
    }


def test_the_copy_of_one_layer_acts_as_it_did_and_is_refused_in_the_model():
    config, x = LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False), torch.randn(3, 4)
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), config, "a")
    model.add_adapter("b", config)
    own, before = model[0], model[0](x)
    twin = copy.deepcopy(own)
    model.set_adapter("b")
    assert torch.equal(twin(x), before)
    assert not torch.equal(own(x), before)
    model[0] = twin
    wrong = "0 is the copy of an adapted layer"
    for ask in (model.merge_adapter, model.get_adapter, model.get_layer_status, lambda: model.train()(x)):
        with pytest.raises(AdapterError, match=wrong):
            ask()
    model[0] = own
    assert set(model.get_adapter("a").tensors) == {"0", "1"}
    model[0] = twin
    assert [*adapted_layers(model.unload())] == []


def test_a_state_dict_goes_round(model, tiny):
    state = torch_saved(model.state_dict())
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())
    if model.adapter_plan.merged:
        with pytest.raises(AdapterError, match="unmerge_adapter"):
            model.load_state_dict(state)
        return
    other = get_peft_model(tiny("llama").to(model.dtype), CONFIG)
    other.add_adapter("b", model.peft_config["b"])
    other.set_adapter({"default": 0.5, "b": 1.0})
    other.load_state_dict(state)
    assert torch.equal(other(TOKENS).logits, model(TOKENS).logits)


def test_a_model_on_meta_is_adapted_and_filled_later(tiny):
    with torch.device("meta"):
        empty = tiny("llama")
    model = get_peft_model(empty, CONFIG)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    full = get_peft_model(tiny("llama"), CONFIG)
    model.to_empty(device="cpu")
    model.load_state_dict(full.state_dict())
    for (_, buffer), (_, known) in zip(model.named_buffers(), full.named_buffers(), strict=True):
        buffer.copy_(known)
    assert torch.equal(model(TOKENS).logits, full(TOKENS).logits)
    with torch.device("meta"):
        assigned = get_peft_model(tiny("llama"), CONFIG)
    assigned.load_state_dict(full.state_dict(), assign=True)
    assert {p.device.type for p in assigned.parameters()} == {"cpu"}


METHODS = {
    "lora": CONFIG,
    "dora": LoraConfig(r=2, target_modules="all-linear", use_dora=True),
    "vera": LoraConfig(r=2, target_modules="all-linear", peft_type="VERA"),
    "lokr": LoraConfig(r=2, target_modules="all-linear", peft_type="LOKR"),
    "pissa": LoraConfig(r=2, target_modules="all-linear", init_lora_weights="pissa"),
}


@pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
def test_loading_draws_no_random_numbers(tiny, tmp_path, config):
    get_peft_model(tiny("llama"), config).save_pretrained(tmp_path)
    base = tiny("llama")
    before = torch.get_rng_state()
    model = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=True)
    model.load_adapter(tmp_path, "second", low_cpu_mem_usage=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_adapters_stand_where_their_layers_do(tiny, tmp_path):
    """A device of its own for each half stands in for two GPUs: "meta" holds no values."""
    get_peft_model(tiny("llama"), CONFIG).save_pretrained(tmp_path)
    base = tiny("llama")
    base.model.layers[1].to("meta")
    with pytest.raises(AdapterError, match="would be lost: load its weights first"):
        PeftModel.from_pretrained(base, tmp_path)
    model = get_peft_model(base, CONFIG)
    for path, layer in adapted_layers(model):
        assert {p.device for p in layer.adapters.parameters()} == {layer.weight.device}, path
    assert {layer.weight.device.type for _, layer in adapted_layers(model)} == {"cpu", "meta"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_model_moves_with_its_adapters(tiny, dtype):
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    model.to(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model(torch.randn(2, 4, dtype=dtype)).dtype == dtype
