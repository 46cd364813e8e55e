"""A recipe in, a run folder out."""

import json
import math
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veneer import recipes
from veneer.core.errors import AdapterError
from veneer.train.card import card
from veneer.train.loop import Outcome, count_steps, train
from veneer.train.memory import Estimate, estimate
from veneer.train.recompute import recompute_layers
from veneer.train.record import USAGE, Run, draw_losses, peak_memory
from veneer.train.settings import Recipe, checked
from veneer.train.task import Reporter, Task
from veneer.train.tasks import task_named


@dataclass
class Result:
    """What a run came to."""

    run: Run
    outcome: Outcome
    before: dict[str, float]
    after: dict[str, float]
    trainable: int
    parameters: int
    seconds: float  # all of it, loading and measuring included
    samples: list[dict[str, str]] = field(default_factory=list)
    peak_bytes: int = 0
    adapter_bytes: int = 0


@dataclass
class Preview:
    """What a run would do."""

    recipe: dict[str, Any]
    steps: int
    layers: list[str]
    trainable: int
    parameters: int
    memory: Estimate
    facts: dict[str, Any]


def read_recipe(name: str, overrides: Iterable[str] = ()) -> tuple[Recipe, type[Task]]:
    """The recipe, resolved and checked, and its task. Raises `AdapterError` that names every bad key."""
    values = recipes.load(name, overrides)
    task = task_named(values.get("task", "causal-lm"))
    recipe = checked(task.settings, values, f"recipe {name}")
    recipe.name = recipe.name or re.sub(r"[^\w.+-]+", "-", Path(name).stem)
    return recipe, task


def preview(recipe: Recipe, build: type[Task], reporter: Reporter) -> Preview:
    """Load everything, train nothing, write nothing."""
    task = _built(recipe, build, reporter)
    trainable, parameters = task.model.get_nb_trainable_parameters()
    facts = task.facts()
    memory = estimate(task, recipe.train)
    layers = list(filter(None, task.model.get_adapter().tensors))
    return Preview(resolved(recipe), count_steps(recipe.train, task.size), layers, trainable, parameters, memory, facts)


def run(recipe: Recipe, build: type[Task], reporter: Reporter) -> Result:
    """Train, measure before and after, and leave a run folder. Whatever was learned is saved, also on Ctrl-C.

    Raises `AdapterError` for bad input, with no folder left, and for a loss that is not a number, with the adapter of
    the last good step saved.
    """
    began = time.perf_counter()
    folder = Run(recipe.output, recipe.name or recipe.task)
    try:
        task = _built(recipe, build, reporter)
        folder.write("recipe.yaml", as_yaml(resolved(recipe)))
        trainable, parameters = task.model.get_nb_trainable_parameters()
        before = _measured(task, folder, reporter, 0)
    except BaseException:
        folder.discard()
        raise
    every = getattr(getattr(recipe, "eval", None), "every_steps", None)

    def measure(step: int) -> None:
        _noted(task.evaluate(whole=False), folder, reporter, step)

    try:
        outcome = train(task, recipe.train, every, folder.measure, measure, reporter)
    except BaseException:
        _keep(task, folder)  # as the last whole step left it
        reporter.say(f"what was learned until then is in {folder.adapter}")
        raise
    result = Result(folder, outcome, before, {}, trainable, parameters, 0.0)
    _save(task, recipe, result)
    if outcome.failure:
        _draw(folder)
        raise AdapterError(f"{outcome.failure}. It is in {folder.adapter}")
    if not outcome.interrupted:
        try:
            result.after = _measured(task, folder, reporter, outcome.steps)
            result.samples = task.sample()
            folder.write(
                "samples/answers.jsonl", "".join(json.dumps(s, ensure_ascii=False) + "\n" for s in result.samples)
            )
        except KeyboardInterrupt:
            outcome.interrupted = True
    _draw(folder)
    result.peak_bytes = peak_memory()
    result.seconds = time.perf_counter() - began
    _save(task, recipe, result)
    return result


def _built(recipe: Recipe, build: type[Task], reporter: Reporter) -> Task:
    task = build(recipe, reporter)
    if recipe.train.gradient_checkpointing:
        recompute_layers(task.model)
    return task


def _measured(task: Task, folder: Run, reporter: Reporter, step: int) -> dict[str, float]:
    """All figures on the held-out rows, noted."""
    return _noted(task.evaluate(whole=True), folder, reporter, step)


def _noted(figures: dict[str, float], folder: Run, reporter: Reporter, step: int) -> dict[str, float]:
    """The figures, written down and told. Raises `AdapterError` where one is not a number."""
    if wrong := {name: value for name, value in figures.items() if not math.isfinite(value)}:
        raise AdapterError(
            f"after step {step} the held-out figures are {wrong}: the adapter is of no use. Try a lower train.lr, or "
            "dtype=float32"
        )
    if figures:
        record = {"step": step, **figures}
        folder.measure(record)
        reporter.measured(record)
    return figures


def resolved(recipe: Recipe) -> dict[str, Any]:
    """The recipe with every key said, as `veneer train` reads it again."""
    return recipe.model_dump(mode="json")


def as_yaml(values: dict[str, Any]) -> str:
    """The values as a recipe file says them."""
    import yaml

    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)


def _draw(folder: Run) -> None:
    draw_losses(folder.metrics(), folder.folder / "loss.png", folder.folder.name)


def _save(task: Task, recipe: Recipe, result: Result) -> None:
    """The adapter, how to use it, and its card."""
    folder = result.run
    usage = _keep(task, folder)
    result.adapter_bytes = sum(path.stat().st_size for path in folder.adapter.glob("adapter_model*"))
    rows = _figures(recipe, result)
    folder.write(f"{folder.adapter.name}/README.md", card(folder.folder.name, recipe.base, rows, usage, result.samples))


def _keep(task: Task, folder: Run) -> dict[str, Any]:
    """The adapter, and how to use it, which is returned."""
    task.model.save_pretrained(folder.adapter)
    usage = task.usage()
    folder.write(f"{folder.adapter.name}/{USAGE}", json.dumps(usage, indent=2, ensure_ascii=False) + "\n")
    return usage


def _figures(recipe: Recipe, result: Result) -> list[tuple[str, str]]:
    """What the card's table says."""
    config = recipe.adapter
    rows = [
        ("method", f"{config.peft_type}, r={config.r}, lora_alpha={config.lora_alpha:g}"),
        ("trained", f"{result.trainable:,} parameters, {result.outcome.steps} steps of {recipe.train.batch_size}"),
    ]
    if result.outcome.interrupted:
        rows.append(("state", "interrupted before its end"))
    rows += [
        (key.replace("eval_loss", "held-out loss"), f"{result.before[key]:.4g} before, {value:.4g} after")
        for key, value in result.after.items()
    ]
    return rows
