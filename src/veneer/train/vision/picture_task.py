"""What the tasks on pictures share: a base with a head, pictures, and what is said of them."""

import os
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from veneer import zoo
from veneer.core.errors import AdapterError, collapsed, listed
from veneer.core.model import get_peft_model
from veneer.train.bases.heads import load_config
from veneer.train.bases.loading import choose_device, choose_dtype
from veneer.train.data.pictures import Pictures, Said, read_sides
from veneer.train.data.reading import Raw, read_picture
from veneer.train.data.rows import evenly
from veneer.train.data.settings import RowsData
from veneer.train.drawing.sheet import Shown, write_sheet
from veneer.train.sameness import digest_of_base
from veneer.train.task import Batch, Report, Reporter, Task
from veneer.train.vision.model import load_seeing, options_for, scaling, still
from veneer.train.vision.preparing import Box, Preparer, random_part

AT_ONCE = 16  # pictures that go through the model where nothing is learned
TRIED = 1000  # pictures that are read before the training, evenly spread; the others when they come up


@dataclass(frozen=True)
class Seen:
    """A picture with what is said of it, and what is learned of it this time."""

    pixels: Tensor  # (channels, height, width)
    label: Tensor  # of the picture, or of each of its pixels (height, width)
    size: tuple[int, int]  # width and height of the picture itself


