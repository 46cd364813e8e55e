"""Pictures with captions, from folders, lists and datasets; and what is seen and said of each at a step."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path, PurePosixPath
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from veneer.core.errors import AdapterError, listed
from veneer.train.data.looking import Looks, look
from veneer.train.data.pictures import Pictures, Said, read_pictures, read_sides
from veneer.train.data.reading import read_picture
from veneer.train.diffusion.buckets import Frame, Size, View
from veneer.train.diffusion.data_settings import CaptionedData
from veneer.train.task import Reporter

COLUMNS = ("text", "caption", "captions", "prompt", "description", "blip_caption", "sentence", "title")
BESIDE = (".txt", ".caption")
REPEATED = re.compile(r"(\d{1,3})_(.+)")  # kohya's habit: 10_sks dog
MOST_ENLARGED = 8  # times a side, beyond which a picture is named instead


@dataclass(frozen=True)
class Captioned:
    """Pictures with their captions, and how they are learned."""

    pictures: Pictures
    texts: dict[int, tuple[str, ...]]  # of each row of the source: all that may be said
    looks: Looks
    frame: Frame
    dropout: float = 0.0

    def __len__(self) -> int:
        return len(self.pictures)

    def place(self, row: int) -> str:
        """Where a picture is, for messages."""
        return self.pictures.place(row)

    def name(self, row: int) -> str:
        """What a picture is called in its source."""
        return self.pictures.name(self._own(row))

    def captions(self, row: int) -> tuple[str, ...]:
        """All that may be said of a picture."""
        return self.texts[self._own(row)]

    def caption(self, row: int, random: Random | None = None) -> str:
        """What is said of a picture this time, which is nothing in `dropout` of the cases; without `random`, the first
        of its captions.
        """
        own = self.captions(row)
        if random is None:
            return own[0]
        chosen, dropped = own[int(random.random() * len(own))], random.random() < self.dropout
        return "" if dropped else chosen

    def spoken(self) -> list[str]:
        """All that may be said of any picture, in a fixed order."""
        found = dict.fromkeys(text for row in range(len(self)) for text in self.captions(row))
        return [*({"": None} if self.dropout else {}), *(text for text in found if text or not self.dropout)]

    def original(self, row: int) -> Size:
        """Width and height of the picture itself, upright."""
        width, height = self.looks.sizes[self._own(row)].tolist()
        return width, height

    def view(self, row: int, random: Random | None = None) -> View:
        """How a picture is seen this time; without `random`, its middle as it is."""
        return self.frame.view(self.original(row), random)

    def pixels(self, row: int, view: View) -> Tensor:
        """What is seen, `(3, height, width)` in [-1, 1]."""
        return view.pixels(read_picture(self.pictures.raw(row), self.place(row)))

    def picture(self, row: int, random: Random | None = None) -> tuple[Tensor, View]:
        """The pixels of a picture as it is seen this time, and how."""
        view = self.view(row, random)
        return self.pixels(row, view), view

    def target(self, row: int) -> Size:
        """The size that a picture is learned in: pictures of one size go through the model together."""
        return self.frame.target(self.original(row))

    def targets(self) -> dict[Size, int]:
        """How many pictures are learned in each size, the most first."""
        return dict(Counter(map(self.target, range(len(self)))).most_common())

    def shapes(self) -> str:
        """A sentence on the sizes that the pictures are learned in."""
        told = [f"{width}×{height} ({count:,})" for (width, height), count in self.targets().items()]
        many = f"They are learned in {len(told)} sizes, of width and height: {listed(told, say=str)}."
        return many if len(told) > 1 else f"They are learned in one size, of width and height: {told[0]}."

    def groups(self) -> Tensor | None:
        """A number for the size of each picture `(len,)`; None where all have one."""
        numbers = {size: number for number, size in enumerate(self.targets())}
        found = torch.tensor([numbers[self.target(row)] for row in range(len(self))])
        return found if len(numbers) > 1 else None

    def content(self, row: int) -> str:
        """A digest of the picture's bytes."""
        return self.looks.contents[self._own(row)]

    def digest(self) -> str:
        """A name for pictures and captions, all of them in their order."""
        digest = sha256()
        for row in range(len(self)):
            digest.update(f"{self.content(row)} {self.captions(row)!r}\n".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def _own(self, row: int) -> int:
        return int(self.pictures.rows[row])


def read_captioned(
    data: CaptionedData, resolution: Size, multiple: int, seed: int, reporter: Reporter | None = None
) -> tuple[Captioned, Captioned]:
    """(learned from, held out), every picture read once and every caption there; `resolution` is the base's own where
    the recipe says none, and `multiple` the pixels of a latent point.

    Raises `AdapterError` that names all pictures that cannot be read or have no caption.
    """
    reporter = reporter or Reporter()
    frame = Frame(data, resolution, multiple)
    said = Said(COLUMNS, "caption", data.caption, beside=captions_beside, optional=True)
    sides = read_sides(data, seed, lambda held_out: said)
    learned, held_out = (_captioned(side, data, frame, reporter) for side in sides)
    if not len(learned):
        raise AdapterError(f"{data.path}: no picture is left to learn from; say a smaller data.eval_share")
    return _repeated(learned, data, reporter), replace(held_out, dropout=0.0)


def read_class(data: CaptionedData, resolution: Size, multiple: int, reporter: Reporter | None = None) -> Captioned:
    """The pictures of the class, all with its prompt."""
    path, prompt = data.class_path, data.class_prompt
    if path is None or prompt is None:
        raise AdapterError("data.class_path and data.class_prompt: expected both")
    frame = Frame(data, resolution, multiple)
    said = Said(COLUMNS, "caption", None, beside=lambda folder, names: [prompt] * len(names), optional=True)
    pictures = read_pictures(path, "train", data, said)
    texts: dict[int, tuple[str, ...]] = dict.fromkeys(pictures.rows.tolist(), (prompt,))
    looks = _looked(pictures, frame, reporter or Reporter())
    return Captioned(pictures, texts, looks, frame, data.caption_dropout)


def captions_beside(folder: Path, names: Sequence[str]) -> list[tuple[str, ...]]:
    """What the files beside the pictures say, a caption a line; nothing where there is no file.

    Raises `AdapterError` that names all files that cannot be read.
    """
    found, problems = list[tuple[str, ...]](), list[str]()
    for name in names:
        file = next((own for end in BESIDE if (own := (folder / name).with_suffix(end)).is_file()), None)
        try:
            text = file.read_text(encoding="utf-8-sig") if file else ""
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"{file}: {'is not UTF-8' if isinstance(error, ValueError) else error.strerror}")
            continue
        found.append(tuple(line.strip() for line in text.splitlines() if line.strip()))
    if problems:
        raise AdapterError(f"captions that cannot be read: {listed(problems, say=str, between='; ')}")
    return found


