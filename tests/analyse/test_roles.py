"""A layer's role, told from its path in genuine models."""

import re
from collections import defaultdict

import pytest

from veneer.analyse.roles import role_of


def roles(model) -> dict[str, set[str]]:
    """Role → the last words of the layers that have it, numbers left out."""
    found = defaultdict(set)
    for path, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            words = [word for word in path.split(".") if not word.isdigit()]
            found[role_of(path)].add(words[-1])
    return found


def test_a_unet_has_every_role_of_an_image_model(unet):
    found = roles(unet)
    for which in ("attention", "cross-attention"):
        assert [found[f"{which} {side}"] for side in ("q", "k", "v", "out")] == [
            {"to_q"},
            {"to_k"},
            {"to_v"},
            {"to_out"},
        ]
    assert found["projection"] == {"proj_in", "proj_out"}
    assert found["feed-forward"] == {"proj", "net"}
    assert {"conv1", "conv2", "conv_in", "conv_out", "conv_shortcut", "conv"} == found["convolution"]
    assert found["time embedding"] == {"linear_1", "linear_2", "time_emb_proj"}
    assert "other" not in found


@pytest.mark.parametrize(
    ("family", "attention", "head"),
    [
        ("llama", ["q_proj", "k_proj", "v_proj", "o_proj"], "lm_head"),
        ("gpt2", ["c_attn", "c_proj"], "lm_head"),
        ("gpt_neox", ["query_key_value", "dense"], "embed_out"),
        ("opt", ["q_proj", "k_proj", "v_proj", "out_proj"], "lm_head"),
        ("bert", ["query", "key", "value", "dense"], "classifier"),
        ("distilbert", ["q_lin", "k_lin", "v_lin", "out_lin"], None),
        ("t5", ["q", "k", "v", "o"], "lm_head"),
    ],
)
def test_language_models(tiny, family, attention, head):
    found = roles(tiny(family))
    assert {word for role, words in found.items() if role.startswith("attention") for word in words} == {*attention}
    assert found["feed-forward"]
    assert found["embedding"]
    assert found["norm"]
    heads = {word for word in found["head"] if not re.fullmatch("dense", word)}
    assert head is None or heads & {head, "lm_head"}


def test_a_parameter_has_its_layers_role_and_a_strange_name_none():
    assert role_of("model.layers.0.self_attn.q_proj.bias") == "attention q"
    assert role_of("model.norm.weight") == "norm"
    assert role_of("decoder.block.0.layer.1.EncDecAttention.v") == "cross-attention v"
    assert role_of("something.else") == "other"
