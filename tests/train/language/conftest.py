"""Tiny genuine bases with their tokenizers, in folders."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from train.language.bases import PARTS, tokenizer_with


@pytest.fixture(scope="session")
def base_of(tmp_path_factory) -> Callable[[str], Path]:
    """`base_of("t5")`: a folder with a tiny model of that family, its numbers far from those that it starts with."""

    @cache
    def build(family: str, template: str | None = None, **settings: object) -> Path:
        import transformers

        folder = tmp_path_factory.mktemp(family)
        two = family in ("t5", "bart")
        tokenizer = tokenizer_with((), begin=family == "bart", end=two, template=template)
        tokenizer.save_pretrained(folder)
        torch.manual_seed(0)
        ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": len(tokenizer)}
        config = transformers.AutoConfig.for_model(family, **{**PARTS[family], **ids, **settings})
        kind = "AutoModelForSeq2SeqLM" if two else "AutoModelForCausalLM"
        model = getattr(transformers, kind).from_config(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(folder)
        return folder

    return build
