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
    model = get_peft_model(model, LoraConfig(target_modules=["embed_tokens"], init_lora_weights=False))
    assert not torch.equal(model.get_input_embeddings()(tokens), before)
    assert torch.equal(model.lm_head(h), head)
    with pytest.raises(AdapterError, match=r"other layers share: .*embed_tokens\.weight and lm_head\.weight"):
        model.merge_adapter()
