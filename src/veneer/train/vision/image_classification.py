"""The task `image-classification`: a class for a picture."""

from collections.abc import Sequence
from random import Random
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from veneer.core.errors import AdapterError
from veneer.train.bases.heads import load_config
from veneer.train.data.labels import numbered_names, numbers_of, written
from veneer.train.data.pictures import Pictures, Said, counted
from veneer.train.drawing.sheet import Shown, small
from veneer.train.vision.picture_task import PictureTask, Seen
from veneer.train.vision.settings import ClassificationRecipe

LABELS = ("label", "labels", "class", "category", "fine_label", "target")
MANY = 20  # pictures, from which on labels that mostly differ are no classes


class ImageClassification(PictureTask):
    """-log p(class | picture), summed over the pictures."""

    settings: ClassVar = ClassificationRecipe
    kind = "AutoModelForImageClassification"
    pipeline = "image-classification"
    asking = "predict {adapter} --picture {picture}"

    def where(self, held_out: bool) -> Said:
        return Said(LABELS, "label", self.data.label, of_folder=True)

    def settle_labels(self) -> None:
        data, part = self.data, self.part
        counts = counted(written(part.truth(index)) for index in range(len(part)))
        if not data.labels and len(counts) > len(part) / 2 and len(part) >= MANY:
            raise AdapterError(f"{part.source}: {len(counts):,} different labels of {len(part):,} are no classes")
        own = load_config(self.folder).id2label or {}
        data.labels = numbered_names(counts, data.labels, own)
        if len(data.labels) < 2:
            raise AdapterError(f"{part.source}: all pictures have the label {data.labels[0]!r}: nothing to learn")
        self.numbers = {name: number for number, name in enumerate(data.labels)} | numbers_of(data.labels, counts)
        if held := self.held_out:
            self.numbers |= numbers_of(data.labels, counted(written(held.truth(index)) for index in range(len(held))))

    def number(self, part: Pictures, index: int) -> int:
        """The number of a picture's class."""
        return self.numbers[written(part.truth(index))]

    def seen(self, part: Pictures, index: int, random: Random | None = None) -> Seen:
        picture = self.read(part.raw(index), part.place(index))
        label = torch.tensor(self.number(part, index))
        if random is None:
            return Seen(self.preparer.picture(picture), label, picture.size)
        box, flip = self.drawing(picture, random)
        if self.data.least == 1:
            pixels = self.preparer.picture(picture)
            return Seen(pixels.flip(-1) if flip else pixels, label, picture.size)
        return Seen(self.preparer.part(picture, box, flip), label, picture.size)

    def loss_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, reduction="sum")

    def units(self, labels: Tensor) -> int:
        return len(labels)

    def measured(self, part: Pictures, chosen: Sequence[int]) -> dict[str, float]:
        total, right = 0.0, 0
        for _, _, batch, logits in self.passes(part, chosen):
            labels = batch.inputs["labels"]
            total += self.loss_of(logits, labels).item()
            right += int((logits.argmax(1) == labels).sum())
        return {"eval_loss": total / len(chosen), "accuracy": right / len(chosen)}

    def says(self, picture: Image.Image) -> dict[str, Any]:
        logits = self.logits(self.preparer.picture(picture)[None].to(self.model.device))[0]
        probability, best = logits.softmax(0).max(0)
        return {"label": self.data.labels[int(best)], "probability": probability.item()}

    def shown(self, part: Pictures, index: int) -> tuple[dict[str, str], Shown]:
        picture = self.read(part.raw(index), part.place(index))
        said, label = self.says(picture), self.data.labels[self.number(part, index)]
        told = f"{said['label']} ({said['probability']:.2f})"
        drawn = Shown([small(picture)], [f"is {label}", f"said {told}"], said["label"] == label)
        return {**self.named(part, index), "label": label, "predicted": told}, drawn

    def look(self, index: int) -> list[tuple[str, bool]]:
        return [(f"{self.part.place(index)} → ", False), (self.data.labels[self.number(self.part, index)], True)]
