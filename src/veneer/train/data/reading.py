"""Pictures from files and bytes: turned as the camera was held, in the colours that a model is given; and masks."""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from veneer.core.errors import AdapterError

Raw = str | Path | bytes
Mask = np.ndarray[Any, np.dtype[np.int64]]
PAPER = (255, 255, 255)  # what stands behind a transparent picture


def read_picture(raw: Raw, place: str, mode: str = "RGB") -> Image.Image:
    """The picture in `mode`: upright, on white where it is transparent, 16 bits as 8.

    Raises `AdapterError` where it cannot be read, whole.
    """
    with _opened(raw, place) as picture:
        if picture.mode == "F":
            raise AdapterError(f"{place}: its points are fractions without bounds; save it with 8 or 16 bits a colour")
        if picture.mode.startswith("I"):
            deep = np.asarray(picture).astype(np.int64)  # (height, width)
            picture = Image.fromarray((deep >> 8 if deep.max(initial=0) > 255 else deep).clip(0, 255).astype(np.uint8))
        if "transparency" in picture.info or picture.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
            own = picture.convert("RGBA")
            paper = Image.new("RGBA", own.size, (*PAPER, 255))
            picture = Image.alpha_composite(paper, own)
        return picture.convert(mode)


def read_mask(raw: Raw, place: str) -> Mask:
    """The number of each pixel `(height, width)`. Raises `AdapterError` for colours, and what cannot be read."""
    with _opened(raw, place) as picture:
        numbers = np.asarray(picture)
    if numbers.ndim == 3 and all(
        (numbers[..., 0] == numbers[..., i]).all() for i in range(1, min(3, numbers.shape[2]))
    ):
        numbers = numbers[..., 0]  # grey, saved as colours
    if numbers.ndim != 2 or numbers.dtype.kind not in "biu":
        raise AdapterError(
            f"{place}: expected a mask with one number a pixel, found {picture.mode}; save the number of the class as "
            "the grey value, or as the palette's index"
        )
    return numbers.astype(np.int64)


@contextmanager
def _opened(raw: Raw, place: str) -> Iterator[Image.Image]:
    """The picture, decoded and upright; what its decoder raises is one `AdapterError`."""
    try:
        with Image.open(BytesIO(raw) if isinstance(raw, bytes) else raw) as picture:
            picture.load()
            upright = ImageOps.exif_transpose(picture)
    except Exception as error:  # decoders raise a dozen unrelated kinds; to a reader they are one
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        told = "is no picture" if "cannot identify" in first else f"cannot be read: {first}"
        raise AdapterError(f"{place}: {told}") from error
    yield upright
