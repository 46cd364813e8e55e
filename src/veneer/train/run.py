"""A recipe in, a run folder out."""

import json
import re
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veneer import recipes
from veneer.core.errors import AdapterError
from veneer.train.card import NAMES, card
from veneer.train.drawing.curves import draw_losses
from veneer.train.loop import Outcome, count_steps, train
from veneer.train.memory import Estimate, bytes_of, estimate
from veneer.train.optimizers import Stepper
from veneer.train.processes import ALONE, World, fits, join, spread
from veneer.train.recompute import recompute_layers
from veneer.train.record import USAGE, Elsewhere, Run, facts_of, peak_memory
from veneer.train.resume import as_before, cut_short, refuse_changes
from veneer.train.sameness import asked, circumstances
from veneer.train.settings import Recipe, as_yaml, checked, resolved
from veneer.train.task import Reporter, Task
from veneer.train.tasks import task_named
from veneer.train.trackers import refuse_missing
from veneer.train.watch import Watch


@dataclass
class Result:
    """What a run came to."""

    run: Run
    recipe: Recipe
    outcome: Outcome
    before: dict[str, float]
    after: dict[str, float]
    trainable: int
    parameters: int
    seconds: float  # all of it, loading and measuring included
    samples: list[dict[str, str]] = field(default_factory=list)
    peak_bytes: int = 0
    adapter_bytes: int = 0
    judged_by: str = ""  # the figure that says which of two adapters is better
    higher_is_better: bool = False
    asking: str = ""  # the command that uses the adapter


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
    unit: str  # what goes through the model


def read_recipe(name: str, overrides: Iterable[str] = ()) -> tuple[Recipe, type[Task]]:
    """The recipe, resolved and checked, and its task; that of a run, where its folder is named.

    Raises `AdapterError` that names every bad key.
    """
    own = Path(name).expanduser() / "recipe.yaml"
    values = recipes.load(str(own) if own.is_file() else name, overrides)
    task = task_named(values.get("task", "causal-lm"))
    recipe = checked(task.settings, values, f"recipe {name}")
    recipe.name = recipe.name or re.sub(r"[^\w.+-]+", "-", Path(name).stem)
    return recipe, task


def preview(recipe: Recipe, build: type[Task], reporter: Reporter) -> Preview:
    """Load everything, train nothing, write nothing."""
    task = _built(recipe, build.looked_at, reporter, ALONE)
    trainable, parameters = task.model.get_nb_trainable_parameters()
    facts = task.facts()
    memory = estimate(task, recipe.train)
    layers = list(filter(None, task.model.get_adapter().tensors))
    return Preview(
        resolved(recipe), count_steps(recipe.train, task.size), layers, trainable, parameters, memory, facts, task.unit
    )


def run(
    recipe: Recipe, build: type[Task], reporter: Reporter, resume: bool | Path = False, inexact: bool = False
) -> Result:
    """Train, measure before and after, and leave a run folder. Whatever was learned is saved, also on Ctrl-C.

    With `resume`, the newest run of the recipe that was cut short (or the one that it names) goes on, to the bits that
    it would have ended with; `inexact` lets it go on where something has changed. Raises `AdapterError` for bad input,
    with no folder left, and for a loss that is not a number, with the adapter of the last good step saved.
    """
    began, world = time.perf_counter(), join(recipe.device)
    reporter = reporter if world.rank == 0 else Reporter()
    held: list[Run] = []

    def place() -> tuple[Path, Recipe, bool]:
        folder, own, again = _place(recipe, resume, inexact, reporter)
        held.append(folder)
        return folder.folder, own, again

    try:
        path, recipe, again = world.first(place)
        folder = held[0] if held else Elsewhere(path)
        watch, outcome = _begun(recipe, build, reporter, folder, again, inexact, world)
        return _carried_out(watch, outcome, began, again)
    finally:
        for folder in held:
            folder.release()
        world.leave()


def _place(recipe: Recipe, resume: bool | Path, inexact: bool, reporter: Reporter) -> tuple[Run, Recipe, bool]:
    """The run's folder, the recipe as it is to be run there, and whether it goes on there."""
    named = resume if isinstance(resume, Path) else None
    earlier = cut_short(recipe, named)
    if earlier and (resume or recipe.resume == "auto"):
        folder = Run(earlier)
        return folder, as_before(recipe, folder, inexact, reporter), True
    if resume:
        what = named or f"the newest run {recipe.name} in {recipe.output}"
        raise AdapterError(f"nothing to resume: {what} was not cut short, or is not there")
    if earlier:
        reporter.say(f"{earlier} was cut short; --resume goes on with it, and this is a new run")
    return Run.fresh(recipe.output, recipe.name or recipe.task), recipe, False


