"""PEFT's starting values from data: EVA finds the same subspaces, LoRA-GA the same singular vectors."""

import copy

import pytest
import torch

import veneer

peft = pytest.importorskip("peft")
SETTINGS = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "o_proj", "down_proj"]}


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 64, (8, 12))
    mask = torch.ones_like(ids)
    mask[:3, 9:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def _pairs(ours: torch.nn.Module, theirs: torch.nn.Module):
    """(our update, the two factors there) of each layer."""
    for path, layer in veneer.core.inject.adapted_layers(ours):
        there = theirs.get_submodule(f"base_model.model.{path}")
        yield layer.adapters["default"], there.lora_A["default"].weight, there.lora_B["default"].weight


@pytest.mark.filterwarnings("ignore:lora with eva initialization used with low_cpu_mem_usage=False")
def test_eva_spans_what_it_spans_there(tiny, batch):
    base = tiny("llama")
    ours = veneer.get_peft_model(copy.deepcopy(base), veneer.LoraConfig(init_lora_weights="eva", **SETTINGS))
    veneer.initialize_lora_eva_weights(ours, [batch])
    config = peft.LoraConfig(init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0), **SETTINGS)
    theirs = peft.get_peft_model(base, config)
    peft.initialize_lora_eva_weights(theirs, [batch], show_progress_bar=False)
    for update, A, B in _pairs(ours, theirs):
        assert torch.linalg.svdvals(update.A @ A.T).min() > 0.99  # theirs are found by random subspaces
        assert torch.equal(update.B, B)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_lora_ga_starts_along_the_vectors_of_there(tiny, batch):
    base = tiny("llama")
    twin = copy.deepcopy(base)
    ours = veneer.get_peft_model(twin, veneer.LoraConfig(init_lora_weights="lora_ga", **SETTINGS))
    veneer.initialize_lora_ga_weights(ours, [batch])
    config = peft.LoraConfig(init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig(), **SETTINGS)
    peft.preprocess_loraga(base, config, lambda: base(**batch).loss.backward())
    theirs = peft.get_peft_model(base, config)
    for update, A, B in _pairs(ours, theirs):
        for here, there in ((update.A, A), (update.B.T, B.T)):
            directions = [torch.nn.functional.normalize(rows, dim=1) for rows in (here, there)]
            assert (directions[0] * directions[1]).sum(1).abs().min() > 0.999


@pytest.mark.parametrize("how", ["eva", "lora_ga"])
@pytest.mark.parametrize("rslora", [False, True])
def test_what_starts_here_is_read_there(tiny, batch, how, rslora, tmp_path):
    base = tiny("llama")
    config = veneer.LoraConfig(init_lora_weights=how, use_rslora=rslora, **SETTINGS)
    ours = veneer.get_peft_model(copy.deepcopy(base), config)
    if how == "eva":
        veneer.initialize_lora_eva_weights(ours, [batch], rho=2)
    else:
        veneer.initialize_lora_ga_weights(ours, [batch])
    for _, layer in veneer.core.inject.adapted_layers(ours):
        torch.nn.init.normal_(layer.adapters["default"].B)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(ours(**batch).logits, theirs(**batch).logits, rtol=1e-5, atol=1e-5)