def _captioned(pictures: Pictures, data: CaptionedData, frame: Frame, reporter: Reporter) -> Captioned:
    texts: dict[int, tuple[str, ...]] = {}
    bare, strange = [], []
    usual = kohya_folders(pictures) if data.repeats else {}
    for row in pictures.rows.tolist():
        own = texts_of(pictures.said(row))
        if own is None:
            strange.append(f"{pictures.name(row)}: {pictures.said(row)!r:.80}")
            continue
        folder = usual.get(_folder(pictures.name(row)))
        own = own or (
            (data.instance_prompt or (folder[1] if folder else ""),) if data.instance_prompt or folder else ()
        )
        if not own:
            bare.append(pictures.name(row))
        texts[row] = tuple(f"{data.trigger}, {text}" if data.trigger else text for text in own)
    if strange:
        raise AdapterError(f"{pictures.source}: expected a caption, or a list of them: {listed(strange, say=str)}")
    if bare:
        raise AdapterError(
            f"{pictures.source}: {len(bare):,} of {len(pictures):,} pictures have no caption: {listed(bare)}. Write "
            f"{PurePosixPath(bare[0]).with_suffix('.txt').name} beside each picture, or metadata.jsonl with file_name "
            "and text; or say data.caption=COLUMN; or data.instance_prompt='a photo of sks dog' for all that have none"
        )
    return Captioned(pictures, texts, _looked(pictures, frame, reporter), frame, data.caption_dropout)


