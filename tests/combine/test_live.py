"""`add_weighted_adapter`: the new adapter acts as the blend of the old ones does."""

import pytest
import torch
from torch import nn

from veneer import AdapterError, LoraConfig, get_peft_model
from veneer.apart.changes import changes


def adapted(model: nn.Module, **configs: LoraConfig) -> nn.Module:
    """The model with trained adapters."""
    names = list(configs)
    model = get_peft_model(model.double(), configs[names[0]], names[0])
    for name in names[1:]:
        model.add_adapter(name, configs[name])
    for name, parameter in model.named_parameters():
        if ".adapters." in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def lora(targets="all-linear", r=2, **fields) -> LoraConfig:
    return LoraConfig(r=r, lora_alpha=3, target_modules=targets, init_lora_weights=False, **fields)


TOKENS = torch.arange(5, 17)[None]


@pytest.mark.parametrize("how", ["linear", "cat"])
@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lora(), lora(r=3, use_rslora=True)),
        (lora(["q_proj", "embed_tokens"]), lora(["q_proj", "v_proj"], rank_pattern={"q_proj": 5})),
        (lora(), lora(use_dora=True)),
        (lora(peft_type="LOHA"), lora(peft_type="LOKR")),
        (lora(), LoraConfig(peft_type="IA3", target_modules=["q_proj", "down_proj"])),
        (lora(), lora(peft_type="VERA")),
        (lora(["q_proj"], modules_to_save=["norm"]), lora(["q_proj"], trainable_token_indices=[1, 7])),
        (lora("norm", r=1), lora()),
    ],
    ids=["lora", "targets", "dora", "lycoris", "ia3", "vera", "whole", "norms"],
)
def test_the_sum_acts_as_the_blend(tiny, one, other, how):
    model = adapted(tiny("llama"), a=one, b=other)
    with torch.no_grad():
        with model.using({"a": 0.7, "b": -0.3}):
            wanted = model(TOKENS).logits
        model.add_weighted_adapter(["a", "b"], [0.7, -0.3], "ab", how)
        assert model.active_adapters == ["a"]
        with model.using("ab"):
            torch.testing.assert_close(model(TOKENS).logits, wanted)
        with model.using({"a": 0.7, "b": -0.3}):
            torch.testing.assert_close(model(TOKENS).logits, wanted)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_on_other_layers(tiny, family):
    model = adapted(tiny(family), a=lora(bias="all"), b=lora(r=3))
    spec = {"a": 1.5, "b": -1.0}
    with torch.no_grad():
        with model.using(spec):
            wanted = model(TOKENS).logits
        model.add_weighted_adapter(list(spec), list(spec.values()), "ab")
        with model.using("ab"):
            torch.testing.assert_close(model(TOKENS).logits, wanted)


@pytest.mark.parametrize("others", ["LORA LORA", "LORA LOHA", "LORA LOKR", "LORA FULL", "LOHA LOHA", "LOKR FULL"])
def test_on_convolutions(unet, others):
    first, second = others.split()
    numbers = {"r": 3, "init_lora_weights": False}
    targets = ["conv1", "to_q", "proj_in", "conv_in"]
    model = adapted(
        unet,
        a=LoraConfig(target_modules=targets, peft_type=first, **numbers),
        b=LoraConfig(target_modules=targets[:2], peft_type=second, **numbers),
    )
    x, states = torch.randn(1, 4, 8, 8).double(), torch.randn(1, 3, 8).double()
    with torch.no_grad():
        with model.using({"a": 0.5, "b": -1.0}):
            wanted = model(x, 3, states).sample
        model.add_weighted_adapter(["a", "b"], [0.5, -1.0], "ab")
        with model.using("ab"):
            torch.testing.assert_close(model(x, 3, states).sample, wanted)


