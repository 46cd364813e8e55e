"""A task of a model with a head, made of rows; tiny genuine bases with their tokenizers, in folders."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from train.language.bases import PARTS, tokenizer_with
from veneer.train.run import read_recipe
from veneer.train.task import Reporter, Task


@pytest.fixture
def made(tmp_path, monkeypatch):
    """`made("sequence-classification", base, rows, **settings)`: the task, and what it said."""

    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "cache"))

    def build(task: str, base: Path, rows: list[dict[str, Any]], **settings: object) -> tuple[Task, list[str]]:
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        values = {
            "base": base,
            "dtype": "float32",
            "device": "cpu",
            "adapter.target_modules": "all-linear",
            "data.path": tmp_path / "rows.jsonl",
            "data.eval_path": tmp_path / "rows.jsonl",
            **{key.replace("__", "."): value for key, value in settings.items()},
        }
        recipe, kind = read_recipe(task, [f"{key}={json.dumps(v, default=str)}" for key, v in values.items()])
        reporter = Reporter()
        said: list[str] = []
        reporter.say = said.append  # type: ignore[method-assign]
        return kind(recipe, reporter), said

    return build


@pytest.fixture
def own_loss():
    """`own_loss(task, rows)`: the loss that transformers' own model gives."""

    def of(task: Any, rows: list[int]) -> float:
        (batch,) = task.batches(rows)
        inputs = dict(batch.inputs)
        labels = inputs.pop("labels")
        if task.task_type == "QUESTION_ANS":
            return task.model(**inputs, start_positions=labels[:, 0], end_positions=labels[:, 1]).loss.item()
        return task.model(**inputs, labels=labels).loss.item()

    return of


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
