"""A command, called as a person calls it, and a tiny genuine base for it."""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass
class Said:
    """What a command left: its exit code, and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The cache of the test's own, where pulled bases and prepared rows go; its library is its own too."""
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("VENEER_LIBRARY", str(tmp_path / "library"))
    return tmp_path / "cache"


@pytest.fixture
def veneer(capsys, monkeypatch):
    """`veneer("train", "quickstart")` → what it said; through the real entry point."""
    from veneer.cli import main

    def call(*arguments) -> Said:
        monkeypatch.setattr(sys, "argv", ["veneer", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        said = capsys.readouterr()
        return Said(code, said.out, said.err)

    return call


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    """A Llama of 2 layers with its own BPE tokenizer and chat template, saved as a folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from veneer.recipes import SHIPPED

    folder = tmp_path_factory.mktemp("bases") / "tiny"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    lines = (SHIPPED / "data/e2e/train.jsonl").read_text(encoding="utf-8").splitlines()[:300]
    tokenizer.train_from_iterator((text for line in lines for text in json.loads(line).values()), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|im_end|>")
    fast.chat_template = CHAT
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def rows(tmp_path) -> Path:
    """Forty rows of prompts and completions."""
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": f"name: Inn {i}\n", "completion": f"The Inn {i} is a pub."}) for i in range(40)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def recipe(tmp_path, tiny_base, rows) -> Path:
    """A recipe that trains the tiny base on the rows in a second."""
    path = tmp_path / "small.yaml"
    path.write_text(
        f"base: {tiny_base}\ndtype: float32\ndevice: cpu\noutput: {tmp_path / 'runs'}\n"
        "adapter: {r: 4, target_modules: all-linear}\n"
        f"data: {{path: {rows}, eval_share: 0.2}}\n"
        "train: {steps: 4, batch_size: 4, lr: 1.0e-2}\n"
        "eval: {answers: 2, max_new_tokens: 4}\nsample: {count: 1, max_new_tokens: 4}\n",
        encoding="utf-8",
    )
    return path
