"""Views: the nearest shape, the part that covers it, and what SDXL is told of it."""

import math
from functools import cache
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from train.diffusion.captioned import folder
from veneer.core.errors import AdapterError
from veneer.train.diffusion.buckets import Frame, View, bucket_sizes, centred, nearest_size
from veneer.train.diffusion.data_settings import CaptionedData
from veneer.train.loop import _batches, rows_of
from veneer.train.processes import ALONE
from veneer.train.settings import TrainSettings, checked

SIDES = st.integers(1, 3000)
STEPS = st.sampled_from([8, 16, 64])


def frame(base=(512, 512), multiple=8, **more) -> Frame:
    return Frame(checked(CaptionedData, {"path": "pictures", **more}, "data"), base, multiple)


@cache
def allowed(step: int) -> dict[tuple[int, int], float]:
    """Every size with the area of 512² at most, and the logarithm of its ratio."""
    sides = [side for side in range(step, 1025, step) if side >= 256]
    return {(w, h): math.log(w / h) for w in sides for h in sides if w * h <= 512**2}


@given(SIDES, SIDES, STEPS)
def test_a_picture_goes_to_the_nearest_ratio_of_all(width, height, step):
    found = nearest_size((width, height), tuple(bucket_sizes((512, 512), step, 256, 1024)))
    sizes = allowed(step)
    best = [size for size in sizes if (size[0] + step, size[1]) not in sizes and (size[0], size[1] + step) not in sizes]
    ratio = math.log(width / height)
    assert abs(sizes[found] - ratio) == min(abs(sizes[size] - ratio) for size in best)
    assert found in best
    assert frame(buckets={"step": step, "upscale": True}).target((width, height)) == found


def test_the_sizes_are_those_that_people_know():
    assert frame(buckets=True).sizes == (
        *((256, 1024), (320, 768), (384, 640), (448, 576), (512, 512)),
        *((576, 448), (640, 384), (768, 320), (1024, 256)),
    )
    assert set(frame((64, 64), buckets=True).sizes) >= {(64, 64), (32, 128), (128, 32), (56, 72)}
    assert all(side % 48 == 0 for size in frame((768, 768), 48, buckets=True).sizes for side in size)
    assert frame((64, 64), resolution=[96, 48]).sizes == ((96, 48),)


@given(SIDES, SIDES, STEPS)
def test_nothing_is_enlarged_unless_it_is_asked_for(width, height, step):
    found = frame(buckets={"step": step})
    target = found.target((width, height))
    if min(target):
        view = found.view((width, height))
        assert view.enlarged <= 1 + 0.5 / min(width, height), "but for the rounding of the longer side"
        assert target[0] * target[1] <= 512**2
        assert target[0] % step == target[1] % step == 0
    else:
        assert min(width, height) < step


@given(SIDES, SIDES, st.integers(1, 1200), st.integers(1, 1200), st.integers(0, 99))
def test_a_part_covers_its_target_and_stays_inside(width, height, across, down, seed):
    for view in (
        centred((width, height), (across, down)),
        frame((across, down), 1, crop="random", flip=True).view((width, height), Random(seed)),
    ):
        assert min(a - b for a, b in zip(view.resized, view.target, strict=True)) == 0 or 1 in view.resized
        assert abs(view.resized[0] * height - view.resized[1] * width) <= max(width, height), "the ratio stays"
        left, top, right, bottom = view.box
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        assert (right - left) * view.resized[0] == pytest.approx(across * width)
        assert (bottom - top) * view.resized[1] == pytest.approx(down * height)
        assert 0 <= view.lost < 1


