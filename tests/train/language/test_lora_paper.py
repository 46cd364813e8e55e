"""The recipes of the LoRA paper (arXiv:2106.09685) train as many parameters as its tables say."""

import pytest
import torch
import transformers
from torch import nn

from veneer import LoraConfig, get_peft_model, recipes
from veneer.train.run import read_recipe

ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
DEBERTA = {"vocab_size": 128100, "max_position_embeddings": 512, "type_vocab_size": 0, "relative_attention": True}
DEBERTA |= {"share_att_key": True, "position_buckets": 256, "position_biased_input": False, "conv_kernel_size": 3}
DEBERTA |= {"norm_rel_ebd": "layer_norm", "conv_act": "gelu", "pos_att_type": ["p2c", "c2p"]}
DEBERTA |= {"hidden_size": 1536, "num_hidden_layers": 48, "num_attention_heads": 24}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
Q_AND_V = {"roberta": ["query", "value"], "deberta-v2": ["query_proj", "value_proj"]}


def counted(family: str, config: LoraConfig, **sizes: object) -> tuple[int, int]:
    """(parameters of the adapter without a head, parameters of the base)."""
    with torch.device("meta"):
        model: nn.Module = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(family, **sizes))
    base = sum(parameter.numel() for parameter in model.parameters())
    return get_peft_model(model, config).get_nb_trainable_parameters()[0], base


def of_recipe(name: str) -> LoraConfig:
    return read_recipe(f"lora-paper/{name}")[0].adapter


@pytest.mark.parametrize("task", ["mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb"])
def test_glue(task: str):
    """Table 2: 0.3 M and 4.7 M."""
    trained, base = counted("roberta", of_recipe(f"roberta-base-{task}"), **ROBERTA)
    assert trained == 12 * 2 * 8 * (768 + 768) == 294_912
    assert base == pytest.approx(125e6, rel=0.01)
    assert of_recipe(f"deberta-v2-xxlarge-{task}") == of_recipe("deberta-v2-xxlarge-mnli")


def test_the_large_encoders():
    """Table 2: RoBERTa-large 0.8 M, DeBERTa-XXL 4.7 M of 1.5 billion."""
    trained, base = counted("roberta", LoraConfig(r=8, target_modules=Q_AND_V["roberta"]), **ROBERTA, **LARGE)
    assert (trained, round(trained / 1e6, 1)) == (24 * 2 * 8 * 2048, 0.8)
    assert base == pytest.approx(355e6, rel=0.01)
    trained, base = counted("deberta-v2", of_recipe("deberta-v2-xxlarge-rte"), **DEBERTA, intermediate_size=6144)
    assert (trained, round(trained / 1e6, 1)) == (48 * 2 * 16 * 3072, 4.7)
    assert base == pytest.approx(1.5e9, rel=0.05)


@pytest.mark.parametrize(
    ("layers", "size", "base_said"), [(24, 1024, 354.92e6), (36, 1280, 774.03e6)], ids=["medium", "large"]
)
def test_gpt2(layers: int, size: int, base_said: float):
    """Table 3 says 0.35 M and 0.77 M, which is a thousandth of the bases' 354.92 M and 774.03 M; r=4 on q and v is
    0.39 M and 0.74 M, and the authors' own medium adapter is a file of 393,216 fp32 numbers (1.5 MB).
    """
    for task in ("e2e", "webnlg", "dart"):
        config = of_recipe(f"gpt2-medium-{task}")
        assert config == of_recipe("gpt2-medium-e2e") or task == "dart"
    trained, base = counted("gpt2", config, n_embd=size, n_layer=layers, n_head=16)
    assert trained == layers * 2 * 4 * 2 * size == {1024: 393_216, 1280: 737_280}[size]
    assert base == pytest.approx(base_said, rel=1e-3)
    assert trained == pytest.approx(1e-3 * base_said, rel=0.12)


def test_gpt3():
    """Table 4: 4.7 M at r=1 and 37.7 M at r=8 on q and v; table 5: 18 M at r=4. One layer stands for all 96."""
    for r, said in ((1, 4.7e6), (4, 18.9e6), (8, 37.7e6)):
        config = LoraConfig(r=r, target_modules=["c_attn"], options={"fused": {"c_attn": [r, 0, r]}})
        trained, _ = counted("gpt2", config, n_embd=12288, n_layer=1, n_head=96, n_positions=2048)
        assert 96 * trained == 96 * 2 * r * 2 * 12288
        assert 96 * trained == pytest.approx(said, rel=5e-3)


@pytest.mark.slow
def test_gpt3_whole():
    """175 billion parameters, 37.7 M of them trained."""
    config = LoraConfig(r=8, target_modules=["c_attn"], options={"fused": {"c_attn": [8, 0, 8]}})
    trained, base = counted("gpt2", config, n_embd=12288, n_layer=96, n_head=96, n_positions=2048)
    assert trained == 37_748_736
    assert base == pytest.approx(175e9, rel=5e-3)


def test_settings_are_those_of_the_tables():
    """A few numbers of tables 9, 10 and 11, and every recipe is whole."""
    names = [name for name in recipes.names() if name.startswith("lora-paper/")]
    assert len(names) == 19
    for name in names:
        recipe, task = read_recipe(name)
        assert (recipe.task, isinstance(recipe, task.settings)) == (recipes.load(name)["task"], True)
    sst2 = read_recipe("lora-paper/roberta-base-sst2")[0].train
    assert (sst2.batch_size, sst2.epochs, sst2.lr, sst2.warmup, sst2.schedule) == (16, 60, 5e-4, 0.06, "linear")
    cola, _ = read_recipe("lora-paper/deberta-v2-xxlarge-cola")
    assert (cola.train.batch_size, cola.train.epochs, cola.data.max_length, cola.eval.judge) == (4, 10, 64, "matthews")
    dart, e2e = (read_recipe(f"lora-paper/gpt2-medium-{task}")[0] for task in ("dart", "e2e"))
    assert (dart.train.label_smoothing, dart.train.weight_decay, dart.adapter.lora_dropout) == (0, 0, 0)
    assert (e2e.train.label_smoothing, e2e.train.weight_decay, e2e.adapter.lora_dropout) == (0.1, 0.01, 0.1)
    assert (e2e.train.batch_size, e2e.train.epochs, e2e.train.warmup, e2e.adapter.lora_alpha) == (8, 5, 500, 32)