def texts_of(said: Any) -> tuple[str, ...] | None:
    """The captions that a column says; None where they are none."""
    if said is None:
        return ()
    if isinstance(said, str):
        return (said.strip(),) if said.strip() else ()
    if isinstance(said, list | tuple | np.ndarray) and all(isinstance(text, str) for text in said):
        return tuple(text.strip() for text in said if text.strip())
    return None


def kohya_folders(pictures: Pictures) -> dict[str, tuple[int, str]]:
    """(repeats, caption) of each folder, where all pictures lie in folders named like `10_sks dog`."""
    folders = {_folder(pictures.name(row)) for row in pictures.rows.tolist()}
    found = {folder: REPEATED.fullmatch(folder) for folder in folders}
    return {
        folder: (max(1, int(own[1])), own[2].strip()) for folder, own in found.items() if own and all(found.values())
    }


def _folder(name: str) -> str:
    return name.partition("/")[0] if "/" in name else ""


def _repeated(part: Captioned, data: CaptionedData, reporter: Reporter) -> Captioned:
    folders = kohya_folders(part.pictures) if data.repeats else {}
    if not folders:
        return part
    rows = part.pictures.rows
    times = np.array([folders[_folder(part.pictures.name(row))][0] for row in rows.tolist()])
    told = [f"{name!r} {count} times" for name, (count, _) in sorted(folders.items())]
    reporter.say(
        f"{data.path}: folders named as kohya's scripts have them: an epoch has the pictures of "
        f"{listed(told, say=str)}; data.repeats=false counts each once"
    )
    return replace(part, pictures=replace(part.pictures, rows=np.repeat(rows, times)))


def _looked(pictures: Pictures, frame: Frame, reporter: Reporter) -> Looks:
    """Look at all pictures. Raises `AdapterError` that names those that are too small; says what is done to others."""
    looks = look(pictures, reporter)
    tiny, small, lost = [], [], []
    for row in np.unique(pictures.rows).tolist():
        size = tuple(looks.sizes[row].tolist())
        told = f"{pictures.name(row)} ({size[0]}×{size[1]})"
        view = frame.view(size) if min(frame.target(size)) else None
        if view is None or view.enlarged > MOST_ENLARGED:
            tiny.append(told)
            continue
        lost.append(view.lost)
        if view.enlarged > 1 or view.target not in frame.sizes:
            small.append(told)
    if tiny:
        width, height = frame.resolution
        raise AdapterError(
            f"{pictures.source}: {len(tiny):,} pictures are too small to be learned at {width}×{height}: "
            f"{listed(tiny, say=str)}. Remove them, or say a smaller data.resolution"
        )
    _say(pictures, looks, frame, small, lost, reporter)
    return looks


def _say(
    pictures: Pictures, looks: Looks, frame: Frame, small: list[str], lost: list[float], reporter: Reporter
) -> None:
    if small:
        done = "are learned in their own size; data.buckets.upscale=true enlarges them"
        done = done if frame.own and not frame.own.upscale else "are enlarged"
        reporter.say(f"{len(small):,} pictures are smaller than what is learned, and {done}: {listed(small, 3, str)}")
    if moving := [pictures.name(row) for row in np.unique(pictures.rows).tolist() if looks.moves[row]]:
        reporter.say(f"of {len(moving):,} animated pictures the first frame is learned: {listed(moving, 3)}")
    if frame.own is None and lost and sum(lost) / len(lost) > 0.1:
        share = sum(lost) / len(lost)
        reporter.say(f"cropping cuts off {share:.0%} of the pictures on average; data.buckets=true would keep more")
