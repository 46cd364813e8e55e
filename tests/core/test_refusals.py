"""What would be silently wrong on a live model is refused, and what looked wrong is right."""

import copy
import threading

import pytest
import torch
from torch import nn

from veneer import AdapterError, LoraConfig, get_peft_model

CONFIG = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
TOKENS = torch.arange(10).view(2, 5)
AGAIN = "call backward\\(\\) before switching"


@pytest.fixture
def model(tiny):
    model = get_peft_model(tiny("llama"), CONFIG, "a")
    model.add_adapter("b", CONFIG)
    return model


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")  # under no_grad
@pytest.mark.parametrize("reentrant", [False, True])
class TestGradientCheckpointing:
    @pytest.fixture(autouse=True)
    def checkpointing(self, model, reentrant):
        model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})

    def test_backward_after_a_block_with_other_adapters_is_refused(self, model):
        with model.using("b"):
            loss = model(TOKENS, labels=TOKENS).loss
        with pytest.raises(AdapterError, match=AGAIN):
            loss.backward()

    def test_two_forwards_of_different_adapters_before_backward_are_refused(self, model):
        model(TOKENS, labels=TOKENS)
        model.set_adapter("b")
        with pytest.raises(AdapterError, match=AGAIN):
            model(TOKENS, labels=TOKENS)

    def test_a_call_that_failed_leaves_no_backward_to_wait_for(self, model):
        with pytest.raises(AdapterError, match="mixed rows cannot be trained with gradient checkpointing"):
            model(TOKENS, adapter_names=["a", "b"])
        with pytest.raises(IndexError):
            model(TOKENS + 10**6, labels=TOKENS)
        model.set_adapter("b")
        model(TOKENS, labels=TOKENS)
        twin = copy.deepcopy(model)
        twin.set_adapter("a")
        twin(TOKENS, labels=TOKENS).loss.backward()

    def test_backward_before_switching_trains_each(self, model):
        for name in "ab":
            model.set_adapter(name)
            with torch.no_grad(), model.disable_adapter():
                model(TOKENS)  # a reference
            (model(TOKENS, labels=TOKENS).loss + model(TOKENS, labels=TOKENS).loss).backward()
        trained = [p.grad is not None for n, p in model.named_parameters() if ".adapters." in n]
        assert all(trained)


def test_a_part_that_carries_adapters_is_not_adapted_again_from_above(tiny, bits):
    whole = tiny("llama")
    get_peft_model(whole.model, CONFIG)
    before = bits(whole)
    with pytest.raises(AdapterError, match=r"layers.0.* carries adapters already, of a part of this model"):
        get_peft_model(whole, CONFIG, "b")
    assert bits(whole) == before
    assert not hasattr(whole, "peft_config")


@pytest.mark.parametrize("name", ["__base__", "/tmp/x", "a\n", "a/b", "a.b", "..", ""])
def test_names_that_mean_something_else_are_refused(model, name):
    with pytest.raises(AdapterError, match="cannot be an adapter's name"):
        model.add_adapter(name, CONFIG)
    assert list(model.peft_config) == ["a", "b"]


def test_layers_that_were_replaced_are_told_when_saving(tiny, tmp_path):
    model = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["lm_head", "q_proj"]))
    model.lm_head = nn.Linear(model.lm_head.in_features, 7)
    with pytest.raises(AdapterError, match="on 1 layers that are no longer in the model"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_token_rows_of_other_tokens_are_not_swapped_in(tiny, tmp_path):
    config = {"r": 2, "target_modules": ["q_proj"]}
    get_peft_model(tiny("llama"), LoraConfig(**config, trainable_token_indices=[3, 4])).save_pretrained(tmp_path)
    model = get_peft_model(tiny("llama"), LoraConfig(**config, trainable_token_indices=[1, 2]))
    with pytest.raises(AdapterError, match="other tokens than the live adapter's"):
        model.hotswap_adapter(tmp_path, "default")


def test_a_tied_lora_is_swapped_at_another_scale(tiny, tmp_path):
    config = {"r": 2, "target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}
    other = tiny("llama")
    other.config.tie_word_embeddings = True
    other.lm_head.weight = other.model.embed_tokens.weight
    other = get_peft_model(other, LoraConfig(**config, lora_alpha=32, init_lora_weights=False))
    other.save_pretrained(tmp_path)
    wanted = other(TOKENS).logits
    model = get_peft_model(other.unload(), LoraConfig(**config, lora_alpha=8))
    model.hotswap_adapter(tmp_path, "default")
    torch.testing.assert_close(model(TOKENS).logits, wanted, rtol=1e-4, atol=1e-4)


def test_one_mixed_call_at_a_time(model):
    found, inside, done = [], threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        done.wait(10)

    handle = model.model.layers[0].register_forward_pre_hook(wait)
    thread = threading.Thread(target=lambda: found.append(model(TOKENS, adapter_names=["a", "b"]).logits))
    thread.start()
    assert inside.wait(10)
    with pytest.raises(AdapterError, match="one at a time"):
        model(TOKENS, adapter_names=["b", "b"])
    done.set()
    thread.join()
    handle.remove()
    torch.testing.assert_close(found[0], model(TOKENS, adapter_names=["a", "b"]).logits)


class Routed(nn.Module):
    """A mixture of two experts, each of which sees the tokens that are sent to it."""

    def __init__(self):
        super().__init__()
        self.router, self.experts = nn.Linear(4, 2), nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x):
        chosen = self.router(x).argmax(-1)
        return torch.stack([self.experts[int(i)](row) for i, row in zip(chosen, x, strict=True)])


def test_routed_experts_are_not_mixed_by_rows():
    model = get_peft_model(Routed(), LoraConfig(r=2, target_modules=["0"]), "a")
    model.add_adapter("b", LoraConfig(r=2, target_modules=["router"]))
    x = torch.randn(4, 4)
    model(x, adapter_names=["b", "__base__", "b", "b"])
    with pytest.raises(AdapterError, match=r"experts.0 does not see the rows of the batch"):
        model(x, adapter_names=["a", "b", "b", "b"])
    model.delete_adapter("a")
    model.add_adapter("a", LoraConfig(r=2, target_modules=["router"]))
    model(x, adapter_names=["a", "b", "b", "b"])


def test_disabled_adapters_come_back_after_a_merge(model):
    model.set_adapter(["a", "b"])
    model.disable_adapters()
    model.merge_adapter(["a"])
    model.unmerge_adapter()
    assert model.active_adapters == []
    model.enable_adapters()
    assert model.active_adapters == ["a", "b"]


def test_nothing_is_loaded_while_merged(model):
    own = {key: value.clone() for key, value in model.state_dict().items() if ".adapters." in key}
    model.merge_adapter("a")
    with pytest.raises(AdapterError, match="merged"):
        model.load_state_dict(own, strict=False)


class Idle(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.used(x)


def test_each_adapter_is_looked_at_when_it_first_acts():
    model = get_peft_model(Idle(), LoraConfig(r=2, target_modules=["used"]), "a").train()
    x = torch.ones(1, 4)
    with model.disable_adapter():
        model(x)
    model(x)
    model.add_adapter("b", LoraConfig(r=2, target_modules=["unused"]))
    model(x)
    model.set_adapter("b")
    with pytest.warns(UserWarning, match="did not call, so they learn nothing: unused"):
        model(x)
    model(x)
