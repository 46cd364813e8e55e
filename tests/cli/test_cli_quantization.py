"""A frozen base of 8 or 4 bits: trained, answered with, and refused where its library is missing."""

import pytest
import torch
from torch import nn

from veneer import AdapterError, LoraConfig, get_peft_model
from veneer.train.bases.loading import load_language_model

TOKENS = torch.arange(3, 51).view(2, 24)


@pytest.mark.parametrize(("quantization", "close"), [("int8", 0.02), ("nf4", 0.2)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_computes_nearly_the_same_and_learns(tiny_base, quantization, close, dtype):
    pytest.importorskip("bitsandbytes", exc_type=ImportError)
    plain = load_language_model(tiny_base, dtype, torch.device("cpu"))
    base = load_language_model(tiny_base, dtype, torch.device("cpu"), quantization)
    assert {type(layer).__name__ for layer in base.model.layers.modules() if isinstance(layer, nn.Linear)} == {
        {"int8": "Linear8bitLt", "nf4": "Linear4bit"}[quantization]
    }
    exact = plain(TOKENS).logits.float()
    assert (base(TOKENS).logits - exact).norm() < close * exact.norm()
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear")).train()
    trains = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(trains, lr=1e-2), []
    for _ in range(8):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2


def test_a_missing_library_is_named(tiny_base, monkeypatch):
    monkeypatch.setattr("veneer.train.bases.loading.find_spec", lambda name: None)
    with pytest.raises(AdapterError, match=r"quantization=int8 needs: pip install 'veneer\[quantised\]'"):
        load_language_model(tiny_base, "float32", torch.device("cpu"), "int8")


def test_a_run_over_it_leaves_an_adapter_for_the_plain_base(veneer, recipe, tmp_path):
    pytest.importorskip("bitsandbytes", exc_type=ImportError)
    said = veneer("train", recipe, "quantization=int8", "train.gradient_checkpointing=true")
    assert said.code == 0, said.err
    said = veneer("generate", tmp_path / "runs/small-1", "--prompt", "name: Inn 3\n", "--max-new-tokens", "3")
    assert said.code == 0, said.err
    assert veneer("train", recipe, "quantization=nf4", "--dry-run").code == 0
