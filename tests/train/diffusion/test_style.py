"""Measures of pictures are what can be counted by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from veneer import AdapterError
from veneer.train.diffusion.style import distance, edges_alike, frechet, ink, looks, saturation, shape_kept, silhouette


def paper(size=64):
    return Image.new("RGB", (size, size), "white")


def disc(fill="red", outline=None, at=(12, 12, 51, 51), size=64, gap=0):
    """A disc; or its outline, with a gap of so many degrees."""
    picture = paper(size)
    if outline:
        ImageDraw.Draw(picture).arc(at, gap, 360, outline, width=3)
    else:
        ImageDraw.Draw(picture).ellipse(at, fill)
    return picture


@pytest.mark.parametrize(
    ("colour", "expected"), [((255, 0, 0), 1.0), ((255, 128, 128), 127 / 255), ((3, 0, 0), 3 / 255), ((90,) * 3, 0.0)]
)
def test_saturation_of_one_colour(colour, expected):
    assert saturation(Image.new("RGB", (5, 4), colour)) == pytest.approx(expected)


def test_ink_is_the_share_of_dark_points():
    picture = paper(10)
    picture.paste("black", (0, 0, 5, 4))
    picture.paste("yellow", (5, 0, 10, 10))
    assert ink(picture) == pytest.approx(0.2)


@given(*[st.floats(-3, 3)] * 2, *[st.floats(0.1, 3)] * 2)
def test_frechets_distance_of_normals_on_a_line_and_beside_each_other(m1, m2, s1, s2):
    sides = [m + s * np.array([[-1.0], [1.0]]) for m, s in ((m1, s1), (m2, s2))]
    assert frechet(*sides) == pytest.approx(np.hypot(m1 - m2, s1 - s2), abs=1e-6)
    crosses = [np.array([[s, 0], [-s, 0], [0, t], [0, -t]]) for s, t in ((s1, s2), (s2, s1))]
    assert frechet(*crosses) == pytest.approx(abs(s1 - s2), abs=1e-6)  # √(2 · (s1 - s2)² / 2)


def test_a_set_is_nearer_to_its_own_style():
    places = [(8 + k, 12, 47 + k, 51) for k in range(5)]
    filled = [disc(at=at) for at in places]
    drawn = [disc(outline="black", at=at) for at in places]
    assert distance(filled, filled) == pytest.approx(0, abs=1e-6)
    assert distance(filled[:3], filled[2:]) < distance(filled, drawn) / 10


def test_silhouettes_are_filled_also_where_the_outline_has_a_gap():
    solid, whole, open_, missing = (
        disc(),
        disc(outline="black"),
        disc(outline="black", gap=6),
        disc(outline="black", gap=90),
    )
    expected = np.hypot(*(np.indices((64, 64)) - 31.5)) <= 20
    assert (silhouette(solid) ^ expected).sum() < 0.08 * expected.sum()
    assert shape_kept(solid, whole) > 0.95
    assert shape_kept(solid, open_) > 0.9
    assert shape_kept(solid, missing) < 0.5


def test_shapes_that_touch_the_border_and_dark_paper_are_seen():
    touching = disc(at=(-10, 12, 29, 51))
    assert silhouette(touching)[32, 0]
    assert not silhouette(touching)[0, 63]
    night = Image.new("RGB", (64, 64), "black")
    ImageDraw.Draw(night).ellipse((12, 12, 51, 51), "yellow")
    assert shape_kept(night, disc()) == 1.0
    assert shape_kept(paper(), paper()) == 1.0
    assert shape_kept(disc(), paper()) == 0.0


def test_shapes_at_other_places_are_other_shapes_in_any_size():
    moved = disc(at=(24, 24, 63, 63))
    assert shape_kept(disc(), moved) < 0.5
    assert edges_alike(disc(), moved) < 0.5
    large = disc(at=(48, 48, 207, 207), size=256)
    assert shape_kept(disc(), large) > 0.9


def test_edges_are_alike_in_any_colours():
    assert edges_alike(disc(), disc()) == pytest.approx(1.0)
    assert edges_alike(disc("red"), disc("black")) > 0.99
    assert edges_alike(disc(), disc(outline="black")) > 0.8
    assert edges_alike(disc(), paper()) == 0.0


def test_looks_are_all_of_them():
    before, after = [disc(), disc("green")], [disc(outline="black")] * 2
    found = looks(after, style=after, before=before)
    assert found.saturation == 0
    assert found.ink == ink(after[0])
    assert found.distance == pytest.approx(0, abs=1e-6)
    assert found.shape == shape_kept(before[0], after[0])
    assert found.edges == pytest.approx((edges_alike(before[0], after[0]) + edges_alike(before[1], after[1])) / 2)
    assert looks(before).shape is None


@pytest.mark.parametrize(
    ("sets", "words"),
    [(([],), "no pictures"), (([disc()], (), [disc()] * 2), "as many"), (([disc()], (), [disc(size=32)]), "sizes")],
    ids=["none", "more", "smaller"],
)
def test_sets_that_cannot_be_compared_are_refused(sets, words):
    with pytest.raises(AdapterError, match=words):
        looks(*sets)
    with pytest.raises(AdapterError, match="has none"):
        distance([disc()], [])
