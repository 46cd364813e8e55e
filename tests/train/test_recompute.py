"""Gradient checkpointing changes no loss and no gradient, and keeps less."""

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from veneer import AdapterError, LoraConfig, get_peft_model
from veneer.train.recompute import recompute_layers

TOKENS = torch.arange(24).view(2, 12)


def step(model):
    """Loss, gradients, and the bytes that the forward kept."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.train().zero_grad()
    torch.manual_seed(7)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}, sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_layers_that_run_again_give_the_same_loss_and_gradients(tiny, family, dropout, dtype):
    base = tiny(family, **({"num_hidden_layers": 6} if family == "llama" else {"n_layer": 6})).to(dtype)
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout, init_lora_weights=False)
    model = get_peft_model(base, config)
    loss, gradients, kept = step(model)
    recompute_layers(model)
    again, their, less = step(model)
    assert torch.equal(again, loss)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, their[name]), name
    assert less < kept / 2


def test_a_unet_of_diffusers_runs_its_blocks_again(unet):
    model = get_peft_model(unet, LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)).train()
    given = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 2, 8)

    def gradients():
        model.zero_grad()
        model(*given).sample.square().sum().backward()
        return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]

    plain = gradients()
    recompute_layers(model)
    assert model.is_gradient_checkpointing
    assert all(map(torch.equal, gradients(), plain))


class Own(PreTrainedModel):
    """A model that says of no part that it is a layer."""

    def __init__(self) -> None:
        super().__init__(PreTrainedConfig())
        self.one = nn.Linear(4, 4)


@pytest.mark.parametrize("base", [Own, lambda: nn.ModuleDict({"one": nn.Linear(4, 4)})], ids=["transformers", "plain"])
def test_a_model_that_cannot_is_refused(base):
    model = get_peft_model(base(), LoraConfig(target_modules=["one"]))
    with pytest.raises(AdapterError, match=r"train\.gradient_checkpointing: (Own|ModuleDict)"):
        recompute_layers(model)