class PictureTask(Task):
    """-log p(class | picture), summed over pictures or pixels."""

    kind: ClassVar[str]  # transformers' class
    unit = "pictures"
    whole: ClassVar[bool] = False  # pictures are never cropped to be measured
    data: Any
    drawn: Sequence[Shown] = ()  # what `sample` has shown last

    def __init__(self, recipe: Any, reporter: Reporter) -> None:
        self.recipe, self.reporter, self.data = recipe, reporter, recipe.data
        device = choose_device(recipe.device)
        recipe.device = str(device)
        self.part, held_out = read_sides(self.data, recipe.train.seed, self.where)
        self.held_out = held_out if len(held_out) else None
        folder = self.folder = zoo.resolve(recipe.base)
        self.settle_labels()
        recipe.dtype = choose_dtype(recipe.dtype, device, folder)
        torch.manual_seed(recipe.train.seed)  # which decides the head
        heads = self._load(folder, recipe.dtype, device, recipe.quantization)
        self.size = len(self.part)
        for name, part in (("pictures", self.part), ("held-out pictures", held_out)):
            self._try(name, part)
        if self.new:
            self._scale(heads)
        self.judged_by = "eval_loss" if recipe.eval.judge == "loss" else recipe.eval.judge
        self.higher_is_better = recipe.eval.judge != "loss"
        self._adapt(heads)

    def _load(self, folder: Path, dtype: str | None, device: torch.device, quantization: str = "none") -> list[str]:
        """Load processor and model; the modules that start at random."""
        channels = getattr(load_config(folder), "num_channels", 3)
        self.preparer = Preparer(folder, self.data.size, channels, self.whole)
        model, heads, self.new = load_seeing(folder, self.kind, dtype, device, quantization, self.data.labels)
        self.model: Any = model
        self.still = still(model)
        self.options = options_for(model, self.preparer.size)
        self.threads = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
        return heads

    def _adapt(self, heads: list[str]) -> None:
        recipe = self.recipe
        if heads:
            self.reporter.say(f"{collapsed(heads)} start at random: trained whole, and saved with the adapter")
        recipe.adapter.modules_to_save = sorted({*(recipe.adapter.modules_to_save or []), *heads}) or None
        self.model = get_peft_model(self.model, recipe.adapter)
        self.model.peft_config["default"].base_model_name_or_path = recipe.base

    @classmethod
    def bare(cls, data: Any, folder: Path, dtype: str | None, device: torch.device) -> "PictureTask":
        """The base with a head, without pictures and without an adapter yet: to be used, or merged."""
        task = cls.__new__(cls)
        task.data, task.reporter, task.folder = data, Reporter(), folder
        task._load(folder, dtype, device)
        return task

    @property
    def processor(self) -> Any:
        """What prepares pictures for the base."""
        return self.preparer.processor

    @abstractmethod
    def where(self, held_out: bool) -> Said:
        """Where what is said of the pictures is."""

    @abstractmethod
    def settle_labels(self) -> None:
        """Say in `data` what the classes are."""

    @abstractmethod
    def seen(self, part: Pictures, index: int, random: Random | None = None) -> Seen:
        """A picture as it is measured; or, with `random`, as it is learned this time."""

    @abstractmethod
    def loss_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss summed over what is learned."""

    @abstractmethod
    def units(self, labels: Tensor) -> int:
        """What the loss of these is averaged over."""

    @abstractmethod
    def measured(self, part: Pictures, chosen: Sequence[int]) -> dict[str, float]:
        """The held-out figures."""

    @abstractmethod
    def shown(self, part: Pictures, index: int) -> tuple[dict[str, str], Shown]:
        """A held-out picture, its label and what the model says of it: as words, and as a picture."""

    @abstractmethod
    def says(self, picture: Image.Image) -> dict[str, Any]:
        """What the model says of a picture."""

    def read(self, raw: Raw, place: str) -> Image.Image:
        """The picture, in the colours that the base is given."""
        return read_picture(raw, place, self.preparer.mode)

    def named(self, part: Pictures, index: int) -> dict[str, str]:
        """A picture by its file, or by its row where it is in a table."""
        raw = part.raw(index)
        return {"row": part.place(index)} if isinstance(raw, bytes) else {"picture": str(raw)}

    def drawing(self, picture: Image.Image, random: Random) -> tuple[Box, bool]:
        """The part of the picture that is learned this time, and whether it is turned left to right."""
        shape = picture.width / picture.height if self.whole else 1.0  # which are measured out of shape, as squares
        box = random_part(*picture.size, self.data.least, random, shape)
        return box, self.data.flip and random.random() < 0.5

    def _try(self, name: str, part: Pictures) -> None:
        """Read some pictures, all where they are few. Raises `AdapterError` that names all that cannot be used."""
        chosen, problems = evenly(range(len(part)), TRIED), list[str]()
        for done, problem in enumerate(self.threads.map(lambda index: self._problem(part, index), chosen), 1):
            problems += [problem] if problem else []
            if done % 64 == 0 or done == len(chosen):
                self.reporter.progress(f"{name}: reading", done, len(chosen))
        if problems:
            raise AdapterError(listed(problems, say=str, between="; "))

    def _problem(self, part: Pictures, index: int) -> str | None:
        try:
            self.seen(part, index)
        except AdapterError as error:
            return str(error)
        return None

    def _scale(self, heads: list[str]) -> None:
        """Let what starts at random have outputs of the size that its normalisations would give them."""
        chosen = evenly(range(len(self.part)), AT_ONCE)
        pixels = torch.stack([self.seen(self.part, index).pixels for index in chosen])
        self.model.eval()
        with torch.no_grad(), scaling(self.model, heads, self.new):
            self.logits(pixels.to(self.model.device))

    def batches(self, rows: Sequence[int]) -> list[Batch]:
        seed = self.recipe.train.seed

        def learned(row: int) -> Seen:
            return self.seen(self.part, row, Random(f"{seed} {self.step} {row}"))

        return [self._batch(self.part, rows, list(self.threads.map(learned, rows)))]

    def _batch(self, part: Pictures, rows: Sequence[int], seen: Sequence[Seen]) -> Batch:
        labels = torch.stack([own.label for own in seen])
        pixels = torch.stack([own.pixels for own in seen])
        inputs = {"pixel_values": pixels.to(self.model.device), "labels": labels.to(self.model.device)}
        return Batch(inputs, self.units(labels), len(rows), [part.place(row) for row in rows])

    def logits(self, pixels: Tensor) -> Tensor:
        """What the model says, in float32: `(pictures, classes)`, or `(pictures, classes, height, width)`."""
        for module in self.still:
            module.eval()
        logits: Tensor = self.model(pixel_values=pixels.to(self.model.dtype), **self.options).logits
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def loss(self, batch: Batch) -> Tensor:
        return self.loss_of(self.logits(batch.inputs["pixel_values"]), batch.inputs["labels"])

    @torch.no_grad()
    def evaluate(self, whole: bool) -> dict[str, float]:
        if self.held_out is None:
            return {}
        most = self.recipe.eval.rows or len(self.held_out)
        was_training = self.model.training
        self.model.eval()
        figures = self.measured(self.held_out, evenly(range(len(self.held_out)), most))
        self.model.train(was_training)
        return figures

    def passes(
        self, part: Pictures, chosen: Sequence[int]
    ) -> Iterator[tuple[Sequence[int], list[Seen], Batch, Tensor]]:
        """The chosen pictures, some at once, with what the model says of them."""
        for start in range(0, len(chosen), AT_ONCE):
            own = chosen[start : start + AT_ONCE]
            seen = list(self.threads.map(lambda index: self.seen(part, index), own))
            batch = self._batch(part, own, seen)
            yield own, seen, batch, self.logits(batch.inputs["pixel_values"])
            self.reporter.progress("held-out pictures", start + len(own), len(chosen))

    @torch.no_grad()
    def sample(self) -> list[dict[str, str]]:
        if self.held_out is None:
            return []
        was_training = self.model.training
        self.model.eval()
        chosen = evenly(range(len(self.held_out)), self.recipe.sample.count)
        found = [self.shown(self.held_out, index) for index in chosen]
        self.model.train(was_training)
        self.drawn = [drawn for _, drawn in found]
        return [told for told, _ in found]

    def draw(self, path: Path) -> bool:
        return write_sheet(self.drawn, path)

    def facts(self) -> dict[str, Any]:
        height, width = self.preparer.size
        held_out = f"{len(self.held_out):,} are held out" if self.held_out else "none are held out"
        labels = self.data.labels
        told = [
            f"{self.size:,} pictures are learned from, {held_out}; the model is given {width}×{height} points.",
            f"{len(labels)} classes: {listed(labels, 20, say=str)}.",
        ]
        looks = [self.look(index) for index in evenly(range(self.size), 3)]
        return {"report": Report(told), "looks": looks}

    @abstractmethod
    def look(self, index: int) -> list[tuple[str, bool]]:
        """A picture to learn from as runs of text, each with whether it is what is learned."""

    def made_of(self) -> dict[str, str]:
        held_out = {"held-out rows": self.held_out.digest()} if self.held_out else {}
        return {"rows": self.part.digest(), **held_out, "base": digest_of_base(self.folder)}

    def usage(self) -> dict[str, Any]:
        own = set(RowsData.model_fields) | {"masks", "eval_masks", "image"}
        data = self.data.model_dump(exclude=own, exclude_none=True)
        return {"task": self.recipe.task, "base": self.recipe.base, "data": data}
