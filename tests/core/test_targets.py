"""Which layers a config means; and that nothing is silently missed."""

import re

import pytest
import torch
from torch import nn

from veneer import AdapterError, LoraConfig, get_peft_model
from veneer.core.targets import DEFAULT_TARGETS, base_modules, select


def block() -> nn.Module:
    return nn.ModuleDict({"q": nn.Linear(4, 4), "v": nn.Linear(4, 4), "act": nn.PReLU()})


@pytest.fixture
def model() -> nn.Module:
    """Three blocks, and layers whose names end alike: `q`, `seq` and `extra.q`."""
    return nn.ModuleDict(
        {
            "blocks": nn.ModuleList(block() for _ in range(3)),
            "extra": nn.ModuleDict({"q": nn.Linear(4, 4)}),
            "seq": nn.Linear(4, 4),
            "attention": nn.MultiheadAttention(4, 2),
        }
    )


def paths(model: nn.Module, **settings: object) -> list[str]:
    return list(select(model, LoraConfig(**settings))[0])


QS, VS = [f"blocks.{i}.q" for i in range(3)], [f"blocks.{i}.v" for i in range(3)]
EVERY = [path for pair in zip(QS, VS, strict=True) for path in pair] + ["extra.q", "seq"]
CHOICES = [
    ({"target_modules": ["blocks.1.q"]}, ["blocks.1.q"]),
    ({"target_modules": ["q"]}, [*QS, "extra.q"]),
    ({"target_modules": ["1.q", "seq"]}, ["blocks.1.q", "seq"]),
    ({"target_modules": {"q", "v"}}, EVERY[:-1]),
    ({"target_modules": r"blocks\.[02]\.q"}, ["blocks.0.q", "blocks.2.q"]),
    ({"target_modules": r"extra.*"}, ["extra.q"]),  # the container is passed over
    ({"target_modules": "all-linear"}, EVERY),  # not the attention's inner layer, which is never called
    ({"target_modules": ["q"], "exclude_modules": ["extra.q"]}, QS),
    ({"target_modules": "all-linear", "exclude_modules": r"blocks\..*"}, ["extra.q", "seq"]),
    ({"target_modules": ["q"], "layers_to_transform": 1}, ["blocks.1.q"]),
    ({"target_modules": ["q", "v"], "layers_to_transform": [0, 2]}, EVERY[:2] + EVERY[4:6]),
    ({"target_modules": ["q"], "layers_to_transform": [2], "layers_pattern": "blocks"}, ["blocks.2.q"]),
]


@pytest.mark.parametrize(("settings", "wanted"), CHOICES)
def test_the_layers_that_a_config_means(model, settings, wanted):
    assert paths(model, **settings) == wanted


REFUSED = [
    ({}, "no usual choice is known for 'ModuleDict'; say \"all-linear\" or name some of 'q', 'v', 'seq'"),
    ({"target_modules": ["q", "sek"]}, "'sek' matches no module; did you mean 'seq'.*end with 'q', 'v', 'seq'"),
    ({"target_modules": ["xx", "yy"]}, "'xx' matches no module.*'yy' matches no module"),
    ({"target_modules": "q"}, r"for the whole path and matches none; for every layer .* give a list: \['q'\]"),
    ({"target_modules": "all-linaer"}, "matches none; did you mean 'all-linear'"),
    ({"target_modules": "("}, "is not a regular expression"),
    (
        {"target_modules": ["blocks"]},
        r"blocks is a ModuleList which cannot be adapted; it holds '0.q', '0.v'.*name those",
    ),
    ({"target_modules": ["act"]}, "blocks.0.act is a PReLU which cannot be adapted\nblocks.1.act"),
    ({"target_modules": r"blocks\..*"}, "blocks.0.act is a PReLU"),
    ({"target_modules": ["out_proj"]}, "attention.out_proj is a NonDynamicallyQuantizableLinear which cannot"),
    ({"target_modules": ["q"], "exclude_modules": ["seqq"]}, "exclude_modules: 'seqq' matches no module.*'seq'"),
    ({"target_modules": ["q"], "exclude_modules": r".*\.k"}, "exclude_modules: .* matches none"),
    ({"target_modules": ["q"], "exclude_modules": ["q"]}, r"target_modules: \['q'\] leaves no layer of ModuleDict"),
    ({"target_modules": ["q"], "layers_to_transform": [1, 7]}, r"no targeted layer is in \[7\]; there are 0 to 2"),
    ({"target_modules": ["seq"], "layers_to_transform": [0]}, "there are no numbered layers"),
    ({"target_modules": ["q"], "layers_to_transform": 0, "layers_pattern": "block"}, "no numbered layers under"),
    ({"target_modules": ["q"], "rank_pattern": {"qq": 2, "v": 3}}, "'qq' matches no adapted .*'q'.*'v' matches no"),
    ({"target_modules": ["q"], "alpha_pattern": {"blocks": 2}}, "'blocks' matches no adapted layer"),
]


