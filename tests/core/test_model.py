"""`PeftModel` on genuine models: it stays what it was, and every call does what it says or changes nothing."""

import re

import pytest
import torch
from torch import nn
from transformers import GenerationMixin, LlamaForCausalLM, PreTrainedModel

from veneer import AdapterError, LoraConfig, PeftModel, get_peft_model
from veneer.core.inject import adapted_layers

CONFIG = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
TOKENS = torch.arange(10).view(2, 5)


@pytest.fixture
def llama(tiny):
    return tiny("llama")


@pytest.fixture
def model(llama):
    return get_peft_model(llama, CONFIG, "fr")


def kinds(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def test_the_model_is_still_the_model(llama, bits):
    before, classes = bits(llama), kinds(llama)
    model = get_peft_model(llama, CONFIG)
    assert model is llama
    assert isinstance(model, PeftModel)
    assert isinstance(model, LlamaForCausalLM)
    assert isinstance(model, PreTrainedModel)
    assert isinstance(model.model.layers[0].self_attn.q_proj, nn.Linear)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert {key: bits(model)[key] for key in before} == before
    assert all(".adapters.default." in key for key in bits(model) if key not in before)
    assert model.unload() is llama
    assert type(llama) is LlamaForCausalLM
    assert (bits(llama), kinds(llama)) == (before, classes)
    assert not hasattr(llama, "adapter_plan")
    assert not hasattr(llama, "peft_config")


def test_generate_and_save_pretrained_of_the_merged_model(model, tmp_path):
    assert isinstance(model, GenerationMixin)
    said = model.generate(TOKENS, max_new_tokens=4, do_sample=False)
    merged = model.merge_and_unload()
    assert type(merged) is LlamaForCausalLM
    assert torch.equal(merged.generate(TOKENS, max_new_tokens=4, do_sample=False), said)
    merged.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.generate(TOKENS, max_new_tokens=4, do_sample=False), said)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_gradient_checkpointing_of_transformers_gives_the_same_gradients(model):
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train().zero_grad()
        model(TOKENS, labels=TOKENS).loss.backward()
        found.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    torch.testing.assert_close(*found)


def test_what_trains_is_counted_and_printed(model, capsys):
    every = sum(parameter.numel() for parameter in model.parameters())
    trains = sum(2 * (layer.weight.shape[0] + layer.weight.shape[1]) for _, layer in adapted_layers(model))
    assert model.get_nb_trainable_parameters() == (trains, every)
    model.print_trainable_parameters()
    assert capsys.readouterr().out == (
        f"trainable params: {trains:,} || all params: {every:,} || trainable%: {100 * trains / every:.4f}\n"
    )


def test_adapters_come_and_go(model, bits, tmp_path):
    french = model(TOKENS).logits
    model.save_pretrained(tmp_path)
    model.add_adapter("formal", LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))
    model.load_adapter(tmp_path, "copy")
    assert list(model.peft_config) == ["fr", "formal", "copy"]
    assert model.active_adapters == ["fr"]
    assert torch.equal(model(TOKENS).logits, french)
    model.set_adapter("copy")
    assert torch.equal(model(TOKENS).logits, french)
    assert {p.requires_grad for n, p in model.named_parameters() if ".adapters.copy." in n} == {False}
    assert {p.requires_grad for n, p in model.named_parameters() if ".adapters.formal." in n} == {True}

    model.set_adapter(["copy", "formal"])
    model.delete_adapter("copy")
    assert model.active_adapters == ["formal"]
    model.delete_adapter("fr")
    assert [path for path, _ in adapted_layers(model)] == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    model.delete_adapter("formal")
    assert (model.active_adapters, list(adapted_layers(model))) == ([], [])
    model.add_adapter("again", CONFIG)
    assert type(model.unload()) is LlamaForCausalLM


def test_is_trainable(llama, model, tmp_path, tiny):
    model.save_pretrained(tmp_path)
    for trains in (False, True):
        loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path, is_trainable=trains)
        assert (loaded.get_nb_trainable_parameters()[0] > 0) == trains
        assert loaded.active_adapters == ["default"]


def test_the_config_says_which_base_it_was_made_for(tiny, tmp_path):
    llama = tiny("llama")
    llama.name_or_path = "hub/tiny-llama"
    model = get_peft_model(llama, CONFIG)
    model.add_adapter("second", CONFIG)
    assert {config.base_model_name_or_path for config in model.peft_config.values()} == {"hub/tiny-llama"}
    assert CONFIG.base_model_name_or_path is None
    model.save_pretrained(tmp_path, "second")
    with pytest.raises(AdapterError, match="matches no module"):
        PeftModel.from_pretrained(tiny("gpt2"), tmp_path)
    with pytest.raises(AdapterError, match=r"this LlamaForCausalLM \(it was made for hub/tiny-llama\)"):
        PeftModel.from_pretrained(tiny("llama", hidden_size=16), tmp_path)


