"""The task `text-to-image`: a denoiser, and perhaps the text encoders, learn pictures with captions."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from PIL import Image
from torch import Tensor

from veneer import zoo
from veneer.core.adapter import Adapter
from veneer.files.parts import is_text
from veneer.train.bases.loading import choose_device, choose_dtype
from veneer.train.data.reading import read_picture
from veneer.train.data.rows import evenly
from veneer.train.diffusion.cache import digest_of_given
from veneer.train.diffusion.captions import Captioned, read_captioned, read_class
from veneer.train.diffusion.draws import Moment
from veneer.train.diffusion.dreambooth import lacking, paint_class, partner
from veneer.train.diffusion.family import family_of
from veneer.train.diffusion.kept import adapter_of_parts, exchange, keep, written
from veneer.train.diffusion.material import Encoders, Item, batches, draw_of, is_still, told_of
from veneer.train.diffusion.objective import Objective
from veneer.train.diffusion.parts import adapted
from veneer.train.diffusion.samples import Samples, at_hand
from veneer.train.diffusion.settings import TextToImageRecipe
from veneer.train.drawing.sheet import write_picture
from veneer.train.sameness import digest_of_base
from veneer.train.task import Batch, Report, Reporter, Task

USE = """on a pipeline of diffusers:

```python
pipe.load_lora_weights("ADAPTER")
```"""


class TextToImage(Task):
    """w(t) · mean (answer(√ᾱ x + √(1-ᾱ) ε, t, caption) - target)², summed over pictures; in DreamBooth, of each with
    prior_weight times that of a picture of its class (Ruiz et al. 2022, arXiv:2208.12242).
    """

    settings: ClassVar = TextToImageRecipe
    pipeline = "text-to-image"
    unit = "pictures"
    asking = "generate {adapter} --prompt {prompt} --seed {seed} --out picture.png"
    library, python = "diffusers", USE
    drawn: Image.Image | None = None  # what `sample` has shown last
    resting: Sequence[str] = ()  # parts that are not needed at each step, in main memory

    def __init__(self, recipe: TextToImageRecipe, reporter: Reporter) -> None:
        self.recipe, self.reporter = recipe, reporter
        data, train = recipe.data, recipe.train
        device = self.device = choose_device(recipe.device)
        recipe.device = str(device)
        folder = self.folder = zoo.resolve(recipe.base)
        kind = family_of(folder)
        recipe.dtype = choose_dtype(recipe.dtype, device, folder / kind.denoiser)  # type: ignore[assignment]
        self.family = kind.load(folder, recipe.dtype, device)
        data.resolution = data.resolution or (self.family.resolution, self.family.resolution)
        self.objective = Objective(self.family.schedule(train), train)
        self.samples = Samples(self.family, self.objective.schedule, recipe.sample, data.resolution, reporter)
        sources = self._sources(data.resolution)
        torch.manual_seed(train.seed)  # which decides the adapter's starting values
        self.model = adapted(self.family, recipe.adapter, recipe.text_encoder)
        self.model.peft_config["default"].base_model_name_or_path = recipe.base
        written(self.adapter(), folder)  # what could not be kept is told before anything is learned
        encoders = Encoders(self.family, data, bool(recipe.text_encoder.r), reporter)
        self.part = encoders.material(sources[0], data.latents)
        self.held_out = encoders.material(sources[1], data.latents) if len(sources[1]) else None
        self.kind = encoders.material(sources[2]) if len(sources) > 2 else None
        self.size, self.groups = len(self.part), sources[0].groups()
        if device.type != "cpu":
            self.resting = self.idle()
            self.family.move(self.resting, torch.device("cpu"))

    @classmethod
    def looked_at(cls, recipe: TextToImageRecipe, reporter: Reporter) -> Self:
        """Class pictures that lack are not painted: others stand in for them."""
        data = recipe.data
        if not data.class_path or not (numbers := lacking(data)):
            return cls(recipe, reporter)
        reporter.say(f"{len(numbers):,} pictures of {data.class_prompt!r} would be painted into {data.class_path}")
        asked, data.class_path, data.class_prompt = (data.class_path, data.class_prompt), None, None
        task = cls(recipe, reporter)
        data.class_path, data.class_prompt = asked
        task.kind = task.part
        return task

    def _sources(self, resolution: tuple[int, int]) -> list[Captioned]:
        """The pictures to learn from, those held out, and those of the class if they are asked for."""
        data, factor = self.recipe.data, self.family.factor
        found = [*read_captioned(data, resolution, factor, self.recipe.train.seed, self.reporter)]
        if data.class_path:
            facts = {"base": digest_of_base(self.folder), **self.samples.facts()}
            paint_class(data, facts, self.samples.bare, 1, self.reporter)
            found.append(read_class(data, resolution, factor, self.reporter))
        return found

    def idle(self) -> list[str]:
        """The frozen parts whose work is done before the first step, as what they make is kept."""
        data, needed = self.recipe.data, {name for name, _ in self.model.named_children()}
        needed |= set() if data.cache else set(self.family.encoders)
        sources = [own for own in (self.part, self.held_out, self.kind) if own]
        needed |= set() if data.latents or (data.cache and all(map(is_still, sources))) else {self.family.seer}
        return [name for name in self.family.parts if name not in needed]

    def about(self) -> dict[str, str]:
        """What the adapter's file says of itself."""
        data = self.recipe.data
        said = {
            "base_model": self.recipe.base,
            "family": self.family.name,
            "modelspec.trigger_phrase": data.trigger,
            "instance_prompt": data.instance_prompt,
            "modelspec.resolution": "x".join(map(str, data.resolution or ())),
            "modelspec.prediction_type": self.objective.schedule.prediction,
        }
        return {key: text for key, text in said.items() if text}

    def adapter(self) -> Adapter:
        """The adapter, as files have it."""
        return adapter_of_parts(self.model, self.about())

    def save(self, folder: Path) -> None:
        keep(self.adapter(), folder)

    def load(self, folder: Path) -> None:
        exchange(self.model, folder)

    def batches(self, rows: Sequence[int]) -> list[Batch]:
        self.samples.after = []  # what a step learns is not on them
        turns = self.turns if len(self.turns) == len(rows) else [0] * len(rows)
        strata = self.strata if len(self.strata) == len(rows) else [(0, 1)] * len(rows)
        moments = [Moment(self.step, *own) for own in zip(turns, strata, strict=True)]
        items = [item for row, moment in zip(rows, moments, strict=True) for item in self._learned(row, moment)]
        return batches(items, self.family, self.device)

    def _learned(self, row: int, moment: Moment) -> list[Item]:
        """A picture, and one of its class beside it, as they are learned this time."""
        found = [self.part.learned(self.objective, row, moment)]
        if self.kind:
            seed, weight = self.recipe.train.seed, self.recipe.data.prior_weight
            number = self.size + row  # which no picture of `path` has
            other = partner(seed, self.step, number + self.size * moment.turn, len(self.kind))
            found.append(self.kind.learned(self.objective, other, moment, number, weight))
        return found

    def rates(self) -> dict[str, float]:
        own = self.recipe.text_encoder
        return {name: own.lr for name, _ in self.model.named_children() if own.lr and is_text(name)}

    def loss(self, batch: Batch) -> Tensor:
        losses = self._losses(batch, self.objective) * batch.inputs["share"]
        return losses.sum()

    def _losses(self, batch: Batch, objective: Objective) -> Tensor:
        """Of each picture."""
        x, draw = batch.inputs["x"], draw_of(batch)
        answer = self.model(objective.noisy(x, draw), draw.t, told_of(batch), batch.inputs["sizes"])
        return objective.loss(answer, x, draw)

    @torch.no_grad()
    def evaluate(self, whole: bool) -> dict[str, float]:
        """The held-out loss; and of the whole, where it is asked for, how the drawn pictures look."""
        looks = whole and self.recipe.eval.looks and self.family.draws and self.prompts()
        return {**self._held_out_loss(), **(self._looks() if looks else {})}

    def _held_out_loss(self) -> dict[str, float]:
        """The mean square of what the denoiser is off, at fixed timesteps and noises."""
        if self.held_out is None:
            return {}
        own, objective = self.recipe.eval, self.objective.measured()
        rows = evenly(range(len(self.held_out)), own.rows or len(self.held_out))
        was_training = self.model.training
        self.model.eval()
        total, count, times = 0.0, 0, own.timesteps
        items = (
            item
            for number, row in enumerate(rows)
            for item in self.held_out.measured(objective, row, len(rows), number, times)
        )
        while some := list(islice(items, self.recipe.train.batch_size)):
            for batch in batches(some, self.family, self.device):
                total += self._losses(batch, objective).sum().item()
            count += len(some)
            self.reporter.progress("held-out pictures", count // times, len(rows))
        self.model.train(was_training)
        return {"eval_loss": total / count}

    def _looks(self) -> dict[str, float]:
        with at_hand(self.family, self.resting, self.device):
            return self.samples.looks(self.prompts(), self.model, self.style(), self._differs())

    def _differs(self) -> bool:
        """Whether an adapter acts that is no longer as it began."""
        own = self.model.get_adapter("default").tensors.values() if self.model.active_adapters else ()
        return any(bool(tensors["B"].any()) if "B" in tensors else True for tensors in own)

    def style(self) -> list[Image.Image]:
        """The pictures that the drawn ones ought to look like."""
        part = (self.held_out or self.part).part
        rows = evenly(range(len(part)), self.recipe.eval.rows or len(part))
        return [read_picture(part.pictures.raw(row), part.place(row)) for row in rows]

    def prompts(self) -> list[str]:
        """What is drawn: the recipe's prompts, or captions of held-out pictures, or else of those that are learned."""
        own = self.recipe.sample
        part = (self.held_out or self.part).part
        usual = list(dict.fromkeys(part.caption(row) for row in range(len(part))))
        return own.prompts or evenly(usual, own.count)

    def sample(self) -> list[dict[str, str]]:
        prompts = self.prompts()
        with at_hand(self.family, self.resting, self.device):
            style = self.style() if self.recipe.sample.strengths else []
            self.drawn = self.samples.sheet(prompts, self.model, style) if prompts else None
        seed = str(self.recipe.sample.seeds[0])
        return [{"prompt": prompt, "seed": seed} for prompt in prompts] if self.drawn else []

    def draw(self, path: Path) -> bool:
        return write_picture(self.drawn, path)

    def facts(self) -> dict[str, Any]:
        held_out = f"{len(self.held_out):,} are held out" if self.held_out else "none are held out"
        told = [f"{self.size:,} pictures are learned from, {held_out}."]
        told += [self.part.part.shapes()]
        told += (
            [f"{len(self.kind):,} pictures of its class stand beside them."]
            if self.kind and self.kind is not self.part
            else []
        )
        part = self.part.part
        looks = [[(f"{part.place(row)} → ", False), (part.caption(row), True)] for row in evenly(range(self.size), 3)]
        return {"report": Report(told), "looks": looks}

    def made_of(self) -> dict[str, str]:
        sources = {"rows": self.part, "held-out rows": self.held_out, "class pictures": self.kind}
        digests = {name: own.part.digest() for name, own in sources.items() if own}
        if self.recipe.data.latents:
            digests["latents"] = digest_of_given(self.recipe.data.latents)
        return {**digests, "base": digest_of_base(self.folder)}

    def usage(self) -> dict[str, Any]:
        told = ("trigger", "instance_prompt", "resolution")
        data = self.recipe.data.model_dump(mode="json", include=set(told), exclude_none=True)
        sample = self.recipe.sample.model_dump(
            mode="json", include={"negative_prompt", "steps", "guidance", "guidance_rescale", "width", "height"}
        )
        sample |= {"width": self.samples.sampling.width, "height": self.samples.sampling.height}
        more = {"sample": sample, "scheduler": self.objective.schedule.sampling()}
        return {"task": self.recipe.task, "base": self.recipe.base, "family": self.family.name, "data": data, **more}
