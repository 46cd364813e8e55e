"""Pictures of fixed prompts and seeds: the base's beside the adapter's, on a sheet."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from PIL import Image

from veneer.core.errors import AdapterError
from veneer.core.model import PeftModel
from veneer.train.diffusion.family import Family
from veneer.train.diffusion.painter import Sampling, Weights, Wish, paint, rescheduled
from veneer.train.diffusion.schedule import Schedule
from veneer.train.diffusion.settings import SampleSettings
from veneer.train.diffusion.strengths import figures, strengths_sheet
from veneer.train.diffusion.style import looks
from veneer.train.drawing.sheet import Shown, sheet, small
from veneer.train.task import Reporter

ADAPTED, BARE = {"default": 1.0}, dict[str, float]()


class Samples:
    """What is drawn during a run."""

    def __init__(
        self, family: Family, schedule: Schedule, settings: SampleSettings, size: tuple[int, int], reporter: Reporter
    ) -> None:
        self.family, self.settings, self.reporter = family, settings, reporter
        self.changes = schedule.sampling()
        self.before = list[Image.Image]()  # the base's pictures
        self.after = list[Image.Image]()  # the adapter's, as long as it has learned nothing since
        width, height = family.drawn(size)
        said = {"width": settings.width, "height": settings.height}
        if wrong := [f"sample.{side}={own}" for side, own in said.items() if own and own % family.step]:
            raise AdapterError(f"{', '.join(wrong)}: expected multiples of {family.step}, as the base draws")
        self.sampling = Sampling(
            steps=settings.steps,
            guidance=settings.guidance,
            guidance_rescale=settings.guidance_rescale or None,
            negative_prompt=settings.negative_prompt or None,
            width=settings.width or width,
            height=settings.height or height,
        )

    def facts(self) -> dict[str, str]:
        """What besides base, prompt and seed decides a picture of the base."""
        return {"sampling": repr(self.sampling)}

    def painted(
        self, wishes: Sequence[Wish], carrier: PeftModel | None = None, what: str = "drawing", own: bool = False
    ) -> list[Image.Image]:
        """The pictures, as what is trained is sampled, or as the base is by its `own` scheduler, which what it predicts
        needs. Raises `AdapterError` where the base has no decoder.
        """
        pipeline = self.family.pipeline()
        if not own:
            pipeline.scheduler = rescheduled(pipeline.scheduler, self.changes)

        def progress(done: float, every: int) -> None:
            self.reporter.progress(what, int(done), every)

        return paint(pipeline, wishes, self.sampling, carrier, progress=progress)

    def bare(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        """The base's own pictures, before it carries an adapter."""
        wishes = [Wish(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        return self.painted(wishes, what="painting class pictures", own=True)

    def looks(
        self, prompts: Sequence[str], model: PeftModel, style: Sequence[Image.Image], learned: bool
    ) -> dict[str, float]:
        """How the base's pictures look or, once it has `learned`, the adapter's; the next sheet has these same ones."""
        self.before = self.before or self._all(prompts, model, BARE)
        self.after = self._all(prompts, model, ADAPTED) if learned else []
        return figures(looks(self.after or self.before, style, self.before))

    def sheet(self, prompts: Sequence[str], model: PeftModel, style: Sequence[Image.Image] = ()) -> Image.Image | None:
        """The base's pictures, which are drawn once, and the adapter's; nothing where there is no decoder."""
        if not self.family.draws:
            self.reporter.say("no pictures are drawn: the base has no decoder")
            return None
        own, self.after = self.after or self._all(prompts, model, ADAPTED), []
        self.before = self.before or self._all(prompts, model, BARE)
        return self._strengths(prompts, model, style, own) if self.settings.strengths else self._pairs(prompts, own)

    def _pairs(self, prompts: Sequence[str], own: Sequence[Image.Image]) -> Image.Image:
        """For each prompt the base's pictures, a seed each, and then the adapter's."""
        seeds = ", ".join(map(str, self.settings.seeds))
        line = f"{self._told(seeds)}: base, then adapter"
        count, found = len(self.settings.seeds), []
        for number, prompt in enumerate(prompts):
            place = slice(number * count, (number + 1) * count)
            found.append(Shown([*map(small, self.before[place]), *map(small, own[place])], [prompt, line]))
        return sheet(found)

    def _strengths(
        self, prompts: Sequence[str], model: PeftModel, style: Sequence[Image.Image], own: Sequence[Image.Image]
    ) -> Image.Image:
        """A row for the base, for each strength and for the adapter, with how they look."""
        rows = {0.0: self.before, 1.0: own}
        for strength in self.settings.strengths:
            if strength not in rows:
                rows[strength] = self._all(prompts, model, {"default": strength})
        seeds = self.settings.seeds
        columns = [prompt if len(seeds) == 1 else f"{prompt}, {seed}" for prompt in prompts for seed in seeds]
        names = {0.0: "before: strength 0", 1.0: "after: strength 1"}
        told = {names.get(strength, f"strength {strength:g}"): rows[strength] for strength in sorted(rows)}
        return strengths_sheet(told, columns, style)

    def _told(self, seeds: str) -> str:
        return f"seed{'s' * (len(self.settings.seeds) > 1)} {seeds}"

    def _all(self, prompts: Sequence[str], model: PeftModel, weights: Weights) -> list[Image.Image]:
        wishes = [Wish(prompt, seed, weights) for prompt in prompts for seed in self.settings.seeds]
        return self.painted(wishes, model, "drawing" if weights else "drawing with the base", own=not weights)


@contextmanager
def at_hand(family: Family, resting: Sequence[str], device: torch.device) -> Iterator[None]:
    """Inside, all parts are on the device; those that rest go back to main memory after."""
    family.move(resting, device)
    try:
        yield
    finally:
        family.move(resting, torch.device("cpu"))
