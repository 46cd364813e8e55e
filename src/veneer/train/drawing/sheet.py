"""A sheet of pictures with what is said of them, to look at."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from veneer.core.errors import AdapterError
from veneer.safe.whole import write_whole

SIDE, GAP, LINE = 176, 10, 17  # points
INK, RIGHT, WRONG = (34, 40, 46), (47, 125, 74), (190, 62, 50)
ACROSS = 4  # cells of one picture; those of several have a line of their own


@dataclass(frozen=True)
class Shown:
    """Pictures beside each other, each `small`, and the lines below them."""

    pictures: list[Image.Image]
    lines: list[str]
    right: bool | None = None  # whether the last line is true
    colours: list[tuple[str, tuple[int, int, int]]] = field(default_factory=list)  # a legend


def sheet(shown: Sequence[Shown]) -> Image.Image:
    """All of them, in rows."""
    wide = max(len(own.pictures) for own in shown)
    across = ACROSS if wide == 1 else 1
    cell = (wide * (SIDE + GAP), SIDE + GAP + LINE * max(len(own.lines) + bool(own.colours) for own in shown))
    down = -(-len(shown) // across)
    found = Image.new("RGB", (across * cell[0] + GAP, down * cell[1] + GAP), "white")
    for number, own in enumerate(shown):
        left, top = GAP + number % across * cell[0], GAP + number // across * cell[1]
        _draw(found, own, left, top, cell[0] - GAP)
    return found


def write_sheet(shown: Sequence[Shown], path: Path) -> bool:
    """Write all of them as a PNG file, if there are any. Raises `AdapterError` where it cannot be written."""
    return write_picture(sheet(shown) if shown else None, path)


def write_picture(picture: Image.Image | None, path: Path) -> bool:
    """Write a picture as a PNG file, if there is one. Raises `AdapterError` where it cannot be written."""
    if picture is not None:
        try:
            write_whole({path: lambda temporary: picture.save(temporary, format="PNG")})
        except OSError as error:
            raise AdapterError(f"cannot write {path}: {error.strerror or error}") from error
    return picture is not None


def small(picture: Image.Image) -> Image.Image:
    """The picture as large as it is drawn."""
    scale = SIDE / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.convert("RGB").resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX)


def _draw(found: Image.Image, own: Shown, left: int, top: int, width: int) -> None:
    pen, font = ImageDraw.Draw(found), ImageFont.load_default(13)
    for place, picture in enumerate(own.pictures):
        found.paste(picture, (left + place * (SIDE + GAP), top))
    y = top + SIDE + 2
    for number, line in enumerate(own.lines):
        judged = own.right is not None and number == len(own.lines) - 1
        pen.text((left, y), fitting(line, pen, font, width), (RIGHT if own.right else WRONG) if judged else INK, font)
        y += LINE
    x = left
    for name, colour in own.colours:
        length = 14 + int(pen.textlength(name, font)) + 12
        if x + length > left + width:
            break
        pen.rectangle((x, y + 3, x + 9, y + 12), colour, INK)
        pen.text((x + 14, y), name, INK, font)
        x += length


def fitting(line: str, pen: Any, font: Any, width: int) -> str:
    """The line, cut where it would be too long."""
    while pen.textlength(line, font) > width and len(line) > 2:
        line = line[:-2] + "…"
    return line


def colour_of(number: int) -> tuple[int, int, int]:
    """The colour of a class, as Pascal VOC has it: the bits of its number, spread."""
    colour = [0, 0, 0]
    for bit in range(8):
        for channel in range(3):
            colour[channel] |= (number >> channel & 1) << 7 - bit
        number >>= 3
    return colour[0], colour[1], colour[2]


def painted(numbers: "np.ndarray[Any, Any]", classes: int) -> Image.Image:
    """A mask as a picture whose palette has the colours of the classes; 255, white, where there is no class."""
    if classes > 255:
        return Image.fromarray(np.where(numbers >= 0, numbers, 2**16 - 1).astype(np.uint16))
    found = Image.fromarray(np.where((numbers >= 0) & (numbers < classes), numbers, 255).astype(np.uint8))
    found.putpalette([part for number in range(255) for part in colour_of(number)] + [255, 255, 255])
    return found
