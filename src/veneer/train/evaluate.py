"""The held-out figures of a run that is done."""

from collections.abc import Iterable
from pathlib import Path

from veneer.core.errors import AdapterError
from veneer.train.run import read_recipe
from veneer.train.task import Reporter


def measured(
    run: Path, data: str | None, overrides: Iterable[str], base: bool, reporter: Reporter
) -> dict[str, dict[str, float]]:
    """The figures of the run's adapter, and of the base, on the rows of `data` or else on those that the run held out.

    Raises `AdapterError` where there are none.
    """
    own = [] if data is None else [f"data.path={data}", f"data.eval_path={data}", "data.eval_split=null"]
    recipe, build = read_recipe(str(run), [*own, *overrides])
    task = build(recipe, reporter)
    task.load(run / "adapter")
    found = {"adapted": task.evaluate(whole=True)}
    if not found["adapted"]:
        raise AdapterError(f"{run} holds no rows out: name some with --data")
    if base:
        with task.model.disable_adapter():
            found = {"base": task.evaluate(whole=True), **found}
    return found