@pytest.mark.parametrize(("settings", "said"), REFUSED, ids=str)
def test_what_matches_nothing_or_cannot_be_adapted_is_named(model, settings, said):
    with pytest.raises(AdapterError) as error:
        get_peft_model(model, LoraConfig(**settings))
    assert re.search(said, str(error.value), re.DOTALL)
    assert type(model) is nn.ModuleDict
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda layer: setattr(layer, "forward", lambda x: x), "put on the object by a hook"),
        (lambda layer: setattr(layer, "adapters", nn.Identity()), "already has something named 'adapters'"),
        (lambda layer: setattr(layer, "adapters", 3), "already has something named 'adapters'"),
    ],
    ids=["hooked forward", "a child named adapters", "a value named adapters"],
)
def test_a_layer_that_is_not_free_is_named(model, spoil, said):
    spoil(model.blocks[1].q)
    with pytest.raises(AdapterError, match=f"blocks.1.q .*{said}"):
        get_peft_model(model, LoraConfig(target_modules=["q"]))
    assert type(model.blocks[0].q) is nn.Linear


def test_patterns_give_layers_their_own_numbers(model):
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q", "v"], rank_pattern={r"blocks\.1\.q": 2, "q": 3}, alpha_pattern={"v": 5}
    )
    numbers = {path: (t.config.r, t.config.lora_alpha) for path, t in select(model, config)[0].items()}
    assert numbers["blocks.1.q"] == (2, 8)  # the first pattern that matches
    assert numbers["blocks.0.q"] == numbers["extra.q"] == (3, 8)
    assert numbers["blocks.1.v"] == (4, 5)


def test_all_linear_is_spelled_out_the_short_way_where_that_means_the_same(model):
    config = LoraConfig(target_modules="all-linear")
    assert select(model, config)[1].target_modules == ["q", "v", "seq"]
    some = LoraConfig(target_modules="all-linear", exclude_modules=["extra.q"])
    resolved = select(model, some)[1]
    assert resolved.target_modules == [path for path in EVERY if path != "extra.q"]
    assert list(select(model, resolved)[0]) == resolved.target_modules


def test_a_second_adapter_sees_the_base_alone(model):
    modules = set(base_modules(model))
    model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    assert set(base_modules(model)) == modules
    assert paths(model, target_modules="all-linear") == EVERY


USUAL = {
    "llama": r"model\.layers\.\d\.self_attn\.(q_proj|v_proj)",
    "qwen3": r"model\.layers\.\d\.self_attn\.(q_proj|v_proj)",
    "gpt2": r"transformer\.h\.\d\.attn\.c_attn",
    "gpt_neox": r"gpt_neox\.layers\.\d\.attention\.query_key_value",
    "opt": r"model\.decoder\.layers\.\d\.self_attn\.(q_proj|v_proj)",
    "bloom": r"transformer\.h\.\d\.self_attention\.query_key_value",
    "bert": r"bert\.encoder\.layer\.\d\.attention\.self\.(query|value)",
    "roberta": r"roberta\.encoder\.layer\.\d\.attention\.self\.(query|value)",
    "deberta-v2": r"deberta\.encoder\.layer\.\d\.attention\.self\.(query_proj|value_proj)",
    "distilbert": r"distilbert\.transformer\.layer\.\d\.attention\.(q_lin|v_lin)",
    "t5": r"(en|de)coder\.block\.\d\.layer\.[01]\.(Self|EncDec)Attention\.(q|v)",
    "vit": r"vit\..*\.(q_proj|v_proj)",
}
HEADS = "lm_head embed_out classifier pooler vocab_transform vocab_projector score"


@pytest.mark.parametrize("family", USUAL)
def test_the_usual_layers_of_a_family(tiny, family):
    model = tiny(family)
    chosen = paths(model)
    assert chosen == [path for path in base_modules(model) if re.fullmatch(USUAL[family], path)]
    assert chosen


@pytest.mark.parametrize("family", USUAL)
def test_all_linear_is_every_linear_layer_of_the_backbone(tiny, family):
    model = tiny(family)
    chosen, layers = set(paths(model, target_modules="all-linear")), base_modules(model)
    linear = {
        path for path, layer in layers.items() if isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"
    }
    left_out = linear - chosen
    assert chosen <= linear
    assert chosen > set(paths(model))
    assert {path.split(".")[0] for path in left_out} <= set(HEADS.split())
    assert left_out


def test_a_pooler_of_the_backbone_is_adapted_and_a_bare_backbone_is_whole(tiny):
    model = tiny("bert", "")
    linear = [path for path, layer in base_modules(model).items() if isinstance(layer, nn.Linear)]
    assert paths(model, target_modules="all-linear") == linear


@pytest.mark.parametrize("family", DEFAULT_TARGETS)
def test_each_usual_name_is_there(family):
    import transformers

    config = transformers.CONFIG_MAPPING[family]()
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    for name in {"num_hidden_layers", "encoder_layers", "decoder_layers", "n_layer", "n_layers"} & set(vars(config)):
        setattr(config, name, 1)
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    assert paths(model)
