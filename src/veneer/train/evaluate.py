"""The held-out figures of an adapter, measured again."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from veneer import library, recipes
from veneer.core.errors import AdapterError
from veneer.files.folder import read_config
from veneer.train.record import USAGE
from veneer.train.run import read_recipe
from veneer.train.settings import Recipe, checked
from veneer.train.task import Reporter, Task
from veneer.train.tasks import task_named
from veneer.train.trained import usage_of


def measured(
    name: str, data: str | None, overrides: Iterable[str], base: bool, reporter: Reporter
) -> dict[str, dict[str, float]]:
    """The figures of an adapter, and of its base, on the rows of `data`, or else on those that its run held out.

    `name` is a run's folder, an adapter's folder that says how it was trained, or a name of the library. Raises
    `AdapterError` where there are no rows.
    """
    own = [] if data is None else [f"data.path={data}", f"data.eval_path={data}", "data.eval_split=null"]
    adapter = library.find(name)
    run = adapter.parent
    if (run / "recipe.yaml").is_file():
        recipe, build = read_recipe(str(run), [*own, *overrides])
    else:
        recipe, build = _recipe_of(adapter, [*own, *overrides], rows=data is not None)
    task = build(recipe, reporter)
    task.load(adapter)
    found = {"adapted": task.evaluate(whole=True)}
    if not found["adapted"]:
        raise AdapterError(f"{run} holds no rows out: name some with --data")
    if base:
        with task.model.disable_adapter():
            found = {"base": task.evaluate(whole=True), **found}
    return found


def _recipe_of(adapter: Path, overrides: Iterable[str], rows: bool) -> tuple[Recipe, type[Task]]:
    """The recipe that an adapter's own words make, with its task."""
    usage = usage_of(adapter)
    if "task" not in usage or "base" not in usage:
        raise AdapterError(f"{adapter} does not say what it was trained on: expected a run, or {USAGE} in the folder")
    if not rows:
        raise AdapterError(f"{adapter} is no run, which would know held-out rows: name some with --data")
    task = task_named(usage["task"])
    schema: Any = task.settings.model_fields["data"].annotation
    known = {key: value for key, value in usage.get("data", {}).items() if key in schema.model_fields}
    said: dict[str, Any] = {**{key: usage[key] for key in ("task", "base", "train") if key in usage}, "data": known}
    recipe = checked(task.settings, recipes.overridden(said, overrides), str(adapter / USAGE))
    recipe.adapter = replace(read_config(adapter), init_lora_weights=True)
    return recipe, task