def test_sdxl_is_told_the_crop_of_the_turned_picture():
    random = frame((64, 32), crop="random", flip=True)
    seen = {random.view((200, 50), Random(seed)) for seed in range(1500)}
    assert {view.flip for view in seen} == {True, False}
    assert {view.left for view in seen} == set(range(128 - 64 + 1))
    for view in seen:
        turned = Image.new("RGB", (200, 50)).resize(view.resized)
        expected = view.resized[0] - view.target[0] - view.left if view.flip else view.left
        assert view.sizes == (50, 200, view.top, expected, 32, 64)
        assert turned.size[0] >= expected + 64
    middle = frame((64, 32)).view((200, 50))
    assert (middle.left, middle.top, middle.flip) == (32, 0, False)


def test_pixels_are_the_part_of_the_resized_picture():
    points = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(4, 6, 3)
    view = View((6, 4), (6, 4), (2, 3), 3, 1)
    part = torch.from_numpy(points[1:4, 3:5]).permute(2, 0, 1).float() / 127.5 - 1
    torch.testing.assert_close(view.pixels(Image.fromarray(points)), part, rtol=0, atol=0)
    turned = View((6, 4), (6, 4), (2, 3), 3, 1, flip=True)
    torch.testing.assert_close(turned.pixels(Image.fromarray(points)), part.flip(-1), rtol=0, atol=0)
    noise = Image.effect_noise((300, 200), 60).convert("RGB").resize((75, 50)).resize((300, 200))
    view = centred((300, 200), (64, 64))
    whole = np.asarray(noise.resize(view.resized, Image.Resampling.LANCZOS)).astype(np.float32) / 127.5 - 1
    expected = torch.from_numpy(whole[:, view.left : view.left + 64]).permute(2, 0, 1)
    assert (view.pixels(noise) - expected)[:, :, 4:-4].abs().max() < 0.05
    assert view.pixels(noise).shape == (3, 64, 64)


def test_whether_pictures_are_always_seen_in_the_same_part():
    assert frame().still([(300, 200)])
    assert frame(crop="random").still([(512, 512), (300, 300)])
    assert not frame(crop="random").still([(512, 512), (300, 200)])


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"resolution": [100, 64]}, r"data.resolution=\[100, 64\]: expected multiples of 8"),
        ({"buckets": {"step": 12}}, "data.buckets.step=12: expected a multiple of 8"),
        ({"buckets": {"smallest": 600}}, "no size between 600 and 1024 in steps of 64"),
        ({"buckets": {"setp": 64}}, "unknown key 'buckets.setp'; did you mean 'step'"),
        ({"crop": "middle"}, "crop: input should be 'center' or 'random', found 'middle'"),
        ({"class_path": "dogs"}, "data.class_path and data.class_prompt belong together"),
        ({"latents": "a.safetensors", "flip": True}, "data.latents are of whole pictures as they are"),
    ],
)
def test_settings_that_cannot_be_are_told(more, told):
    with pytest.raises(AdapterError, match=told):
        frame(**more)


def test_a_batch_goes_through_the_model_once(built, tmp_path):
    own = folder(tmp_path / "both", dict.fromkeys(("a.png", "b.png", "c.png", "d.png"), "wide"), (64, 32))
    folder(tmp_path / "both/high", dict.fromkeys(("a.png", "b.png", "c.png", "d.png"), "high"), (32, 64))
    task = built(data={"path": str(own), "buckets": True})
    settings = TrainSettings(batch_size=4)
    batches = [_batches(task, step, rows_of(step, settings, task.size, task.groups), ALONE) for step in range(8)]
    assert [len(passes) for passes in batches] == [1] * 8
    shapes = {tuple(batch.inputs["x"].shape) for passes in batches for batch in passes}
    assert shapes == {(4, 4, 6, 10), (4, 4, 10, 6)}, "24 by 40 pixels, of all in steps of 8 the nearest to 32 by 64"
    (together,) = _batches(task, 0, [[0, 1, 2, 3]], ALONE)
    mixed = _batches(task, 0, [[0, 1, 7, 2, 3, 4]], ALONE)
    assert [len(batch.places) for batch in mixed] == [4, 2]
    assert together.inputs["sizes"][:, :2].tolist() == [[32, 64]] * 4
