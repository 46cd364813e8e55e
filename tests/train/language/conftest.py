"""A task of a model with a head, made of rows."""

import json
from pathlib import Path
from typing import Any

import pytest

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

    def one(task: Any, inputs: dict[str, Any]) -> float:
        labels = inputs.pop("labels")
        if task.task_type == "QUESTION_ANS":
            return task.model(**inputs, start_positions=labels[:, 0], end_positions=labels[:, 1]).loss.item()
        return task.model(**inputs, labels=labels).loss.item()

    def of(task: Any, rows: list[int]) -> float:
        batches = task.batches(rows)
        whole = sum(batch.units * one(task, dict(batch.inputs)) for batch in batches)
        return whole / sum(batch.units for batch in batches)

    return of
