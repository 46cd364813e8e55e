"""Pictures in rows and columns that say what they are."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from veneer.train.drawing.sheet import GAP, INK, SIDE, fitting

_LINE, _LETTERS = 17, 13  # points of a line and of its letters, where a cell is not large


def grid(rows: Sequence[tuple[str, Sequence[Image.Image]]], columns: Sequence[str] = ()) -> Image.Image:
    """A row of pictures below each label, and over all of them the names of the columns.

    Pictures keep their points; small ones are shown a whole number of times as large.
    """
    own = [picture for _, pictures in rows for picture in pictures]
    size = max(picture.width for picture in own), max(picture.height for picture in own)
    times = max(1, SIDE // max(size))
    wide, high = size[0] * times, size[1] * times
    scale = max(1, wide // (2 * SIDE))
    line, font = _LINE * scale, ImageFont.load_default(_LETTERS * scale)
    across = max(len(pictures) for _, pictures in rows)
    tall = [line * bool(label) + high + GAP for label, _ in rows]
    found = Image.new("RGB", (across * (wide + GAP) + GAP, GAP + line * bool(columns) + sum(tall)), "white")
    pen, top = ImageDraw.Draw(found), GAP
    for place, name in enumerate(columns):
        pen.text((GAP + place * (wide + GAP), top), fitting(name, pen, font, wide), INK, font)
    top += line * bool(columns)
    for (label, pictures), height in zip(rows, tall, strict=True):
        pen.text((GAP, top), fitting(label, pen, font, found.width - 2 * GAP), INK, font)
        for place, picture in enumerate(pictures):
            larger = (picture.width * times, picture.height * times)
            shown = picture.convert("RGB").resize(larger, Image.Resampling.NEAREST) if times > 1 else picture
            found.paste(shown, (GAP + place * (wide + GAP), top + line * bool(label)))
        top += height
    return found
