"""`Watch`: what a run does between its steps: write down, measure, keep a checkpoint, know when it is enough."""

import json
import math
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from veneer.core.errors import AdapterError
from veneer.train.checkpoint import Checkpoints, State
from veneer.train.loop import Outcome, Watcher
from veneer.train.optimizers import Stepper
from veneer.train.processes import World
from veneer.train.record import Run
from veneer.train.settings import Recipe
from veneer.train.task import Reporter, Task


@dataclass
class Counters:
    """What measurements came to so far, by step."""

    measured: int = -1  # the last step that was measured after
    best_step: int | None = None
    best: float | None = None  # lower is better
    worse: int = 0  # measurements since the best


@dataclass
class Watch(Watcher):
    """A run's watcher."""

    task: Task
    stepper: Stepper
    run: Run
    recipe: Recipe
    reporter: Reporter
    world: World
    counters: Counters = field(default_factory=Counters)
    kept: int = 0  # the step of the newest checkpoint

    def __post_init__(self) -> None:
        self.checkpoints = Checkpoints(self.run.folder / "checkpoints", self.recipe.checkpoint.keep)
        self._kept_at = time.monotonic()

    @property
    def spread(self) -> bool:
        """Whether layers are spread over the processes, so that all run them or none."""
        return self.recipe.train.shard == "always"

    @property
    def enough(self) -> bool:
        """Whether so many measurements in a row were no better that the training ends."""
        patience = self.recipe.eval.patience
        return patience is not None and self.counters.worse >= patience

    def begin(self) -> Outcome:
        """Let all processes begin with the adapter that the first has drawn."""
        if self.world.size > 1:
            self.stepper.restore(*self.world.first(self.stepper.state))
        return Outcome(0, 0.0)

    def resume(self) -> Outcome:
        """Go back to the newest checkpoint that is whole, or to the beginning where there is none."""
        state = self.world.first(lambda: self.checkpoints.newest(self.reporter.say))
        outcome = Outcome(0, 0.0) if state else self.begin()
        if state is not None:
            self.stepper.restore(state.tensors, state.plain["stepper"])
            self.counters = Counters(**state.plain["counters"])
            self.kept = state.plain["step"]
            outcome = Outcome(self.kept, state.plain["seconds"])
        self.run.cut_back(outcome.steps, max(0, self.counters.measured))
        where = f"step {outcome.steps}" if outcome.steps else "its beginning: there is no checkpoint yet"
        self.reporter.say(f"{self.run.folder} goes on from {where}")
        return outcome

    def stepped(self, record: dict[str, float], steps: int) -> bool:
        self.run.measure(record)
        self.reporter.step(record, steps, self.task.unit)
        step = int(record["step"])
        better, enough = self.measure(step, last=step == steps)
        every = getattr(getattr(self.recipe, "sample", None), "every_steps", None)
        if every and step % every == 0 and step < steps:
            self.samples(f"step-{step:08}")
        if better or self._due(step):
            self.keep(step, record["seconds"])
        return enough

    def measure(self, step: int, last: bool = False) -> tuple[bool, bool]:
        """Measure where it is time to; whether it was the best so far, and whether it is enough."""
        own, counters = self.recipe.eval, self.counters
        chosen = own.keep == "best"  # then the last step is measured like the others
        due = own.every_steps and step and step % own.every_steps == 0
        if not due or counters.measured == step or (last and not chosen):
            return False, self.enough
        figures = self.figures(step, whole=False)
        counters.measured = step
        if self.task.judged_by not in figures:
            return False, self.enough
        value = figures[self.task.judged_by] * (-1 if self.task.higher_is_better else 1)
        better = counters.best is None or value < counters.best
        if better:
            counters.best, counters.best_step, counters.worse = value, step, 0
        else:
            counters.worse += 1
        if self.enough:
            self.reporter.say(f"no better since step {counters.best_step}: the training ends (eval.patience)")
        return better, self.enough

    def before(self) -> dict[str, float]:
        """All figures before the first step, measured once."""
        known = self.world.first(lambda: [record for record in self.run.metrics() if record["step"] == 0])
        return {k: v for k, v in known[0].items() if k != "step"} if known else self.figures(0, whole=True)

    def figures(self, step: int, whole: bool) -> dict[str, float]:
        """The held-out figures, written down and told: the first process's, for all.

        Raises `AdapterError` where one is not a number.
        """

        def told() -> dict[str, float]:
            figures = self.task.evaluate(whole) if found is None else found
            if wrong := {name: value for name, value in figures.items() if not math.isfinite(value)}:
                raise AdapterError(
                    f"after step {step} the held-out figures are {wrong}: the adapter is of no use. Try a lower "
                    "train.lr, or dtype=float32"
                )
            if figures:
                record = {"step": step, **figures}
                self.run.measure(record)
                self.reporter.measured(record)
            return figures

        found = self.task.evaluate(whole) if self.spread else None
        return self.world.first(told)

    def samples(self, name: str) -> list[dict[str, str]]:
        """What base and adapted model make of a few inputs, kept in the run."""
        found = self.task.sample() if self.run.writes or self.spread else []
        lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in found]
        self.run.write(f"samples/{name}.jsonl", "".join(lines))
        self.run.draw(f"samples/{name}.png", self.task.draw)
        self.world.first(lambda: None)  # the others wait
        return found

    def keep(self, step: int, seconds: float) -> None:
        """Write a checkpoint, unless that of this step is there."""
        if step == self.kept or not self.run.writes:
            return
        self.run.flush()
        tensors, plain = self.stepper.state()
        facts: dict[str, Any] = {"step": step, "seconds": seconds, "counters": asdict(self.counters), "stepper": plain}
        self.checkpoints.write(State(tensors, facts), self.counters.best_step)
        self.kept, self._kept_at = step, time.monotonic()

    def back_to_best(self, step: int) -> int:
        """Let the adapter be that of the best measurement, where the recipe asks for it; its step."""
        best = self.counters.best_step
        if self.recipe.eval.keep != "best" or best is None or best == step:
            return step
        try:
            state = self.world.first(lambda: self.checkpoints.at(best))
        except AdapterError as error:
            self.reporter.say(f"{error}; the adapter is that of step {step}, the last, and not that of step {best}")
            return step
        self.stepper.restore(state.tensors, state.plain["stepper"])
        self.reporter.say(f"the adapter is that of step {best}, the best measured (eval.keep)")
        return best

    def _due(self, step: int) -> bool:
        own = self.recipe.checkpoint
        if own.every_steps and step % own.every_steps == 0:
            return True
        return own.every_minutes is not None and time.monotonic() - self._kept_at >= 60 * own.every_minutes
