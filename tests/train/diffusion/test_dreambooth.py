"""Class pictures: painted where they lack, each once and by its number, and drawn by (seed, step, row)."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from train.diffusion.captioned import Heard, folder
from veneer.core.errors import AdapterError
from veneer.train.diffusion.captions import read_class
from veneer.train.diffusion.data_settings import CaptionedData
from veneer.train.diffusion.dreambooth import file_of, lacking, paint_class, partner
from veneer.train.settings import checked


class Painter:
    """Paints a picture that prompt and seed decide, and may be cut short."""

    def __init__(self, most: int = 10**6) -> None:
        self.seeds: list[int] = []
        self.most = most

    def __call__(self, prompts, seeds) -> list[Image.Image]:
        if len(self.seeds) >= self.most:
            raise KeyboardInterrupt
        self.seeds += seeds
        return [painted(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]


def painted(prompt: str, seed: int) -> Image.Image:
    points = np.random.default_rng([seed, *prompt.encode()]).integers(0, 255, (16, 16, 3), np.uint8)
    return Image.fromarray(points)


def data(at: Path, count: int, prompt: str = "a dog") -> CaptionedData:
    values = {"path": "own", "class_path": str(at), "class_prompt": prompt, "class_pictures": count, "resolution": 16}
    return checked(CaptionedData, values, "data")


def test_pictures_that_lack_are_painted_and_painting_goes_on(tmp_path):
    own = data(tmp_path / "class", 7)
    with pytest.raises(KeyboardInterrupt):
        paint_class(own, {"base": "b"}, first := Painter(most=4), 2, Heard())
    assert first.seeds == [0, 1, 2, 3]
    assert lacking(own) == [4, 5, 6]
    (tmp_path / "class" / file_of(1)).unlink()
    heard = Heard()
    paint_class(own, {"base": "b"}, second := Painter(), 3, heard)
    assert second.seeds == [1, 4, 5, 6]
    assert [done for _, done, _ in heard.done] == [3, 4]
    assert sorted(path.name for path in (tmp_path / "class").glob("[!.]*")) == sorted(
        ["class.json", *map(file_of, range(7))]
    )
    for number in range(7):
        assert Image.open(tmp_path / "class" / file_of(number)).tobytes() == painted("a dog", number).tobytes()
    assert json.loads((tmp_path / "class/class.json").read_text()) == {"prompt": "a dog", "base": "b"}
    paint_class(own, {"base": "b"}, third := Painter(), 3, heard)
    assert third.seeds == []
    found = read_class(own, (16, 16), 8)
    assert len(found) == 7
    assert {found.caption(row) for row in range(7)} == {"a dog"}


def test_pictures_of_ones_own_count(tmp_path):
    folder(tmp_path, {"mine.png": None, "more/mine.jpg": None}, (16, 16))
    own = data(tmp_path, 5)
    paint_class(own, {"base": "b"}, painter := Painter(), 4, Heard())
    assert painter.seeds == [0, 1, 2]
    assert len(read_class(own, (16, 16), 8)) == 5
    assert lacking(data(tmp_path, 2)) == []


def test_pictures_that_were_painted_otherwise_are_not_mixed_in(tmp_path):
    paint_class(data(tmp_path, 2), {"base": "b"}, Painter(), 4, Heard())
    before = {path.name: path.read_bytes() for path in tmp_path.glob("[!.]*")}
    for own, facts in (
        (data(tmp_path, 3, "a cat"), {"base": "b"}),
        (data(tmp_path, 2, "a cat"), {"base": "b"}),
        (data(tmp_path, 3), {"base": "c"}),
        (data(tmp_path, 2), {"base": "c"}),
        (data(tmp_path, 3), {"base": "b", "steps": "9"}),
    ):
        with pytest.raises(AdapterError, match=r"2 pictures were painted otherwise: .* was .* and is .*Say another"):
            paint_class(own, facts, Painter(), 4, Heard())
    assert {path.name: path.read_bytes() for path in tmp_path.glob("[!.]*")} == before
    paint_class(data(tmp_path, 2), {"base": "b", "steps": "9"}, Painter(), 4, Heard())  # nothing is added
    (tmp_path / "class.json").unlink()
    paint_class(data(tmp_path, 3, "a cat"), {"base": "b"}, painter := Painter(), 4, Heard())
    assert painter.seeds == [2], "they are taken as they are"


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(AdapterError, match=r"data.class_path=.*file: cannot be written"):
        paint_class(data(tmp_path / "file", 1), {}, Painter(), 4, Heard())


def test_which_class_picture_goes_with_a_row():
    drawn = [partner(3, step, row, 10) for step in range(300) for row in range(10)]
    assert drawn == [partner(3, step, row, 10) for step in range(300) for row in range(10)]
    assert set(drawn) == set(range(10))
    assert max(abs(count - 300) for count in Counter(drawn).values()) < 80
    assert drawn != [partner(4, step, row, 10) for step in range(300) for row in range(10)]
