"""Pictures with captions, from folders, lists and datasets; and what is seen and said of each at a step."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
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
REPEATED = re.compile(r"([1-9]\d{0,2})_(.+)")  # kohya's habit: 10_sks dog
Repeats = tuple[int, str]  # how often a folder's pictures are learned in an epoch, and their caption
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

    Raises one `AdapterError` that names all pictures that cannot be read, are too small or have no caption.
    """
    reporter = reporter or Reporter()
    frame = Frame(data, resolution, multiple)
    said = Said(COLUMNS, "caption", data.caption, beside=files_beside, optional=True)
    sides = read_sides(data, seed, lambda held_out: said)
    if not len(sides[0]):
        raise AdapterError(f"{data.path}: no picture is left to learn from; say a smaller data.eval_share")
    one = not (data.eval_path or data.eval_split)
    folders = [kohya_folders(sides if one else [side]) if data.repeats else {} for side in sides]
    words = [partial(_texts, side, data, own) for side, own in zip(sides, folders, strict=True)]
    found: list[Any] = _tried([*words, *(partial(_looked, side, frame, reporter) for side in sides)])
    every = zip(sides, found[:2], found[2:], strict=True)
    learned, held_out = (Captioned(side, texts, looks, frame) for side, texts, looks in every)
    return _repeated(replace(learned, dropout=data.caption_dropout), folders[0], reporter), held_out


def _tried(calls: Iterable[Callable[[], object]]) -> list[object]:
    """What each call gives. Raises one `AdapterError` with what is wrong in any."""
    found, problems = list[object](), list[str]()
    for call in calls:
        try:
            found.append(call())
        except AdapterError as error:
            problems.append(str(error))
    if problems:
        raise AdapterError("; ".join(dict.fromkeys(problems)))
    return found


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


def files_beside(folder: Path, names: Sequence[str]) -> list[Path | None]:
    """The file of captions beside each picture."""
    every = ([(folder / name).with_suffix(end) for end in BESIDE] for name in names)
    return [next((file for file in files if file.is_file()), None) for files in every]


def _texts(pictures: Pictures, data: CaptionedData, folders: Mapping[str, Repeats]) -> dict[int, tuple[str, ...]]:
    """What may be said of each row of the source. Raises `AdapterError` that names all that nothing can be said of."""
    texts: dict[int, tuple[str, ...]] = {}
    bare, strange = [], []
    for row in pictures.rows.tolist():
        name = pictures.name(row)
        try:
            own = texts_of(pictures.said(row))
        except AdapterError as error:
            strange.append(f"{name}: {error}")
            continue
        usual = data.instance_prompt or folders.get(_folder(name), (1, ""))[1]
        texts[row] = tuple(_triggered(text, data.trigger) for text in own or ((usual,) if usual else ()))
        if not texts[row]:
            bare.append(name)
    problems = []
    if strange:
        problems.append(f"{pictures.source}: captions that cannot be used: {listed(strange, say=str, between='; ')}")
    if bare:
        file = PurePosixPath(bare[0]).with_suffix(".txt").name
        problems.append(
            f"{pictures.source}: {len(bare):,} of {len(pictures):,} pictures have no caption: {listed(bare)}. Write it "
            f"into {file} beside the picture, and so on, or all into metadata.jsonl with file_name and text; or say "
            "data.caption=COLUMN; or data.instance_prompt='a photo of sks dog' for all that have none"
        )
    if problems:
        raise AdapterError("; ".join(problems))
    return texts


def _triggered(text: str, trigger: str | None) -> str:
    """The caption with the trigger before it, where it has it nowhere."""
    if not trigger or re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", text):
        return text
    return f"{trigger}, {text}"


def texts_of(said: Any) -> tuple[str, ...]:
    """The captions that a column says, or a file has, one a line. Raises `AdapterError` where they are none."""
    if isinstance(said, Path):
        try:
            said = said.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise AdapterError(f"{said.name} is not UTF-8; save it as UTF-8") from error
        except OSError as error:
            raise AdapterError(f"{said.name} cannot be read: {error.strerror or error}") from error
    every = said if isinstance(said, list | tuple | np.ndarray) else () if said is None else (said,)
    if not all(isinstance(text, str) for text in every):
        raise AdapterError(f"expected a caption, or a list of them, found {said!r:.80}")
    return tuple(text.strip() for text in every if text.strip())


def kohya_folders(parts: Iterable[Pictures]) -> dict[str, Repeats]:
    """(repeats, caption) of each folder, where all pictures lie in folders named like `10_sks dog`."""
    folders = {_folder(part.name(row)) for part in parts for row in part.rows.tolist()}
    found = {folder: own for folder in folders if (own := REPEATED.fullmatch(folder))}
    return {} if folders - set(found) else {folder: (int(own[1]), own[2].strip()) for folder, own in found.items()}


def _folder(name: str) -> str:
    return name.partition("/")[0] if "/" in name else ""


def _repeated(part: Captioned, folders: Mapping[str, Repeats], reporter: Reporter) -> Captioned:
    if not folders:
        return part
    rows = part.pictures.rows
    times = np.array([folders[_folder(part.pictures.name(row))][0] for row in rows.tolist()])
    told = [f"{name!r} {count} times" for name, (count, _) in sorted(folders.items())]
    reporter.say(
        f"{part.pictures.source}: folders named as kohya's scripts have them: an epoch has the pictures of "
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
        count = f"{len(small):,} of {len(pictures):,} pictures"
        reporter.say(f"{count} are smaller than what is learned, and {done}: {listed(small, 3, str)}")
    if moving := [pictures.name(row) for row in np.unique(pictures.rows).tolist() if looks.moves[row]]:
        reporter.say(f"of {len(moving):,} animated pictures the first frame is learned: {listed(moving, 3)}")
    if frame.own is None and lost and sum(lost) / len(lost) > 0.1:
        share = sum(lost) / len(lost)
        reporter.say(f"cropping cuts off {share:.0%} of the pictures on average; data.buckets=true would keep more")
