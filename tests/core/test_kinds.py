"""What layer kinds refuse by name, and what a law cannot say of all of them."""

import pytest
import torch
from torch import nn

from veneer import AdapterError, LoraConfig, get_peft_model


def _refused(layer: nn.Module, **settings: object) -> str:
    model = nn.ModuleDict({"part": layer})
    with pytest.raises(AdapterError) as error:
        get_peft_model(model, LoraConfig(target_modules=["part"], **settings))
    assert type(model) is nn.ModuleDict
    return str(error.value)


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}], ids=str)
def test_a_table_that_no_change_can_be_added_to_is_refused(option):
    said = _refused(nn.Embedding(4, 3, **option))
    assert "part is a Embedding with" in said
    assert next(iter(option)) in said


def test_a_sparse_table_learns_like_a_dense_one():
    gradients = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(nn.Sequential(nn.Embedding(5, 3, sparse=sparse)), LoraConfig(target_modules=["0"]))
        model(torch.tensor([1, 3, 3])).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    torch.testing.assert_close(*gradients)


def test_a_tied_table_is_changed_where_it_is_looked_up_and_nowhere_else(tiny):
    model, tokens = tiny("llama", tie_word_embeddings=True), torch.arange(3, 9).view(1, 6)
    h = torch.randn(1, 32)
    before, head = model.get_input_embeddings()(tokens), model.lm_head(h)
    with pytest.warns(
        UserWarning, match="lm_head.weight are one weight, and only model.embed_tokens.weight is changed"
    ):
        model = get_peft_model(model, LoraConfig(target_modules=["embed_tokens"], init_lora_weights=False))
    assert not torch.equal(model.get_input_embeddings()(tokens), before)
    assert torch.equal(model.lm_head(h), head)
    with pytest.raises(AdapterError, match=r"other layers share: .*embed_tokens\.weight and lm_head\.weight"):
        model.merge_adapter()


@pytest.mark.parametrize("layer", [nn.LayerNorm(3, elementwise_affine=False), nn.ConvTranspose2d(2, 2, 2)], ids=str)
def test_a_layer_that_is_no_matrix_is_refused(layer):
    assert "cannot be adapted" in _refused(layer)


def test_dropout_is_refused_where_a_change_has_no_input():
    assert "LayerNorm whose change has no input that lora_dropout=0.1" in _refused(nn.LayerNorm(3), lora_dropout=0.1)


def test_the_norms_of_transformers_families_are_adapted(tiny):
    for family, name in (
        ("llama", "input_layernorm"),
        ("t5", "layer_norm"),
        ("qwen3", "q_norm"),
        ("bert", "LayerNorm"),
    ):
        model = tiny(family)
        model = get_peft_model(model, LoraConfig(r=1, target_modules=[name], init_lora_weights=False))
        tokens = {"input_ids": torch.arange(3, 9).view(1, 6)}
        tokens |= {"decoder_input_ids": tokens["input_ids"]} if family == "t5" else {}
        live = model(**tokens).logits
        live.square().mean().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        with model.disable_adapter():
            assert not torch.allclose(model(**tokens).logits, live)
        torch.testing.assert_close(model.merge_and_unload()(**tokens).logits, live)


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


@pytest.mark.parametrize("learning", [True, False])
@pytest.mark.parametrize("targets", [["self_attn"], ["linear1", "self_attn"], ["norm1"]], ids=str)
def test_an_encoder_does_not_pass_the_change_by(targets, learning):
    model = get_peft_model(_encoder(), LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    x, padding = torch.randn(2, 4, 8), torch.tensor([[False] * 4, [False, False, True, True]])
    with torch.set_grad_enabled(learning):
        for settings in ({}, {"src_key_padding_mask": padding}, {"mask": torch.ones(4, 4).triu(1).bool()}):
            live = model(x, **settings)
            with model.disable_adapter():
                assert not torch.allclose(model(x, **settings), live, atol=1e-3)
            model.merge_adapter()
            kept = ~padding if "src_key_padding_mask" in settings else slice(None)
            torch.testing.assert_close(model(x, **settings)[kept], live[kept])
            model.unmerge_adapter()


@pytest.mark.parametrize("target", ["linear1", "norm2", "self_attn", "norm"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_rows_of_torchs_transformers_are_mixed_where_the_batch_comes_first(target, batch_first):
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=batch_first)
    base = nn.TransformerEncoder(layer, 1, nn.LayerNorm(8), enable_nested_tensor=False)
    config = LoraConfig(r=1, target_modules=[target], init_lora_weights=False)
    model, x = get_peft_model(base, config, "a").eval(), torch.randn(2, 2, 8)
    model.add_adapter("b", config)
    if target == "self_attn" or not batch_first:
        with pytest.raises(AdapterError, match="cannot be mixed"):
            model(x, adapter_names=["a", "b"])
        return
    mixed = model(x, adapter_names=["a", "b"])
    for row, name in enumerate("ab"):
        model.set_adapter(name)
        torch.testing.assert_close(model(x)[row], mixed[row])


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("sizes", [{}, {"kdim": 6, "vdim": 2}], ids=str)
def test_attention_takes_what_it_took(sizes, batch_first):
    layer = nn.MultiheadAttention(8, 2, batch_first=batch_first, **sizes).eval()
    model = get_peft_model(
        nn.ModuleDict({"part": layer}), LoraConfig(r=2, target_modules=["part"], init_lora_weights=False)
    )
    q, k, v = torch.randn(4, 4, 8), torch.randn(4, 4, sizes.get("kdim", 8)), torch.randn(4, 4, sizes.get("vdim", 8))
    mask = torch.ones(4, 4).triu(1).bool()
    for settings in ({}, {"attn_mask": mask}, {"key_padding_mask": mask}, {"average_attn_weights": False}):
        for learning in (True, False):
            with torch.set_grad_enabled(learning):
                live = model.part(q, k, v, **settings)
                model.merge_adapter()
                torch.testing.assert_close(model.part(q, k, v, **settings), live)
                model.unmerge_adapter()


PARAMETERS = [
    (["gate"], r"'gate' matches no parameter .*did you mean"),
    (["0.weight"], "0 is a Linear that is changed in two ways: target it in one way only"),
]


@pytest.mark.parametrize(("names", "said"), PARAMETERS, ids=str)
def test_parameters_that_cannot_be_meant_are_refused(names, said):
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    names = ["0.weigth"] if names == ["gate"] else names
    said = said.replace("gate", "0.weigth")
    with pytest.raises(AdapterError, match=said):
        get_peft_model(model, LoraConfig(target_modules=["0"], target_parameters=names))
    assert type(model) is nn.Sequential


def test_a_layer_is_adapted_in_one_way_by_all_adapters():
    model = get_peft_model(nn.Sequential(nn.Linear(3, 3)), LoraConfig(target_parameters=["0.weight"]))
    with pytest.raises(AdapterError, match="0 is a Linear which cannot be adapted"):
        model.add_adapter("b", LoraConfig(target_modules=["0"]))
    model.add_adapter("c", LoraConfig(target_parameters=["0.bias"], init_lora_weights=False))
    y = model(x := torch.randn(2, 3))
    model.set_adapter("c")
    assert not torch.allclose(model(x), y)