BAD_NAMES = ["", "a.b", "plan", "original", "keys", "forward", "training", "_modules", 3, None]


@pytest.mark.parametrize("name", BAD_NAMES, ids=repr)
def test_a_name_that_cannot_be_an_adapters_is_refused(llama, bits, name):
    before, classes = bits(llama), kinds(llama)
    with pytest.raises(AdapterError, match=re.escape(f"{name!r} cannot be an adapter's name")):
        get_peft_model(llama, CONFIG, name)
    assert (bits(llama), kinds(llama)) == (before, classes)
    assert all(parameter.requires_grad for parameter in llama.parameters())


@pytest.mark.parametrize("name", ["q_proj", "layers", "lora_A", "default", "fr-FR", "with space", "weight", "0"])
def test_a_name_that_looks_like_a_part_of_the_model_is_fine(llama, tiny, tmp_path, name):
    model = get_peft_model(llama, CONFIG, name)
    model.save_pretrained(tmp_path)
    model.set_adapter({name: 0.5})
    model.merge_and_unload()
    assert PeftModel.from_pretrained(tiny("llama"), tmp_path, name).active_adapters == [name]


ERRORS = {
    "twice": (lambda m: get_peft_model(m, CONFIG), "already carries adapters: use add_adapter or load_adapter"),
    "same name": (lambda m: m.add_adapter("fr", CONFIG), "already carries an adapter named 'fr'"),
    "no target": (lambda m: m.add_adapter("x", LoraConfig(target_modules=["q_prog"])), "did you mean 'q_proj'"),
    "no method": (lambda m: m.add_adapter("x", LoraConfig(target_modules=["q_proj"], peft_type="LOHA2")), "'LOHA2'"),
    "unknown set": (lambda m: m.set_adapter("de"), "no adapter named 'de'; the model carries 'fr'"),
    "unknown delete": (lambda m: m.delete_adapter("frr"), "no adapter named 'frr'.*did you mean 'fr'"),
    "unknown save": (lambda m: m.save_pretrained("nowhere", "de"), "no adapter named 'de'"),
    "unknown merge": (lambda m: m.merge_and_unload("de"), "no adapter named 'de'"),
    "no folder": (lambda m: m.load_adapter("nowhere", "x"), "adapter folder nowhere does not exist"),
}


@pytest.mark.parametrize(("call", "said"), ERRORS.values(), ids=ERRORS)
def test_an_error_leaves_the_model_as_it_was(model, bits, call, said):
    before, classes, configs = bits(model), kinds(model), dict(model.peft_config)
    with pytest.raises(AdapterError, match=said):
        call(model)
    assert (bits(model), kinds(model), model.peft_config) == (before, classes, configs)
    assert model.active_adapters == ["fr"]


@pytest.mark.parametrize("name", ["get_adapter", "using", "peft_config", "unload"])
def test_a_model_with_a_part_of_that_name_is_refused(name):
    base = nn.Sequential(nn.Linear(2, 2))
    base.add_module(name, nn.Linear(2, 2))
    with pytest.raises(AdapterError, match=f"Sequential already has something named '{name}'"):
        get_peft_model(base, LoraConfig(target_modules=["0"]))
    assert type(base) is nn.Sequential


@pytest.mark.parametrize("padded", [False, True])
def test_an_encoder_of_torch_does_not_run_past_its_adapters(padded):
    """In eval mode nn.TransformerEncoderLayer reads the weights of its linear layers and never calls them."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    base = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    x, mask = torch.randn(2, 3, 8), torch.tensor([[False] * 3, [False, False, True]]) if padded else None
    with torch.no_grad():
        trained = model.train()(x, src_key_padding_mask=mask)
        found = model.eval()(x, src_key_padding_mask=mask)
    kept = slice(None) if mask is None else ~mask
    torch.testing.assert_close(found[kept], trained[kept])


def test_layers_that_are_never_called_are_named_once():
    class Forgetful(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.used(x)

    model = get_peft_model(Forgetful().eval(), LoraConfig(target_modules=["used", "unused"]))
    x = torch.randn(1, 2)
    model(x)
    with pytest.warns(UserWarning, match="did not call, so they learn nothing: unused"):
        model.train()(x)
    model(x)
    assert not model.used._forward_pre_hooks
