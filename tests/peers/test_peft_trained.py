"""PEFT: what an adapter trains beside its method is the same there and here, both ways through files."""

import copy

import pytest
import torch
from torch import nn

import veneer
from veneer.core.inject import adapted_layers
from veneer.core.methods.beside import Tied

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*tie_word_embeddings", "ignore:.*save_embedding_layers", "ignore:fan_in_fan_out"
)

TOKENS = torch.arange(3, 15).view(2, 6)
CHOICES = {
    "a head": ("roberta", {"target_modules": ["query"], "modules_to_save": ["classifier"]}),
    "a head and its layers": ("roberta", {"target_modules": ["dense"], "modules_to_save": ["classifier"]}),
    "a task": ("roberta", {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "a task of two heads": ("distilbert", {"target_modules": ["q_lin"], "task_type": "SEQ_CLS"}),
    "tables": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [5, 3, 9]}),
    "tokens of a table": ("gpt2", {"target_modules": ["c_attn"], "trainable_token_indices": {"wte": [5, 3, 9]}}),
    "tokens of a tied table": ("llama tied", {"target_modules": ["q_proj"], "trainable_token_indices": [5, 3, 9]}),
    "a table and a head that are one": (
        "llama tied",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "LoRA of a table and a head that are one": (
        "llama tied",
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    ),
    "LoRA of a head and a table that are one": (
        "llama tied",
        {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True},
    ),
    "LoRA of a table": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "all biases": ("bert", {"target_modules": ["query", "intermediate.dense"], "bias": "all"}),
    "all biases and a head": (
        "bert",
        {"target_modules": ["query"], "bias": "all", "modules_to_save": ["classifier"], "use_dora": True},
    ),
    "biases of adapted layers": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "bias": "lora_only"}),
    "a norm, with LoHa": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["model.norm"], "peft_type": "LOHA"},
    ),
}


@pytest.fixture(params=CHOICES)
def choice(request, tiny):
    family, settings = CHOICES[request.param]
    family, _, tied = family.partition(" ")
    head = ["SequenceClassification"] if family == "distilbert" else []
    return tiny(family, *head, **({"tie_word_embeddings": True} if tied else {})), settings


def _moved(model: nn.Module) -> nn.Module:
    """Trained: no longer what it was."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model


def _theirs(settings: dict[str, object]):
    own = dict(settings)
    kind = {"LORA": peft.LoraConfig, "LOHA": peft.LoHaConfig}[own.pop("peft_type", "LORA")]
    return kind(**own)


def _run(model: nn.Module) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    logits = model(TOKENS).logits
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    return logits, sorted(gradients, key=lambda own: (len(own), own.norm().item()))


def _agree(ours: nn.Module, theirs: nn.Module) -> None:
    (logits, gradients), (their_logits, their_gradients) = _run(ours), _run(theirs.eval())
    torch.testing.assert_close(logits, their_logits, rtol=1e-5, atol=1e-5)
    if any(isinstance(update, Tied) for update in ours.modules()) and len(their_gradients) > len(gradients):
        return  # PEFT has factors of one memory and two gradients
    assert len(gradients) == len(their_gradients)
    for gradient, wanted in zip(gradients, their_gradients, strict=True):
        assert (gradient - wanted).norm() <= 1e-5 * max(wanted.norm(), 1)


def test_what_veneer_saves_peft_reads(choice, tmp_path):
    base, settings = choice
    ours = _moved(veneer.get_peft_model(copy.deepcopy(base), veneer.LoraConfig(**settings)))
    ours.save_pretrained(tmp_path)
    _agree(ours, peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True))


def test_what_peft_saves_veneer_reads(choice, tmp_path):
    base, settings = choice
    ours = copy.deepcopy(base)
    theirs = _moved(peft.get_peft_model(base, _theirs(settings)))
    theirs.save_pretrained(tmp_path)
    read = veneer.PeftModel.from_pretrained(ours, tmp_path, is_trainable=True)
    _agree(read, theirs)
    logits = read(TOKENS).logits
    merged = read.merge_and_unload()
    assert not list(adapted_layers(merged))
    torch.testing.assert_close(merged(TOKENS).logits, logits, rtol=1e-5, atol=1e-5)


def test_a_table_that_peft_repeats_is_that_of_the_base_or_refused(tiny, tmp_path):
    base = tiny("llama")
    other = copy.deepcopy(base)
    other.model.embed_tokens.weight.data[3] += 1
    theirs = peft.get_peft_model(base, peft.LoraConfig(target_modules=["embed_tokens"]))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(veneer.AdapterError, match=r"unexpected: model\.embed_tokens\.base_layer\.weight \(of another"):
        veneer.PeftModel.from_pretrained(other, tmp_path)


def test_mixed_batches_are_those_of_peft(tiny):
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    base = tiny("llama")
    ours = veneer.get_peft_model(copy.deepcopy(base), veneer.LoraConfig(**settings), "one")
    theirs = peft.get_peft_model(base, peft.LoraConfig(**settings), "one")
    ours.add_adapter("two", veneer.LoraConfig(**settings))
    theirs.add_adapter("two", peft.LoraConfig(**settings))
    for name in ("one", "two"):
        value = torch.randn(64, 32)
        ours.lm_head.adapters[name]["weight"].value.data = value
        theirs.base_model.model.lm_head.modules_to_save[name].weight.data = value
    names = ["two", "__base__", "one"]
    tokens = torch.arange(3, 15).view(3, 4)
    found = ours(tokens, adapter_names=names).logits
    torch.testing.assert_close(found, theirs.eval()(input_ids=tokens, adapter_names=names).logits, rtol=1e-5, atol=1e-5)
