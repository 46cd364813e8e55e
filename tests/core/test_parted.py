"""Fused projections in parts: the right rows, whatever the family; and nothing is guessed."""

import json

import pytest
import torch
from torch import nn

from veneer import AdapterError, LoraConfig, PeftModel, get_peft_model, lora_plus_groups


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 4, "vocab_size": 30, "n_positions": 9}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, attn_implementation="eager"))


def _phi3() -> nn.Module:
    from transformers import Phi3Config, Phi3ForCausalLM

    return Phi3ForCausalLM(_sized(Phi3Config, num_key_value_heads=1, pad_token_id=0))


def _neox() -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(_sized(GPTNeoXConfig))


def _bloom() -> nn.Module:
    from transformers import BloomConfig, BloomForCausalLM

    return BloomForCausalLM(_sized(BloomConfig))


def _falcon(**settings: object) -> nn.Module:
    from transformers import FalconConfig, FalconForCausalLM

    return FalconForCausalLM(_sized(FalconConfig, **settings))


def _sized(config: type, **settings: object) -> object:
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "attn_implementation": "eager"}
    return config(vocab_size=30, **sizes, **ends, **settings)


FAMILIES = {
    "gpt2": (_gpt2, "c_attn"),
    "phi3": (_phi3, "qkv_proj"),
    "gpt-neox": (_neox, "query_key_value"),
    "bloom": (_bloom, "query_key_value"),
    "falcon": (lambda: _falcon(multi_query=False), "query_key_value"),
    "falcon-multi-query": (lambda: _falcon(multi_query=True), "query_key_value"),
    "falcon-new": (lambda: _falcon(new_decoder_architecture=True, num_kv_heads=2), "query_key_value"),
}


def _seen(model: nn.Module) -> tuple[torch.Tensor, ...]:
    """Attention, keys and values of the only layer, which depend on its q and k, k, v."""
    with torch.no_grad():
        out = model.eval()(torch.arange(7)[None], use_cache=True, output_attentions=True)
    layer = out.past_key_values.layers[0]
    return out.attentions[0], layer.keys, layer.values


@pytest.mark.parametrize("family", FAMILIES)
def test_each_part_changes_what_transformers_makes_of_it_and_nothing_else(family):
    make, name = FAMILIES[family]
    model = make()
    before = _seen(model)
    for part, moved in enumerate(((True, False, False), (True, True, False), (False, False, True))):
        fused = {name: [3 if i == part else 0 for i in range(3)]}
        config = LoraConfig(target_modules=[name], init_lora_weights=False, lora_alpha=90, options={"fused": fused})
        model = get_peft_model(model, config)
        after = _seen(model)
        assert [not torch.allclose(a, b, atol=1e-6) for a, b in zip(before, after, strict=True)] == list(moved)
        model = model.unload()


def test_the_halves_of_gate_and_up_are_known():
    config = LoraConfig(
        target_modules=["gate_up_proj"], init_lora_weights=False, options={"fused": {"gate_up_proj": [0, 2]}}
    )
    layer = get_peft_model(_phi3(), config).model.layers[0].mlp.gate_up_proj
    moved = (layer.adapters["default"].delta(layer.weight) != 0).any(1)
    assert moved.tolist() == [False] * 24 + [True] * 24


FAULTS = [
    ({"c_att": [1, 1, 1]}, "'c_att' matches no adapted layer; did you mean"),
    ({"c_attn": [1, 1]}, r"c_attn has 48 rows in parts of \[16, 16, 16\], which do not fill it with ranks \[1, 1\]"),
    (
        {"c_attn": {"r": [1, 1, 1], "sizes": [8, 8, 8]}},
        r"c_attn is split into parts of \[16, 16, 16\] rows, not of \[8",
    ),
    ({"c_fc": [1, 1]}, "how transformer.h.0.mlp.c_fc is split is not known: give .*'sizes'"),
    ({"c_fc": {"r": [1, 1], "sizes": [5, 5]}}, "c_fc has 64 rows in parts of .* do not fill it"),
    ({"c_attn": [0, 0, 0]}, "fused should be"),
    ({"c_attn": [1, -1, True]}, "fused should be"),
    ({"c_attn": {"r": [1], "size": [1]}}, "fused should be"),
    ({"c_attn": {"r": [1], "sizes": [0]}}, "fused should be"),
    ({"": [1]}, "fused should be"),
    ({f"c_{i}": [1] for i in range(900)}, r"'c_0' matches no adapted layer.*; and 892 more"),
    ({f"c_{i}": [1] for i in range(9000)}, "fused should be"),
    (["c_attn"], "fused should be"),
]


