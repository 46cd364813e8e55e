"""Small folders of pictures with captions, and who hears what is said of them."""

from pathlib import Path

import numpy as np
from PIL import Image

from veneer.train.diffusion.captions import Captioned, read_captioned
from veneer.train.diffusion.data_settings import CaptionedData
from veneer.train.settings import checked
from veneer.train.task import Reporter


class Heard(Reporter):
    """Keeps what was said."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.done: list[tuple[str, int, int]] = []

    def progress(self, what: str, done: int, total: int) -> None:
        self.done.append((what, done, total))

    def say(self, text: str) -> None:
        self.told.append(text)


def picture(number: int, size=(40, 32)) -> Image.Image:
    points = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(points)


def folder(at: Path, captions: dict[str, str | None], size=(40, 32)) -> Path:
    """Pictures, with a file of captions beside each that has any."""
    for number, (name, caption) in enumerate(captions.items()):
        (at / name).parent.mkdir(parents=True, exist_ok=True)
        picture(number, size).save(at / name)
        if caption is not None:
            (at / name).with_suffix(".txt").write_text(caption, encoding="utf-8")
    return at


def read(path: Path | str, reporter: Reporter | None = None, **more) -> tuple[Captioned, Captioned]:
    data = checked(CaptionedData, {"path": str(path), **more}, "data")
    return read_captioned(data, (32, 32), 8, 0, reporter)
