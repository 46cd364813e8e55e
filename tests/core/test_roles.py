"""Layers by role: the same word means the same layers in every family."""

import re

import pytest
from torch import nn

from veneer import AdapterError, LoraConfig, get_peft_model
from veneer.core.targets import base_modules, select

_LLAMA = (r"self_attn\.[qkvo]_proj", r"mlp\.(gate|up|down)_proj", r"layers\.\d\..*norm|norm")
_BERT = (r"attention\.(self\.(query|key|value)|output\.dense)", r"\d\.(intermediate|output)\.dense", r".*LayerNorm")
# family → attention, feed-forward, norm: how the path ends
FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen3": _LLAMA,
    "gpt2": (r"attn\.c_(attn|proj)", r"mlp\.c_(fc|proj)", r"ln_(1|2|f)"),
    "gpt_neox": (
        r"attention\.(query_key_value|dense)",
        r"mlp\.dense_\w+",
        r"(input|post_attention)_layernorm|final_layer_norm",
    ),
    "opt": (r"self_attn\.(q|k|v|out)_proj", r"fc[12]", r".*layer_norm"),
    "bert": _BERT,
    "roberta": _BERT,
    "deberta-v2": (r"attention\.(self\.(query|key|value)_proj|output\.dense)", _BERT[1], _BERT[2]),
    "t5": (r"(Self|EncDec)Attention\.[qkvo]", r"DenseReluDense\.w[io](_\d)?", r".*layer_norm"),
    "vit": (r"attention\.\w+", r"mlp\.\w+", r"layernorm\w*"),
    "clip": (r"self_attn\.(q|k|v|out)_proj", r"mlp\.fc[12]", r".*layer_?norm\d?|.*layrnorm"),
    "unet": (r"attn[12]\.to_(q|k|v|out\.0)", r"ff\.net\.(0\.proj|2)", r"norm\d?|conv_norm_out"),
}
WORDS = ("attention", "feed-forward", "norm")


_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
CLIP = {
    "text_config": {**_SIZES, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    "vision_config": {**_SIZES, "image_size": 8, "patch_size": 4},
}


def clip() -> nn.Module:
    import transformers

    return transformers.CLIPModel(transformers.CLIPConfig(**CLIP))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_role_is_the_same_layers_in_every_family(tiny, unet, family):
    model = {"clip": clip, "unet": lambda: unet}.get(family, lambda: tiny(family, ""))()
    layers = base_modules(model)
    linear = set(select(model, LoraConfig(target_modules="all-linear"))[0])
    found = {word: set(select(model, LoraConfig(target_modules=word))[0]) for word in WORDS}
    for word, end in zip(WORDS, FAMILIES[family], strict=True):
        leaf = re.compile(rf"(.*\.)?({end})")
        wanted = {
            p for p, m in layers.items() if leaf.fullmatch(p) and "weight" in dict(m.named_parameters(recurse=False))
        }
        assert found[word] == wanted, word
        assert wanted
    assert not found["attention"] & found["feed-forward"]
    assert found["attention"] | found["feed-forward"] <= linear
    assert not found["norm"] & linear


def test_a_role_is_spelled_out_for_others_to_read(tiny):
    model = get_peft_model(tiny("llama"), LoraConfig(target_modules="attention"))
    assert model.peft_config["default"].target_modules == ["q_proj", "k_proj", "v_proj", "o_proj"]


def test_attention_in_one_module_has_the_role():
    model = nn.TransformerEncoderLayer(8, 2, 16)
    assert list(select(model, LoraConfig(target_modules="attention"))[0]) == ["self_attn"]
    assert list(select(model, LoraConfig(target_modules="feed-forward"))[0]) == ["linear1", "linear2"]
    assert list(select(model, LoraConfig(target_modules="norm"))[0]) == ["norm1", "norm2"]


def _mixture(family: str) -> nn.Module:
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    more = {"intermediate_size": 24, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "vocab_size": 32}
    experts = "num_local_experts" if family == "Mixtral" else "num_experts"
    config = getattr(transformers, f"{family}Config")(**sizes, **more, **{experts: 2}, num_experts_per_tok=1)
    return getattr(transformers, f"{family}ForCausalLM")(config)


def test_what_routes_to_experts_is_no_feed_forward():
    found = select(_mixture("Qwen2Moe"), LoraConfig(target_modules="feed-forward"))[0]
    ends = {path.rpartition(".mlp.")[2] for path in found}
    assert ends == {f"shared_expert.{name}_proj" for name in ("gate", "up", "down")}


@pytest.mark.parametrize("names", ["feed-forward", ["w1"]], ids=str)
def test_experts_that_are_stacks_are_told_as_target_parameters(names):
    with pytest.raises(AdapterError, match=r"target_parameters there are 'experts.gate_up_proj', 'experts.down_proj'"):
        select(_mixture("Mixtral"), LoraConfig(target_modules=names))


def test_a_head_that_stands_in_the_backbone_itself_is_left_out():
    import transformers

    config = transformers.CLIPConfig(**CLIP)
    linear = set(select(transformers.CLIPForImageClassification(config), LoraConfig(target_modules="all-linear"))[0])
    assert "classifier" not in linear
    assert any(path.endswith("q_proj") for path in linear)
