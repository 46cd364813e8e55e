"""The task `text-to-image`: a denoiser, and perhaps the text encoders, learn pictures with captions."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import batched
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from veneer import zoo
from veneer.core.errors import AdapterError
from veneer.safe.whole import write_whole
from veneer.train.bases.loading import choose_device, choose_dtype
from veneer.train.data.rows import evenly
from veneer.train.diffusion.captions import Captioned, read_captioned, read_class
from veneer.train.diffusion.family import family_of
from veneer.train.diffusion.kept import loaded, saved
from veneer.train.diffusion.material import Encoders, Item, Material, batches, draw_of, told_of
from veneer.train.diffusion.objective import Objective
from veneer.train.diffusion.painter import Sampling, Wish, paint
from veneer.train.diffusion.parts import adapted
from veneer.train.diffusion.settings import TextToImageRecipe
from veneer.train.drawing.sheet import Shown, sheet, small
from veneer.train.sameness import digest_of_base
from veneer.train.task import Batch, Reporter, Task

USE = """on a pipeline of diffusers:

```python
pipe.load_lora_weights("ADAPTER")
```"""


@dataclass(frozen=True)
class Report:
    """What the pictures are, for people."""

    told: list[str]

    def sentences(self) -> list[str]:
        return self.told


class TextToImage(Task):
    """w(t) · mean (answer(√ᾱ x + √(1-ᾱ) ε, t, caption) - target)², summed over pictures; in DreamBooth, of each with
    prior_weight times that of a picture of its class (Ruiz et al. 2022, arXiv:2208.12242).
    """

    settings: ClassVar = TextToImageRecipe
    pipeline = "text-to-image"
    asking = "generate {adapter} --prompt {prompt} --seed {seed} --out picture.png"
    library, python, sampled = "diffusers", USE, "A picture"

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
        self.schedule = self.family.schedule(train)
        self.objective = Objective(self.schedule, train)
        read = data, data.resolution, self.family.factor
        part, held_out = read_captioned(*read, train.seed, reporter)
        self.size = len(part)
        torch.manual_seed(train.seed)  # which decides the adapter's starting values
        self.model = adapted(self.family, recipe.adapter, recipe.text_encoder)
        saved(self.model, self.about(), None)  # what could not be kept is told before anything is learned
        self._paint: Any = None
        self.bare: list[Image.Image] = []  # the base's own pictures of the samples, once they were drawn
        self.drawn: list[Shown] = []
        self.pictures = part
        if data.class_path:
            self._make_class_pictures()
        encoders = Encoders(self.family, data, bool(recipe.text_encoder.r), reporter)
        self.part = encoders.material(part, data.latents)
        self.held_out = encoders.material(held_out) if len(held_out) else None
        self.kind = encoders.material(read_class(*read, reporter)) if data.class_path else None
        self._rest()

    def about(self) -> dict[str, str]:
        """What the adapter's file says of itself."""
        data, width_height = self.recipe.data, self.recipe.data.resolution or ()
        said = {"base_model": self.recipe.base, "family": self.family.name, "modelspec.trigger_phrase": data.trigger}
        said |= {"modelspec.resolution": "x".join(map(str, width_height)), "instance_prompt": data.instance_prompt}
        return {key: text for key, text in said.items() if text}
