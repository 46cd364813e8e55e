"""The task `semantic-segmentation`: a class for each pixel of a picture."""

from collections.abc import Sequence
from random import Random
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from veneer.core.errors import AdapterError, listed
from veneer.train.bases.heads import load_config
from veneer.train.data.pictures import Pictures, Said
from veneer.train.data.reading import Mask, read_mask
from veneer.train.drawing.sheet import Shown, colour_of, painted, small
from veneer.train.vision.picture_task import PictureTask, Seen
from veneer.train.vision.settings import SegmentationRecipe

MASKS = ("mask", "masks", "annotation", "label", "labels", "segmentation", "mask_file_name", "mask_file")
NONE = -1  # stands for pixels that have no class
NUMBERS = 2**24  # of logits in the size of a picture that are held at once


class SemanticSegmentation(PictureTask):
    """-log p(class | pixel of a picture), summed over the pixels that have one."""

    settings: ClassVar = SegmentationRecipe
    kind = "AutoModelForSemanticSegmentation"
    whole = True
    pipeline = "image-segmentation"
    asking = "predict {adapter} --picture {picture} --out masks"

    def where(self, held_out: bool) -> Said:
        data = self.data
        same = data.eval_masks is None and data.eval_path == data.path
        masks = data.eval_masks if held_out and not same else data.masks
        return Said(MASKS, "mask", data.mask, masks, is_picture=True)

    def settle_labels(self) -> None:
        if self.data.labels:
            return
        found = set[int]()
        for done in range(len(self.part)):
            found.update(np.unique(self.mask(self.part, done)).tolist())
            if done % 64 == 63 or done == len(self.part) - 1:
                self.reporter.progress("masks: reading", done + 1, len(self.part))
        found -= {NONE}
        most = max(found, default=0) + 1
        if most < 2:
            raise AdapterError(f"{self.part.source}: its masks have {len(found)} class: nothing to learn")
        own = load_config(self.folder).id2label or {}
        named = len(own) == most and [own[i] for i in sorted(own)]
        self.data.labels = named or [f"class {number}" for number in range(most)]

    def mask(self, part: Pictures, index: int) -> Mask:
        """The numbers of the classes, from 0; `NONE` where a pixel has none."""
        numbers = read_mask(part.truth(index), f"the mask of {part.place(index)}")
        return np.where(numbers == self.data.ignore_index, NONE, numbers - self.data.reduce_labels)

    def both(self, part: Pictures, index: int) -> tuple[Image.Image, Mask]:
        """A picture and its mask. Raises `AdapterError` where they do not fit each other or the classes."""
        picture, mask = self.read(part.raw(index), part.place(index)), self.mask(part, index)
        if picture.size != mask.shape[::-1]:
            raise AdapterError(
                f"{part.place(index)} has {picture.width}×{picture.height} points, and its mask "
                f"{mask.shape[1]}×{mask.shape[0]}"
            )
        used = np.unique(mask[mask != NONE])
        if strange := used[used >= len(self.data.labels)].tolist():
            raise AdapterError(
                f"the mask of {part.place(index)} has the numbers {listed(strange)}: expected those of "
                f"{len(self.data.labels)} classes, from 0, and {self.data.ignore_index} for none (data.ignore_index)"
            )
        if not len(used):
            raise AdapterError(f"the mask of {part.place(index)} has no pixel with a class")
        return picture, mask

    def seen(self, part: Pictures, index: int, random: Random | None = None) -> Seen:
        picture, mask = self.both(part, index)
        if random is None:
            return Seen(self.preparer.picture(picture), self.preparer.mask(mask), picture.size)
        box, flip = self.drawing(picture, random)
        if (mask[box[1] : box[3], box[0] : box[2]] == NONE).all():
            box = (0, 0, *picture.size)
        return Seen(self.preparer.part(picture, box, flip), self.preparer.mask(mask, box, flip), picture.size)

    def loss_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        large = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
        return F.cross_entropy(large, labels, ignore_index=NONE, reduction="sum")

    def units(self, labels: Tensor) -> int:
        return int((labels != NONE).sum())

    def measured(self, part: Pictures, chosen: Sequence[int]) -> dict[str, float]:
        classes, total, units = len(self.data.labels), 0.0, 0
        table = np.zeros((classes, classes), np.int64)  # (true, said): pixels
        for own, _, batch, logits in self.passes(part, chosen):
            total += self.loss_of(logits, batch.inputs["labels"]).item()
            units += batch.units
            for index, each in zip(own, logits, strict=True):
                mask = self.mask(part, index)
                table += confusion(mask, largest(each, mask.shape), classes)
        return {"eval_loss": total / max(1, units), **figures(table)}

    def said_of(self, picture: Image.Image) -> Mask:
        """The class of each pixel of the picture."""
        logits = self.logits(self.preparer.picture(picture)[None].to(self.model.device))[0]
        return largest(logits, (picture.height, picture.width))

    def says(self, picture: Image.Image) -> dict[str, Any]:
        numbers, counts = np.unique(said := self.said_of(picture), return_counts=True)
        shares = {self.data.labels[number]: count / said.size for number, count in zip(numbers, counts, strict=True)}
        return {"mask": said, "shares": shares}

    def shown(self, part: Pictures, index: int) -> tuple[dict[str, str], Shown]:
        picture, mask = self.both(part, index)
        said = self.said_of(picture)
        classes = len(self.data.labels)
        own = figures(confusion(mask, said, classes))
        told = f"mean IoU {own['mean_iou']:.2f}, {own['pixel_accuracy']:.0%} of the pixels right"
        used = np.unique(np.stack([mask, said])).tolist()
        colours = [(self.data.labels[number], colour_of(number)) for number in used if number != NONE]
        pictures = [small(own) for own in (picture, painted(mask, classes), painted(said, classes))]
        return {**self.named(part, index), "predicted": told}, Shown(
            pictures, [part.place(index), f"the picture, its mask, what is said: {told}"], None, colours
        )

    def look(self, index: int) -> list[tuple[str, bool]]:
        used = [n for n in np.unique(self.mask(self.part, index)).tolist() if n != NONE]
        return [(f"{self.part.place(index)} → ", False), (listed((self.data.labels[n] for n in used), say=str), True)]