def test_parts_of_one_layer_have_one_rank():
    base = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dropout=0)
    numbers = {"target_modules": ["self_attn"], "init_lora_weights": False}
    model = adapted(base, a=LoraConfig(r=5, **numbers), b=LoraConfig(r=5, **numbers))
    x = torch.randn(2, 3, 8).double()
    with torch.no_grad():
        with model.using({"a": 0.5, "b": -1.0}):
            wanted = model(x)
        model.add_weighted_adapter(["a", "b"], [0.5, -1.0], "ab")
        model.add_weighted_adapter(["a", "b"], [0.5, -1.0], "some", "svd", svd_energy=0.7)
        with model.using("ab"):
            torch.testing.assert_close(model(x), wanted)


@pytest.mark.parametrize("how", ["svd", "ties", "ties_svd", "dare_linear_svd", "dare_ties", "magnitude_prune_svd"])
def test_pefts_other_types_give_the_largest_rank_or_the_one_asked_for(tiny, how):
    model = adapted(tiny("llama"), a=lora(), b=lora(r=3))
    told = {} if how == "svd" else {"density": 0.5}
    model.add_weighted_adapter(["a", "b"], [1, 1], "most", combination_type=how, **told)
    model.add_weighted_adapter(["a", "b"], [1, 1], "two", combination_type=how, svd_rank=2, **told)
    ranks = {name: {own.config.r for own in changes(model.get_adapter(name)).values()} for name in ("most", "two")}
    assert ranks == {"most": {3}, "two": {2}}


def test_of_a_rank_it_is_what_peft_finds_and_pefts_linear_is_not_the_sum(tiny, tmp_path):
    """PEFT adds √wᵢ Aᵢ and √wᵢ Bᵢ by themselves: what comes of the product has Bᵢ Aⱼ in it."""
    import peft

    ours = adapted(tiny("llama"), a=lora(["q_proj"]), b=lora(["q_proj"])).float()
    layer = ours.model.layers[0].self_attn.q_proj
    deltas = {name: layer.adapters[name].delta(layer.weight).detach() for name in "ab"}
    for name in "ab":
        ours.save_pretrained(tmp_path / name, name)
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "a", "a")
    theirs.load_adapter(tmp_path / "b", "b")
    found = {}
    for how in ("linear", "svd"):
        for model in (ours, theirs):
            model.add_weighted_adapter(["a", "b"], [0.7, 0.3], how, combination_type=how)
        found["ours", how] = layer.adapters[how].delta(layer.weight).detach()
        found["theirs", how] = theirs.base_model.model.model.layers[0].self_attn.q_proj.get_delta_weight(how).detach()
    wanted = 0.7 * deltas["a"] + 0.3 * deltas["b"]
    torch.testing.assert_close(found["ours", "svd"], found["theirs", "svd"])
    torch.testing.assert_close(found["ours", "linear"], wanted)
    assert (found["theirs", "linear"] - wanted).norm() > 0.3 * wanted.norm()


def test_the_model_stays_as_it_was_after_an_error(tiny, bits):
    model = adapted(tiny("llama"), a=lora(), b=lora(use_dora=True))
    before = bits(model)
    for told, said in (
        ((["a", "c"], [1, 1], "x"), "no adapter named 'c'"),
        ((["a", "b"], [1], "x"), "2 adapters and 1 weights"),
        ((["a", "b"], [1, 1], "a"), "already carries an adapter named 'a'"),
        ((["a", "b"], [1, 1], "x", "ties"), "density"),
        (("ab", [1, 1], "x"), "a list of names"),
    ):
        with pytest.raises(AdapterError, match=said):
            model.add_weighted_adapter(*told)
    with pytest.raises(AdapterError, match="svd_clamp is not supported"):
        model.add_weighted_adapter(["a", "b"], [1, 1], "x", "svd", svd_clamp=0.99)
    model.merge_adapter("a")
    with pytest.raises(AdapterError, match="combining adapters while 'a' is merged"):
        model.add_weighted_adapter(["a", "b"], [1, 1], "x")
    model.unmerge_adapter()
    assert list(model.peft_config) == ["a", "b"]
    assert bits(model) == before
