"""Pictures become what a base is given, as its own image processor says; and random parts of them, to learn from."""

import math
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from veneer.core.errors import AdapterError
from veneer.train.bases.loading import LOCAL, first_line, quiet
from veneer.train.data.reading import Mask

Box = tuple[int, int, int, int]  # left, top, right, bottom
RATIOS = (3 / 4, 4 / 3)  # of the sides of a random part
NEAREST = Image.Resampling.NEAREST


class Preparer:
    """The base's image processor, on pillow: the same numbers on every machine."""

    def __init__(self, folder: Path, side: int | None, channels: int = 3, whole: bool = False) -> None:
        """With `side` the pictures become squares of that side. `whole`: they are resized, and never cropped."""
        self.folder, self.mode = folder, "L" if channels == 1 else "RGB"
        self.processor: Any = self._read()
        more = {"do_center_crop": False} if whole and getattr(self.processor, "do_center_crop", None) else {}
        if side or more:
            self.processor = self._read(**more, **(self._side(side) if side else {}))
        if (size := self._size(96, 64)) != self._size(64, 96):  # shapes of pictures, which cannot be put together
            square = {"height": min(size), "width": min(size)}
            self.processor = self._read(**more, size=square)
            size = self._size(96, 64)
        self.size = size  # height, width

    def _read(self, **changed: Any) -> Any:
        from transformers import AutoImageProcessor

        try:
            with quiet():
                return AutoImageProcessor.from_pretrained(self.folder, backend="pil", **LOCAL, **changed)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise AdapterError(
                f"base {self.folder} does not say how pictures are prepared (preprocessor_config.json): "
                f"{first_line(error)}"
            ) from error

    def _side(self, side: int) -> dict[str, Any]:
        own, square = self.processor.size, {"height": side, "width": side}
        shortest = getattr(own, "shortest_edge", None) and not getattr(own, "height", None)
        cropped = {"crop_size": square} if getattr(self.processor, "crop_size", None) else {}
        return {"size": {"shortest_edge": side} if shortest else square, **cropped}

    def _size(self, width: int, height: int) -> tuple[int, int]:
        pixels = self.picture(Image.new(self.mode, (width, height)))
        return pixels.shape[-2], pixels.shape[-1]

    def picture(self, picture: Image.Image) -> Tensor:
        """As the base is measured with it, `(channels, height, width)`."""
        try:
            return self._tensor(self.processor([picture], return_tensors="pt"))
        except (ValueError, AttributeError, TypeError) as error:
            raise AdapterError(f"base {self.folder}: its image processor fails: {first_line(error)}") from error

    def part(self, picture: Image.Image, box: Box, flip: bool) -> Tensor:
        """A part of the picture, in the same size and scale."""
        method = getattr(self.processor, "resample", None)
        own = picture.resize(self.size[::-1], Image.Resampling.BILINEAR if method is None else method, box)
        own = own.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else own
        options = {"do_resize": False, "do_center_crop": False, "return_tensors": "pt"}
        return self._tensor(self.processor([own], **options))

    def mask(self, mask: Mask, box: Box | None = None, flip: bool = False) -> Tensor:
        """The numbers of the pixels of the picture, or of its part, `(height, width)`."""
        own = Image.fromarray(mask.astype(np.int32)).resize(self.size[::-1], NEAREST, box)
        numbers = np.asarray(own.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else own)
        return torch.from_numpy(numbers.astype(np.int64))

    @staticmethod
    def _tensor(found: Any) -> Tensor:
        pixels: Tensor = found["pixel_values"]
        return pixels[0].float()


def random_part(width: int, height: int, least: float, random: Random, shape: float = 1.0) -> Box:
    """A part with a share of the area between `least` and 1, and sides of a ratio between 3/4 and 4/3 times `shape`
    (Szegedy et al. 2015, arXiv:1409.4842); all of it where none fits.
    """
    for _ in range(10):
        area = width * height * random.uniform(least, 1)
        ratio = shape * math.exp(random.uniform(*map(math.log, RATIOS)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            return left, top, left + w, top + h
    return 0, 0, width, height
