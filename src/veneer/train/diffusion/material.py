"""What a denoiser is given of pictures and captions, row by row, and batches of it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

from veneer.core.errors import listed
from veneer.train.diffusion.cache import Seen, given_latents, made_by, seen_latents, told_texts
from veneer.train.diffusion.captions import Captioned
from veneer.train.diffusion.data_settings import CaptionedData
from veneer.train.diffusion.draws import Draw, Moment, generator, stacked
from veneer.train.diffusion.family import Family
from veneer.train.diffusion.objective import Objective
from veneer.train.task import Batch, Reporter

TOLD = "told "  # before the names of what the denoiser is told, among a batch's tensors
Tell = Callable[[str], dict[str, Tensor]]


@dataclass(frozen=True)
class Item:
    """One picture as it is learned, or measured, this time."""

    kept: Tensor  # what the encoder made of it
    told: dict[str, Tensor]
    sizes: tuple[int, ...]
    draw: Draw
    spread: Tensor  # noise that says which of the encoder's latents it is
    share: float  # how much its loss counts
    units: int
    place: str


class Material:
    """The pictures of one source, with what the encoders make of them and of their captions."""

    def __init__(self, part: Captioned, seen: Seen, tell: Tell, family: Family) -> None:
        self.part, self.seen, self.tell, self.family = part, seen, tell, family

    def __len__(self) -> int:
        return len(self.part)

    def learned(
        self, objective: Objective, row: int, moment: Moment, number: int | None = None, share: float = 1.0
    ) -> Item:
        """A picture as it is learned this time. With a `number` other than its row's, by which all is drawn, it stands
        beside another picture and is no unit of its own.
        """
        beside, number = number is not None, row if number is None else number
        seed = objective.settings.seed
        random = Random(f"{seed} seen {moment.step} {number} {moment.turn}")
        view = self.part.view(row, random)
        kept, told = self.seen(row, view), self.tell(self.part.caption(row, random))
        shape = self._shape(kept)
        draw = objective.draw(shape, number, moment)
        spread = torch.randn(*shape, generator=generator(seed, "spread", moment.step, number, moment.turn))
        return Item(kept, told, view.sizes, draw, spread, share, 0 if beside else 1, self.part.place(row))

    def measured(self, objective: Objective, row: int, rows: int, number: int, times: int) -> list[Item]:
        """A picture, number `number` of `rows`, as it is measured: always in the same way."""
        view = self.part.view(row)
        kept, told = self.seen(row, view), self.tell(self.part.caption(row))
        shape = self._shape(kept)
        draws = objective.held_out(shape, number, rows, times)
        place = self.part.place(row)
        return [Item(kept, told, view.sizes, draw, torch.zeros(shape), 1.0, 1, place) for draw in draws]

    def _shape(self, kept: Tensor) -> tuple[int, ...]:
        return (self.family.channels, *kept.shape[1:])


def batches(items: Iterable[Item], family: Family, device: torch.device) -> list[Batch]:
    """Pictures of one size together, in their order."""
    groups: dict[tuple[int, ...], list[Item]] = {}
    for item in items:
        groups.setdefault(tuple(item.kept.shape), []).append(item)
    return [_batch(own, family, device) for own in groups.values()]


def _batch(items: Sequence[Item], family: Family, device: torch.device) -> Batch:
    draw = stacked([item.draw for item in items]).to(device)
    kept, spread = (torch.stack(own).to(device) for own in zip(*((i.kept, i.spread) for i in items), strict=True))
    inputs = {
        "x": family.latents_of(kept, spread),  # (n, channels, height, width)
        "t": draw.t,
        "noise": draw.noise,
        "sizes": torch.tensor([item.sizes for item in items], dtype=torch.float32, device=device),
        "share": torch.tensor([item.share for item in items], device=device),
    }
    if draw.mixed is not draw.noise:
        inputs["mixed"] = draw.mixed
    for name in items[0].told:
        inputs[TOLD + name] = torch.stack([item.told[name] for item in items]).to(device)
    return Batch(inputs, sum(item.units for item in items), len(items), [item.place for item in items])


def draw_of(batch: Batch) -> Draw:
    """The timesteps and noises of a batch."""
    own = batch.inputs
    return Draw(own["t"], own["noise"], own.get("mixed", own["noise"]))


def told_of(batch: Batch) -> dict[str, Tensor]:
    """What the denoiser is told of a batch."""
    return {name.removeprefix(TOLD): own for name, own in batch.inputs.items() if name.startswith(TOLD)}


class Encoders:
    """The frozen encoders at work: what they make is kept on the disk, or made each time."""

    def __init__(self, family: Family, data: CaptionedData, learning: bool, reporter: Reporter) -> None:
        """`learning`: the text encoders learn, and so are asked at each step."""
        self.family, self.data, self.learning, self.reporter = family, data, learning, reporter
        self.made: dict[str, dict[str, Any]] = {}

    def material(self, part: Captioned, latents: str | None = None) -> Material:
        """What the encoders make of a source; `latents` is the file that has those of its pictures."""
        family, data = self.family, self.data
        seen = given_latents(latents, part, self.family.kept) if latents else self._seen(part)
        if cut := family.too_long(part.spoken()):
            most = family.tokenizer.model_max_length
            told = f"captions longer than the {most} tokens that the text encoders read are cut ({len(cut):,})"
            self.reporter.say(f"{part.pictures.source}: {told}: {listed(cut, 2)}")
        if self.learning:
            return Material(part, seen, self._numbers, family)
        tell = told_texts(part.spoken(), family.encode_texts, self._by("texts"), data.cache, self.reporter)
        return Material(part, seen, tell, family)

    def _numbers(self, caption: str) -> dict[str, Tensor]:
        return {name: own[0] for name, own in self.family.tokens([caption]).items()}

    def _seen(self, part: Captioned) -> Seen:
        return seen_latents(part, self.family.encode_pictures, self._by("pictures"), self.data.cache, self.reporter)

    def _by(self, what: str) -> dict[str, Any]:
        """What decides what the encoders make of texts, or of pictures."""
        if what not in self.made and self.data.cache:
            names = self.family.encoders if what == "texts" else (self.family.seer,)
            own = next(self.family.part(names[0]).parameters())
            self.made[what] = made_by(self.family.digest(*names), own.dtype, own.device)
        return self.made.get(what, {})


def is_still(own: Material) -> bool:
    """Whether each picture is always seen in the same part."""
    part = own.part
    return part.frame.still(map(part.original, range(len(part))))
