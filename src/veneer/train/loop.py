"""The loop: a step is a pure function of (recipe, seed, step number)."""

import hashlib
import itertools
import math
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from types import FrameType
from typing import Any

import torch

from veneer.core.errors import listed
from veneer.train.heap import step_heap
from veneer.train.optimizers import Stepper
from veneer.train.pieces import quick_pieces
from veneer.train.processes import ALONE, World
from veneer.train.products import quick_products
from veneer.train.schedules import rate
from veneer.train.settings import TrainSettings
from veneer.train.task import Batch, Task


@dataclass
class Outcome:
    """How far the loop came, and why it ended."""

    steps: int
    seconds: float
    stopped_by: int = 0  # the signal that ended it before its time
    failure: str | None = None  # a loss or gradient that is not a number; the step was not taken
    whole: bool = True  # no step was broken off in its middle

    @property
    def interrupted(self) -> bool:
        return bool(self.stopped_by)


class Watcher:
    """Is told by the loop how it goes."""

    def stepped(self, record: dict[str, float], steps: int) -> bool:
        """A step of `steps` is done; whether there shall be no more."""
        return False


def count_steps(settings: TrainSettings, size: int) -> int:
    """Optimizer steps of a run over `size` rows."""
    a_step = settings.batch_size * settings.accumulation
    return settings.steps or max(1, math.ceil(settings.epochs * size / a_step))


def train(
    task: Task, stepper: Stepper, settings: TrainSettings, watcher: Watcher, outcome: Outcome, world: World = ALONE
) -> None:
    """Take the steps that follow `outcome`, which says in the end how far it came; the watcher is told of each.

    Ctrl-C and SIGTERM, in any of the processes, end the loop after the step that is under way, with the adapter as that
    step left it; Ctrl-C pressed again ends the step or the measurement too.
    """
    steps = count_steps(settings, task.size)
    began = time.perf_counter() - outcome.seconds
    heap = step_heap(keeps=not settings.gradient_checkpointing)
    with _finishing_the_step() as stop, heap, quick_pieces(task.model), quick_products():
        try:
            for step in range(outcome.steps, steps):
                outcome.stopped_by = int(world.gathered([stop[-1] if stop else 0]).max())
                if outcome.stopped_by:
                    break
                task.model.train()
                outcome.whole = False
                record, outcome.failure = _step(task, stepper, step, steps, settings, world)
                outcome.whole, outcome.seconds = True, time.perf_counter() - began
                if outcome.failure:
                    break
                outcome.steps = step + 1
                record["seconds"] = outcome.seconds
                if watcher.stepped(record, steps):
                    break
        except KeyboardInterrupt:
            outcome.stopped_by = signal.SIGINT