def _begun(
    recipe: Recipe, build: type[Task], reporter: Reporter, folder: Run, again: bool, inexact: bool, world: World
) -> tuple[Watch, Outcome]:
    """Everything loaded, and the adapter where it starts from, or goes on from."""
    try:
        wanted = asked(recipe)
        refuse_missing(recipe.log)
        task = world.together(lambda: _built(recipe, build, reporter, world))
        device = next(task.model.parameters()).device
        made_of = world.first(lambda: {**task.made_of(), **circumstances(device, world.size)})
        watch = Watch(task, Stepper(task.model, recipe.train, task.rates()), folder, recipe, reporter, world)
        if again:
            world.first(lambda: refuse_changes(folder, made_of, inexact, reporter))
            outcome = watch.resume()
        else:
            outcome = watch.begin()
            folder.allowed["asked"] = wanted
        if changed := folder.allowed.pop("inexact", None):
            told = f"from step {outcome.steps} on: {'; '.join(changed)}"
            folder.allowed["inexact"] = [*facts_of(folder.folder).get("inexact", []), told]
        folder.write("recipe.yaml", as_yaml(resolved(recipe)))
        steps = count_steps(recipe.train, task.size)
        judged = {"judged_by": task.judged_by, "higher_is_better": task.higher_is_better}
        folder.note(state="running", made_of=made_of, planned=steps, **judged, **folder.allowed)
        folder.track(recipe.log, resolved(recipe), outcome.steps)
        return watch, outcome
    except BaseException:
        if not again:
            folder.discard()
        raise


def _carried_out(watch: Watch, outcome: Outcome, began: float, again: bool) -> Result:
    task, recipe, folder = watch.task, watch.recipe, watch.run
    try:
        before = watch.before()
        last = outcome.steps == count_steps(recipe.train, task.size)
        enough = watch.measure(outcome.steps, last)[1]  # where a run was cut short while it measured
    except BaseException:
        if not again:
            folder.discard()
        raise
    trainable, parameters = task.model.get_nb_trainable_parameters()
    result = Result(folder, recipe, outcome, before, {}, trainable, parameters, 0.0)
    result.judged_by, result.higher_is_better, result.asking = task.judged_by, task.higher_is_better, task.asking
    try:
        if not enough:
            train(task, watch.stepper, recipe.train, watch, outcome, watch.world)
        if outcome.whole and not outcome.failure:
            watch.keep(outcome.steps, outcome.seconds)
    except BaseException as error:
        with suppress(AdapterError):  # whatever kept it from being written may keep this from it too
            folder.note(state="failed", why=str(error))
            _keep(task, folder)  # as the last whole step left it
            watch.reporter.say(f"what was learned until then is in {folder.adapter}")
        raise
    _finish(watch, result)
    result.peak_bytes = peak_memory()
    result.seconds = time.perf_counter() - began
    _save(task, recipe, result)
    folder.untrack()
    folder.note(state="interrupted" if outcome.interrupted else "finished", steps=outcome.steps, figures=result.after)
    return result


def _finish(watch: Watch, result: Result) -> None:
    """Save the adapter; and, unless the run was cut short, measure it and let it answer."""
    outcome, folder, task = result.outcome, result.run, watch.task
    exported = outcome.steps if outcome.interrupted or outcome.failure else watch.back_to_best(outcome.steps)
    _save(task, watch.recipe, result)
    if outcome.failure:
        _draw(folder)
        folder.note(state="failed", why=outcome.failure)
        raise AdapterError(f"{outcome.failure}. It is in {folder.adapter}")
    if not outcome.interrupted:
        try:
            result.after = watch.figures(exported, whole=True)
            result.samples = watch.samples("answers")
        except KeyboardInterrupt:
            outcome.stopped_by = signal.SIGINT
    _draw(folder)


def _built(recipe: Recipe, build: Callable[[Recipe, Reporter], Task], reporter: Reporter, world: World) -> Task:
    task = build(recipe, reporter)
    if recipe.train.gradient_checkpointing:
        recompute_layers(task.model)
    own = recipe.train
    if own.shard == "auto" or world.size == 1:
        parameters = list(task.model.parameters())
        whole = world.size == 1 or fits(sum(map(bytes_of, parameters)), parameters[0].device)
        own.shard = "never" if whole else "always"
    if own.shard == "always":
        reporter.say(f"each of {world.size} processes keeps a part of the base")
        spread(task.model)
    return task


def _draw(folder: Run) -> None:
    folder.draw("loss.png", lambda path: draw_losses(folder.metrics(), path, folder.folder.name))


def _save(task: Task, recipe: Recipe, result: Result) -> None:
    """The adapter, how to use it, and its card."""
    folder = result.run
    if not folder.writes:
        return
    usage = _keep(task, folder)
    result.adapter_bytes = sum(path.stat().st_size for path in folder.adapter.rglob("*.safetensors"))
    rows = _figures(recipe, result)
    text = card(task, folder.folder.name, recipe.base, rows, usage, result.samples)
    folder.write(f"{folder.adapter.name}/README.md", text)


def _keep(task: Task, folder: Run) -> dict[str, Any]:
    """The adapter, and how to use it, which is returned."""
    if not folder.writes:
        return {}
    task.save(folder.adapter)
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
        (NAMES.get(key, key), f"{result.before[key]:.4g} before, {value:.4g} after")
        for key, value in result.after.items()
    ]
    return rows
