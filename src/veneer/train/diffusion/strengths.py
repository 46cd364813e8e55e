"""A style at several strengths: the same prompts and seeds in rows that say how the pictures look."""

from collections.abc import Mapping, Sequence

from PIL import Image

from veneer.train.card import NAMES
from veneer.train.diffusion.style import Looks, looks
from veneer.train.drawing.grid import grid

Pictures = Sequence[Image.Image]


def figures(found: Looks) -> dict[str, float]:
    """What was measured, by name."""
    return {name: value for name, value in vars(found).items() if value is not None}


def strengths_sheet(rows: Mapping[str, Pictures], columns: Sequence[str], style: Pictures = ()) -> Image.Image:
    """A row of pictures for each label, with how they look: against the `style`'s own, and the first row's shapes."""
    before = next(iter(rows.values()))
    told = [(f"{label}   {_told(looks(pictures, style, before))}", pictures) for label, pictures in rows.items()]
    return grid(told, columns)


def _told(found: Looks) -> str:
    return "   ".join(f"{NAMES.get(name, name)} {value:.2f}" for name, value in figures(found).items())
