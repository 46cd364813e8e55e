"""Which part of a picture is learned, and in what size.

A bucket is a size (width, height) of about the area of the resolution; a picture goes to the one whose ratio is nearest
to its own (NovelAI's aspect-ratio bucketing; SDXL, arXiv:2307.01952, section 2.3), is resized to cover it and cropped.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from random import Random

import torch
from PIL import Image
from torch import Tensor

from veneer.core.errors import AdapterError
from veneer.train.diffusion.data_settings import CaptionedData

Size = tuple[int, int]  # width, height


@dataclass(frozen=True)
class View:
    """A picture of the size `original`, resized to `resized`, cropped to `target` at (left, top), and turned left to
    right with `flip`.
    """

    original: Size
    resized: Size
    target: Size
    left: int
    top: int
    flip: bool = False

    @property
    def box(self) -> tuple[float, float, float, float]:
        """The part of the original picture: left, top, right, bottom."""
        (w, h), (across, down), (width, height) = self.original, self.resized, self.target
        left, top = self.left * w / across, self.top * h / down
        return left, top, min(w, left + width * w / across), min(h, top + height * h / down)

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """What SDXL is told: original height and width, top and left of the crop, target height and width. Where the
        picture is turned, left is counted in the turned picture.
        """
        left = self.resized[0] - self.target[0] - self.left if self.flip else self.left
        return (*self.original[::-1], self.top, left, *self.target[::-1])

    @property
    def lost(self) -> float:
        """The share of the picture that is cut off."""
        return 1 - self.target[0] * self.target[1] / (self.resized[0] * self.resized[1])

    @property
    def enlarged(self) -> float:
        """How many times longer a side has become."""
        return max(self.resized[0] / self.original[0], self.resized[1] / self.original[1])

    def pixels(self, picture: Image.Image) -> Tensor:
        """The part `(3, height, width)` in [-1, 1]."""
        part = picture.resize(self.target, Image.Resampling.LANCZOS, self.box)
        if self.flip:
            part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        points = torch.frombuffer(bytearray(part.tobytes()), dtype=torch.uint8)
        width, height = self.target
        return points.view(height, width, 3).permute(2, 0, 1).float() / 127.5 - 1


class Frame:
    """The sizes that pictures are learned in, and how they get there."""

    def __init__(self, data: CaptionedData, resolution: Size, multiple: int) -> None:
        """`resolution`: the base's own, where the recipe says none; `multiple`: what sides must be multiples of, the
        pixels of a latent point. Raises `AdapterError`.
        """
        resolution = data.resolution or resolution
        self.resolution, self.random, self.flip = resolution, data.crop == "random", data.flip
        self.own, self.step, self.largest = data.buckets, 1, max(resolution)
        if self.own is None:
            if any(side % multiple for side in resolution):
                raise AdapterError(
                    f"data.resolution={list(resolution)}: expected multiples of {multiple} for this base"
                )
            self.sizes: tuple[Size, ...] = (resolution,)
            return
        usual = 8 if min(resolution) < 256 else 64
        self.step = self.own.step or math.ceil(usual / multiple) * multiple
        if self.step % multiple:
            raise AdapterError(f"data.buckets.step={self.step}: expected a multiple of {multiple} for this base")
        smallest = self.own.smallest or min(resolution) // 2
        self.largest = self.own.largest or 2 * max(resolution)
        self.sizes = tuple(bucket_sizes(resolution, self.step, smallest, self.largest))

    def target(self, original: Size) -> Size:
        """The size that a picture is learned in."""
        size = nearest_size(original, self.sizes)
        if self.own is None or self.own.upscale or (size[0] <= original[0] and size[1] <= original[1]):
            return size
        return self._inside(original)

    def _inside(self, original: Size) -> Size:
        """The largest size in the picture itself that is no larger than buckets are; 0 where it is less than a step."""
        width, height = (min(side, self.largest) // self.step * self.step for side in original)
        most = self.resolution[0] * self.resolution[1] // max(1, min(width, height)) // self.step * self.step
        return min(width, most), min(height, most)

    def view(self, original: Size, random: Random | None = None) -> View:
        """How a picture of that size is learned this time; without `random`, its middle as it is."""
        view = centred(original, self.target(original))
        if random is None:
            return view
        across, down, turn = random.random(), random.random(), random.random() < 0.5
        if self.random:
            left = int(across * (view.resized[0] - view.target[0] + 1))
            view = replace(view, left=left, top=int(down * (view.resized[1] - view.target[1] + 1)))
        return replace(view, flip=self.flip and turn)

    def still(self, originals: Iterable[Size]) -> bool:
        """Whether pictures of these sizes are always seen in the same part."""
        return not self.random or all(view.resized == view.target for view in map(self.view, originals))


def bucket_sizes(resolution: Size, step: int, smallest: int, largest: int) -> list[Size]:
    """All sizes of multiples of `step` between `smallest` and `largest`, with at most the resolution's area, that
    could not be a step higher or a step wider. Raises `AdapterError` where there are none.
    """
    area = resolution[0] * resolution[1]
    sides = [side for side in range(step, largest + 1, step) if side >= smallest]
    fit = {(w, h) for w in sides for h in sides if w * h <= area}
    found = sorted(
        size for size in fit if (size[0] + step, size[1]) not in fit and (size[0], size[1] + step) not in fit
    )
    if not found:
        raise AdapterError(
            f"data.buckets: no size between {smallest} and {largest} in steps of {step} has at most the area of "
            f"{resolution[0]}×{resolution[1]}; say a smaller data.buckets.step or data.buckets.smallest"
        )
    return found


@lru_cache(maxsize=1 << 16)  # many pictures have one size
def nearest_size(original: Size, sizes: tuple[Size, ...]) -> Size:
    """The size with the nearest ratio: the least |log(W/H) - log(w/h)|, of equals the largest."""
    ratio = math.log(original[0] / original[1])
    return min(sizes, key=lambda size: (abs(math.log(size[0] / size[1]) - ratio), -size[0] * size[1], size))


def centred(original: Size, target: Size) -> View:
    """Resize to the least size that covers the target, with the picture's own ratio, and keep its middle."""
    (w, h), (width, height) = original, target
    if width * h >= height * w:
        resized = width, max(height, round(h * width / w))
    else:
        resized = max(width, round(w * height / h)), height
    return View(original, resized, target, (resized[0] - width) // 2, (resized[1] - height) // 2)