@pytest.mark.parametrize(("fused", "said"), FAULTS, ids=str)
def test_what_is_wrong_with_the_parts_is_said(fused, said):
    with pytest.raises(AdapterError, match=said):
        get_peft_model(_gpt2(), LoraConfig(target_modules=["c_attn", "c_fc"], options={"fused": fused}))


def test_parts_do_not_start_from_the_weight_and_are_lora_alone():
    fused = {"options": {"fused": {"c_attn": [1, 0, 1]}}, "target_modules": ["c_attn"]}
    with pytest.raises(
        AdapterError, match="parts cannot start from the weight or from data, as init_lora_weights='pissa' asks"
    ):
        get_peft_model(_gpt2(), LoraConfig(init_lora_weights="pissa", **fused))
    with pytest.raises(AdapterError, match="LOHA has nothing, not 'fused'"):
        LoraConfig(peft_type="LOHA", **fused)


def test_parts_stand_beside_parameters_by_name_that_have_none():
    more = {"target_modules": ["c_attn"], "options": {"fused": {"c_attn": [1, 0, 1]}}}
    model = get_peft_model(_gpt2(), LoraConfig(r=2, target_parameters=["wpe.weight"], **more))
    assert model.transformer.wpe.adapters["default"]["weight"].A.shape == (2, 16)


def test_the_file_is_an_ordinary_lora_and_so_is_what_is_read(tmp_path):
    """Whatever the ranks, scales and patterns of the parts and of the other layers."""
    config = LoraConfig(
        r=2, lora_alpha=3, use_rslora=True, target_modules=["c_attn", "c_fc"], init_lora_weights=False,
        rank_pattern={"c_attn": 7, "c_fc": 3}, alpha_pattern={"attn.c_attn": 5},
        options={"fused": {"c_attn": [4, 0, 1]}},
    )  # fmt: skip
    model, x = get_peft_model(_gpt2().eval(), config), torch.arange(7)[None]
    y = model(x).logits
    model.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert said["rank_pattern"] == {"c_attn": 5, "c_fc": 3}
    assert "fused" not in said
    again = PeftModel.from_pretrained(model.unload(), tmp_path)
    assert torch.equal(again(x).logits, y)
    assert again.get_adapter().config.options["fused"] == {}


def test_a_file_cannot_claim_parts(tmp_path):
    config = LoraConfig(r=5, target_modules=["c_attn"], init_lora_weights=False)
    model = get_peft_model(_gpt2(), config)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "fused": {"c_attn": [4, 0, 1]}}))
    with pytest.raises(AdapterError, match="says how an adapter is trained, which its tensors are not read under"):
        PeftModel.from_pretrained(model.unload(), tmp_path)


def test_patterns_keep_their_order_in_the_file(tmp_path):
    """The first that matches counts."""
    model = nn.ModuleDict({"z": nn.ModuleDict({"q": nn.Linear(4, 4)}), "y": nn.ModuleDict({"q": nn.Linear(4, 4)})})
    config = LoraConfig(target_modules=["q"], rank_pattern={"z.q": 2, "q": 3})
    get_peft_model(model, config).save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(model.unload(), tmp_path)
    assert [len(again[name].q.adapters["default"].A) for name in "zy"] == [2, 3]


def test_lora_plus_knows_every_b():
    options = {"fused": {"c_attn": [2, 0, 4]}}
    model = get_peft_model(_gpt2(), LoraConfig(target_modules=["c_attn"], options=options))
    assert [len(group["params"]) for group in lora_plus_groups(model, 1e-3)] == [1, 2]
