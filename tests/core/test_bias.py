"""Biases that belong to an adapter: trained, switched, mixed and merged with it, and the base's stay."""

import copy

import pytest
import torch
from torch import nn

from veneer import AdapterError, LoraConfig, PeftModel, get_peft_model
from veneer.core.inject import adapted_layers

TOKENS = torch.arange(3, 15).view(3, 4)
BIASES = ["lora_only", "all"]


def moved(model: nn.Module) -> nn.Module:
    """Trained: no longer what it was."""
    for _, layer in adapted_layers(model):
        for parameter in layer.adapters.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def config(bias: str, **more: object) -> LoraConfig:
    return LoraConfig(**{"target_modules": ["query", "value"], "bias": bias, **more})


def values(model: nn.Module, name: str = "default") -> dict[str, torch.Tensor]:
    """The biases that the adapter trained, by the base's names."""
    tensors = model.get_adapter(name).tensors
    return {path: own["value"] for path, own in tensors.items() if "value" in own}


@pytest.mark.parametrize("bias", BIASES)
def test_trained_biases_act_as_if_they_were_the_base_s(tiny, bias, bits):
    base = tiny("bert").double()
    plain, before = copy.deepcopy(base), base(TOKENS).logits
    model = get_peft_model(base, config(bias))
    assert torch.equal(model(TOKENS).logits, before)
    held = bits(plain)
    moved(model)
    own = values(model)
    every = {name for name, _ in plain.named_parameters() if name.endswith(".bias")}
    assert own.keys() == (every if bias == "all" else {n for n in every if "query" in n or "value" in n})
    reference = copy.deepcopy(plain)
    for name, value in own.items():
        reference.get_parameter(name).data = value.double()
    reference = get_peft_model(reference, config("none"))
    for path, layer in adapted_layers(reference):
        update, other = layer.adapters["default"], model.get_submodule(path).adapters["default"]
        update.A.data, update.B.data = other.A.data, other.B.data
    live = model(TOKENS).logits
    torch.testing.assert_close(live, reference(TOKENS).logits, rtol=1e-12, atol=1e-12)
    live.square().sum().backward()
    for parameter in reference.parameters():
        parameter.requires_grad_()
    reference(TOKENS).logits.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(gradients) == len(own) + 8
    for name in own:
        path, wanted = name.removesuffix(".bias"), reference.get_parameter(name).grad
        found = next(g for n, g in gradients.items() if n.startswith(f"{path}.adapters.") and "bias" in n)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    model.merge_adapter()
    torch.testing.assert_close(model(TOKENS).logits, live, rtol=1e-12, atol=1e-12)
    model.unmerge_adapter()
    assert bits(model.unload()) == held


@pytest.mark.parametrize("bias", BIASES)
def test_biases_are_switched_mixed_saved_and_deleted_with_their_adapter(tiny, bias, tmp_path):
    model = get_peft_model(tiny("bert"), config(bias), "a")
    model.add_adapter("b", config(bias))
    model.add_adapter("c", config("none"))
    moved(model)
    specs = ["a", "__base__", {"a": 0.5, "b": 1.5, "c": -1.0}]
    together = model(TOKENS, adapter_names=specs).logits
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS, adapter_names=specs).logits, together)
    with model.disable_adapter():
        assert torch.equal(together[1], model(TOKENS).logits[1])
    for i, spec in enumerate(specs):
        with model.using([] if spec == "__base__" else spec):
            torch.testing.assert_close(together[i], model(TOKENS[i : i + 1]).logits[0])
    model.set_adapter("b")
    live = model(TOKENS).logits
    model.save_pretrained(tmp_path, "b")
    model.delete_adapter("a")
    assert torch.equal(model(TOKENS).logits, live)
    read = PeftModel.from_pretrained(model.unload(), tmp_path)
    assert torch.equal(read(TOKENS).logits, live)


def test_biases_alone_are_an_adapter_too(tiny):
    model = get_peft_model(tiny("bert"), LoraConfig(target_modules=[], bias="all"))
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(map(torch.numel, own)) == sum(
        p.numel() for n, p in model.named_parameters() if n.endswith(".bias") and "adapters" not in n
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"target_modules": ["attention"], "bias": "lora_only"}, "attention is a MultiheadAttention whose bias is not"),
        ({"target_modules": ["first"], "bias": "all"}, r"attention\.out_proj is a Non\w+ whose bias is not trained"),
    ],
    ids=str,
)
def test_a_bias_that_would_not_act_is_refused(settings, said):
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "attention": nn.MultiheadAttention(4, 2)})
    with pytest.raises(AdapterError, match=said):
        get_peft_model(model, LoraConfig(**settings))


def test_a_bias_in_a_word_is_one_of_three():
    with pytest.raises(AdapterError, match='bias should be "none", "all" or "lora_only", found \'some\''):
        LoraConfig(bias="some")