def largest(logits: Tensor, size: tuple[int, ...]) -> Mask:
    """The class with the largest of the logits `(classes, h, w)` at each pixel of that size `(height, width)`; some
    classes after the other, so that what is held stays bounded.
    """
    height, width = size
    few = max(1, NUMBERS // (height * width))
    best, found = torch.empty(0), torch.empty(0)
    for start in range(0, len(logits), few):
        own = logits[None, start : start + few]
        values, numbers = F.interpolate(own, size=(height, width), mode="bilinear", align_corners=False)[0].max(0)
        better = values > best if start else torch.ones_like(values, dtype=torch.bool)
        best = torch.where(better, values, best) if start else values
        found = torch.where(better, numbers + start, found) if start else numbers
    return found.cpu().numpy().astype(np.int64)


def confusion(true: Mask, said: Mask, classes: int) -> "np.ndarray[Any, np.dtype[np.int64]]":
    """How many pixels of each class `(true, said)`; those without a class are left out."""
    used = true != NONE
    return np.bincount(true[used] * classes + said[used], minlength=classes**2).reshape(classes, classes)


def figures(table: "np.ndarray[Any, np.dtype[np.int64]]") -> dict[str, float]:
    """IoU = TP / (TP + FP + FN), the mean over the classes that are there or said; and the share of right pixels."""
    right, either = np.diag(table), table.sum(0) + table.sum(1) - np.diag(table)
    there = either > 0
    return {
        "mean_iou": float((right[there] / either[there]).mean()) if there.any() else 0.0,
        "pixel_accuracy": float(right.sum() / max(1, table.sum())),
    }
