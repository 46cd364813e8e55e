"""Runs that were cut short: found, and held to what they were begun with."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from veneer import recipes
from veneer.core.errors import AdapterError
from veneer.train.record import Run, facts_of, runs_named
from veneer.train.sameness import FREE, PLACES, asked, differences
from veneer.train.settings import Recipe, checked, resolved
from veneer.train.task import Reporter

R = TypeVar("R", bound=Recipe)
CUT_SHORT = ("running", "interrupted", "failed")  # what a run's facts say while, or where, it did not come to its end


def cut_short(recipe: Recipe, named: Path | None = None) -> Path | None:
    """The newest run of the recipe's name, or the one that is `named`, if it did not come to its end."""
    begun = (run for run in runs_named(recipe.output, recipe.name or recipe.task) if facts_of(run))
    newest = named or next(begun, None)
    return newest if newest and facts_of(newest).get("state") in CUT_SHORT else None


def begun_as(recipe: Recipe) -> tuple[Path | None, str]:
    """The newest run that was begun with just this recipe, and its state: finished, or cut short."""
    for folder in runs_named(recipe.output, recipe.name or recipe.task):
        facts = facts_of(folder)
        if facts.get("asked") == asked(recipe):
            state = facts.get("state")
            return (folder, state) if state == "finished" or state in CUT_SHORT else (None, "")
    return None, ""


def as_before(recipe: R, run: Run, inexact: bool, reporter: Reporter) -> R:
    """The recipe as the run has it, with all that was chosen then; its own keys where it differs and may.

    Raises `AdapterError` that names every key that asks for something else; where that is allowed, the run goes on with
    the recipe as it is.
    """
    path = run.folder / "recipe.yaml"
    then = checked(type(recipe), recipes.load(str(path)), f"recipe {path}")
    begun, chosen, now = facts_of(run.folder).get("asked", {}), asked(then), asked(recipe)
    held = {key for key in {**begun, **now} if key not in PLACES}
    changed = {key for key in held if now.get(key) not in (begun.get(key), chosen.get(key))}
    if changed:
        told = differences(
            {key: begun.get(key) for key in now if key in changed}, {key: now.get(key) for key in now if key in changed}
        )
        _judge(run, "the recipe has changed: " + "; ".join(told), inexact, reporter)
        run.allowed["asked"] = now
        return recipe
    values, own = resolved(then), resolved(recipe)
    for key in (*FREE, *PLACES):
        _take(values, own, key.split("."))
    return checked(type(recipe), values, f"recipe {path}")


def refuse_changes(run: Run, made_of: Mapping[str, Any], inexact: bool, reporter: Reporter) -> None:
    """Raises `AdapterError` where rows, base, machine or packages are not those that the run was begun with."""
    if told := differences(facts_of(run.folder).get("made_of", {}), made_of):
        _judge(run, "; ".join(told), inexact, reporter)


def _take(values: dict[str, Any], own: Mapping[str, Any], keys: Sequence[str]) -> None:
    """Let a value be that of `own`, where it has one."""
    if len(keys) > 1 and keys[0] in own:
        _take(values[keys[0]], own[keys[0]], keys[1:])
    elif keys[0] in own:
        values[keys[0]] = own[keys[0]]


def _judge(run: Run, told: str, inexact: bool, reporter: Reporter) -> None:
    if not inexact:
        raise AdapterError(
            f"{run.folder} cannot be resumed to the same bits: {told}. Put it back as it was, begin a new run without "
            "--resume, or go on all the same with --allow-inexact"
        )
    run.allowed.setdefault("inexact", []).append(told)
    reporter.say(f"{run.folder} goes on though {told}: it ends with other bits than an undisturbed run")