def rows_of(step: int, settings: TrainSettings, size: int, groups: torch.Tensor | None = None) -> list[list[int]]:
    """The rows of one step, a list for each batch: every epoch is a permutation that (seed, epoch) decides; with
    `groups` `(size,)`, one in which a batch is of one group, but for the rows of each group that are left over.

    The last epoch is filled up from the next permutation, so every step has the same number of rows.
    """
    a_step = settings.batch_size * settings.accumulation
    places = range(step * a_step, (step + 1) * a_step)
    own = (settings.seed, size, groups, settings.batch_size if groups is not None else 1)
    orders = {epoch: _order(epoch, *own) for epoch in {place // size for place in places}}
    rows = [int(orders[place // size][place % size]) for place in places]
    return [rows[i : i + settings.batch_size] for i in range(0, a_step, settings.batch_size)]


@lru_cache(maxsize=2)  # a step may end one epoch and begin the next
def _order(epoch: int, seed: int, size: int, groups: torch.Tensor | None, batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(_seed(seed, "epoch", epoch))
    order = torch.randperm(size, generator=generator)
    return order if groups is None else _together(order, groups, batch, -epoch * size % batch, generator)


def _together(
    order: torch.Tensor, groups: torch.Tensor, batch: int, lead: int, generator: torch.Generator
) -> torch.Tensor:
    """The order with batches of one group each, and of what is left of the groups; its first `lead` rows fill up the
    batch that the epoch before has begun.
    """
    blocks = [block for group in groups.unique() for block in order[groups[order] == group].split(batch)]
    full, rest = [[own for own in blocks if (len(own) == batch) == whole] for whole in (True, False)]
    while full and sum(map(len, rest)) < lead:
        rest.append(full.pop())
    left = torch.cat([order[:0], *rest])
    full += left[lead:].split(batch)
    mixed = torch.randperm(len(full), generator=generator).tolist()
    return torch.cat([left[:lead], *sorted((full[place] for place in mixed), key=len, reverse=True)])


def _seed(seed: int, what: str, number: int) -> int:
    digest = hashlib.sha256(f"{seed} {what} {number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _step(
    task: Task, stepper: Stepper, step: int, steps: int, settings: TrainSettings, world: World
) -> tuple[dict[str, float], str | None]:
    """One optimizer step; its record, and what went wrong, if anything did: then the step is not taken."""
    rows = rows_of(step, settings, task.size, task.groups)
    made, wrong = world.tried(lambda: _batches(task, step, rows, world))
    batches = made or []
    torch.manual_seed(_seed(settings.seed, f"step of process {world.rank}" if world.rank else "step", step))
    lr = rate(step, steps, settings.lr, settings.schedule, settings.warmup)
    own_counts = [sum(b.units for b in batches), sum(b.amount for b in batches), len(batches), wrong is not None]
    counts = world.gathered(own_counts)
    if counts[:, 3].any():
        world.refuse(wrong)
    units, amount = counts[:, :2].sum(0).tolist()
    own, bad = torch.zeros((), dtype=torch.float64), []
    for batch in batches:
        loss = task.loss(batch) / units
        own += (value := loss.item())
        if not math.isfinite(value):
            bad += batch.places
            break
        stepper.backward(loss)
    if settings.shard == "always":  # where layers are spread, each process runs them as often as the others
        for _ in range(int(counts[:, 2].max()) - len(batches)):
            stepper.backward(0 * task.loss((batches or task.batches([0]))[0]))
    stepper.add_up(world, own)
    record = {"step": step + 1, "loss": own.item(), "lr": lr, task.unit: amount}
    if not math.isfinite(own):
        return record, _not_finite(step, f"the loss is {own.item()}", _flat(world.collected(bad)), lr)
    norm = stepper.step(lr)
    if stepper.lowers(norm):
        record["skipped"] = stepper.skipped
    elif not math.isfinite(norm):
        places = [place for batch in batches for place in batch.places]
        return record, _not_finite(step, f"the gradient's norm is {norm}", _flat(world.collected(places)), lr)
    return record, None


def _batches(task: Task, step: int, rows: list[list[int]], world: World) -> list[Batch]:
    """This process's share of the step's rows, ready for the model."""
    found, turns, task.step = [], Counter[int](), step
    places, count = itertools.count(), sum(map(len, rows))
    for own in rows:
        seen = []
        for row in own:  # the end of an epoch and the beginning of the next may have it, or a small epoch twice
            seen.append(turns[row])
            turns[row] += 1
        task.turns, task.strata = world.share(seen), world.share([(next(places), count) for _ in own])
        if share := world.share(own):
            found += task.batches(share)
    return found


def _flat(lists: list[list[str]]) -> list[str]:
    return [one for own in lists for one in own]


def _not_finite(step: int, what: str, places: list[str], lr: float) -> str:
    return (
        f"step {step + 1}: {what} on the rows {listed(places, 16)}. The adapter of the step before is kept. "
        f"Try a lower train.lr (it was {lr:.2g}), a longer train.warmup, or dtype=float32; or look at these rows"
    )


@contextmanager
def _finishing_the_step() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM are written into the list; a second Ctrl-C interrupts at once. Outside of the main thread
    nothing is caught.
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    before: dict[int, Any] = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
