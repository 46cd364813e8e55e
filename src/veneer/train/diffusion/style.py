"""How pictures look, in numbers: how colourful, how much ink, how near to a style's own; and what shapes they keep.

All are numbers of a picture or of sets of pictures `(height, width)`, of colours from 0 to 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from veneer.core.errors import AdapterError

Array = np.ndarray[Any, np.dtype[Any]]
LUMINANCE = (0.299, 0.587, 0.114)  # of red, green, blue (BT.601)
DARK = 0.5  # luminance below which a point is ink
OFF = 0.15  # a point whose red, green or blue is this far from the paper's is not paper
SIDE = 64  # points of a side that descriptors and silhouettes look at
GAP = 2  # of these, half the width of gaps in outlines
BINS, TONES = 8, 4  # of luminance, and of chroma


@dataclass(frozen=True)
class Looks:
    """What a set of pictures is measured at; the last two against pictures of the same things in another style."""

    saturation: float
    ink: float
    distance: float | None = None  # to a style's own pictures
    shape: float | None = None
    edges: float | None = None


def looks(
    pictures: Sequence[Image.Image],
    style: Sequence[Image.Image] = (),
    before: Sequence[Image.Image] = (),
) -> Looks:
    """The means over pictures, their distance to a `style`, and how much of the shapes `before`, one a picture, stays.

    Raises `AdapterError` for no pictures, and where `before` are not as many or of other sizes.
    """
    if not pictures:
        raise AdapterError("there are no pictures to measure")
    if before and [own.size for own in pictures] != [own.size for own in before]:
        raise AdapterError("each picture is compared with one before, of its size: expected as many, of the same sizes")
    pairs = list(zip(before, pictures, strict=False))
    return Looks(
        saturation=_mean([saturation(own) for own in pictures]),
        ink=_mean([ink(own) for own in pictures]),
        distance=distance(pictures, style) if style else None,
        shape=_mean([shape_kept(*pair) for pair in pairs]) if pairs else None,
        edges=_mean([edges_alike(*pair) for pair in pairs]) if pairs else None,
    )


def saturation(picture: Image.Image) -> float:
    """The mean of max - min of red, green and blue: 0 of greys, 1 of the purest colours.

    (HSV's saturation divides by max, and is noise where it is dark.)
    """
    colours = _colours(picture)
    return float((colours.max(-1) - colours.min(-1)).mean())


def ink(picture: Image.Image) -> float:
    """The share of points whose luminance is below `DARK`."""
    return float((_luminance(_colours(picture)) < DARK).mean())


def distance(pictures: Sequence[Image.Image], style: Sequence[Image.Image]) -> float:
    """√(‖μ₁ - μ₂‖² + tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½)): Fréchet's distance of the two sets' descriptors, as if normal (Dowson
    & Landau 1982), with simple descriptors in the place of a network's. Of few pictures it is too large: compare
    distances of sets of one size only. Raises `AdapterError` for an empty set.
    """
    if not pictures or not style:
        raise AdapterError("a distance is between two sets of pictures, and one has none")
    return frechet(*(np.stack([descriptor(own) for own in each]) for each in (pictures, style)))


def descriptor(picture: Image.Image) -> Array:
    """How light, how colourful, of which colours, how full of edges: shares of points in bins of luminance and of
    chroma, the means of red less green and yellow less blue, and the mean gradient of luminance.
    """
    colours = _colours(_small(picture))
    light, chroma = _luminance(colours), colours.max(-1) - colours.min(-1)
    red, green, blue = np.moveaxis(colours, -1, 0)
    return np.concatenate(
        [
            np.histogram(light, BINS, (0, 1))[0] / light.size,
            np.histogram(chroma, TONES, (0, 1))[0] / chroma.size,
            [(red - green).mean(), ((red + green) / 2 - blue).mean(), _gradient(light).mean()],
        ]
    )


def frechet(one: Array, other: Array) -> float:
    """Fréchet's distance of two sets of vectors `(n, width)`, as if each were normal."""
    means, spreads = zip(*((each.mean(0), _spread(each)) for each in (one, other)), strict=True)
    values, vectors = np.linalg.eigh(spreads[0])
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    shared = np.sqrt(np.linalg.eigvalsh(root @ spreads[1] @ root).clip(0)).sum()
    square = ((means[0] - means[1]) ** 2).sum() + np.trace(spreads[0]) + np.trace(spreads[1]) - 2 * shared
    return float(np.sqrt(max(0.0, square)))


def _spread(vectors: Array) -> Array:
    away = vectors - vectors.mean(0)
    return np.asarray(away.T @ away / len(vectors))


def shape_kept(before: Image.Image, after: Image.Image) -> float:
    """|A ∩ B| / |A ∪ B| of the two silhouettes: 1 where what is filled and what is outlined cover the same points."""
    a, b = silhouette(before), silhouette(after)
    every = (a | b).sum()
    return float((a & b).sum() / every) if every else 1.0


def silhouette(picture: Image.Image) -> Array:
    """What paper that reaches the border does not cover, in `SIDE` points a side: an outline is filled, also one with
    small gaps. Paper is the colour that most of the border has.
    """
    colours = _colours(_small(picture))
    border = np.concatenate([colours[0], colours[-1], colours[:, 0], colours[:, -1]])
    drawn = (np.abs(colours - np.median(border, 0)) > OFF).any(-1)
    closed = np.pad(_grown(drawn, GAP), GAP + 1)  # so that what touches the border is paper's on its other side
    outside = np.zeros_like(closed)
    outside[0] = True
    while True:
        further = _grown(outside, 1, across=False) & ~closed
        if (further == outside).all():
            break
        outside = further
    filled = ~_grown(outside, GAP)[GAP + 1 : -GAP - 1, GAP + 1 : -GAP - 1]
    return np.asarray(filled | drawn)


def _grown(mask: Array, by: int, across: bool = True) -> Array:
    """The points within `by` of a mask; without `across`, those beside its points, not at their corners."""
    if across:
        grown = Image.fromarray(mask).convert("L").filter(ImageFilter.MaxFilter(2 * by + 1))
        return np.asarray(grown) > 0
    found = mask.copy()
    found[1:] |= mask[:-1]
    found[:-1] |= mask[1:]
    found[:, 1:] |= mask[:, :-1]
    found[:, :-1] |= mask[:, 1:]
    return found


def edges_alike(before: Image.Image, after: Image.Image) -> float:
    """The correlation of where the two have edges, a little blurred: 1 where lines are at the same places."""
    a, b = (_edges(own) for own in (before, after))
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a**2).sum() * (b**2).sum()))
    return float((a * b).sum() / size) if size else 0.0


def _edges(picture: Image.Image) -> Array:
    """The greatest gradient of red, green and blue, blurred."""
    colours = _colours(picture)
    steep = np.max([_gradient(colours[..., i]) for i in range(3)], axis=0)
    blurred = Image.fromarray((255 * steep.clip(0, 1)).astype(np.uint8))
    return np.asarray(blurred.filter(ImageFilter.GaussianBlur(min(picture.size) / 32)), np.float64)


def _gradient(values: Array) -> Array:
    down, right = np.gradient(values)
    return np.asarray(np.hypot(down, right))


def _small(picture: Image.Image) -> Image.Image:
    return picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)


def _colours(picture: Image.Image) -> Array:
    """`(height, width, 3)`, from 0 to 1."""
    return np.asarray(picture.convert("RGB"), np.float64) / 255


def _luminance(colours: Array) -> Array:
    return np.asarray(colours @ np.array(LUMINANCE))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
