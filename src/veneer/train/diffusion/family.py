"""`Family`: what a kind of pipeline is to the training: its parts, how they are called, what they are told."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.core.errors import AdapterError, listed, named
from veneer.files.pipeline import INDEX
from veneer.safe.stored import parsed, read_bytes
from veneer.train.diffusion.objective_settings import ObjectiveSettings
from veneer.train.diffusion.schedule import Schedule, schedule_of
from veneer.train.sameness import digest_of_base

Conditions = dict[str, Tensor]  # what the denoiser is told, a row for each picture

# the pipelines' classes, as model_index.json has them, and who knows them
FAMILIES = {
    "StableDiffusionPipeline": "stable_diffusion:StableDiffusion",
    "StableDiffusionXLPipeline": "stable_diffusion_xl:StableDiffusionXL",
    "WuerstchenPriorPipeline": "wuerstchen:WuerstchenPrior",
    "WuerstchenCombinedPipeline": "wuerstchen:WuerstchenPrior",
}


class Family(ABC):
    """A pipeline's parts, frozen, and how the denoiser learns from them."""

    name: ClassVar[str]
    denoiser: ClassVar[str] = "unet"  # the part that learns
    encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    seer: ClassVar[str] = "vae"  # the part that makes latents of pictures
    folder: Path
    parts: dict[str, nn.Module]  # by the pipeline's names; text encoders and seer are not needed where all is cached
    scheduler: Any  # diffusers'
    tokenizer: Any  # of the first text encoder
    factor: int  # pixels, of a side, for a latent's point
    channels: int  # of a latent
    kept: int  # channels of what is kept of a picture
    resolution: int  # the side in pixels that the base was made for
    draws: bool = True  # its pipeline makes pictures, and not latents alone
    step: ClassVar[int] = 8  # of the widths and heights that it draws

    @classmethod
    @abstractmethod
    def load(cls, folder: Path, dtype: str | None, device: torch.device) -> "Family":
        """The parts from a folder on this machine. Raises `AdapterError` that names what lacks or cannot be read."""

    @abstractmethod
    def encode_pictures(self, pixels: Tensor) -> Tensor:
        """What is kept of pictures `(n, 3, height, width)` in [-1, 1], in fp32: of a VAE its moments
        `(n, 2 · channels, height / factor, width / factor)`.
        """

    @abstractmethod
    def latents_of(self, kept: Tensor, noise: Tensor) -> Tensor:
        """The latents `(n, channels, height / factor, width / factor)` as the denoiser sees them: of a VAE
        (mean + deviation · noise) · scale.
        """

    @abstractmethod
    def tokens(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """The captions' numbers `(n, length)` for each text encoder, on the CPU."""

    def too_long(self, captions: Sequence[str]) -> list[str]:
        """Those of the captions whose end the text encoders do not read."""
        numbers = self.tokenizer(list(captions), verbose=False).input_ids if captions else []
        most = self.tokenizer.model_max_length
        return [caption for caption, own in zip(captions, numbers, strict=True) if len(own) > most]

    @abstractmethod
    def encode_tokens(self, tokens: Mapping[str, Tensor]) -> Conditions:
        """What the denoiser is told of captions; with gradients, where the text encoders learn."""

    def encode_texts(self, captions: Sequence[str]) -> Conditions:
        """What the denoiser is told of captions."""
        device = next(self.parts[self.encoders[0]].parameters()).device
        return self.encode_tokens({key: value.to(device) for key, value in self.tokens(captions).items()})

    @abstractmethod
    def predict(self, noisy: Tensor, t: Tensor, conditions: Conditions, sizes: Tensor) -> Tensor:
        """The denoiser's answer, in fp32, of the latents' shape. `t` `(n,)` is the schedule's; `sizes` `(n, 6)` are
        height and width of the picture as it was, top and left of the crop, height and width of what is seen.
        """

    @abstractmethod
    def pipeline(self) -> Any:
        """A diffusers pipeline of these same live parts, to draw pictures with."""

    def schedule(self, settings: ObjectiveSettings) -> Schedule:
        """ᾱ(t) and what is predicted, as the base's scheduler or else the recipe says."""
        return schedule_of(self.scheduler, settings)

    def part(self, name: str) -> nn.Module:
        """The part of that name. Raises `AdapterError` where the base has none."""
        return self.parts[name]

    def drawn(self, size: tuple[int, int]) -> tuple[int, int]:
        """Width and height of what is drawn where pictures of `size` were learned."""
        return size

    def digest(self, *names: str) -> str:
        """A name for what these parts, and the tokenizers, are."""
        folders = [self.folder / name for name in names]
        if not all(folder.is_dir() for folder in folders):  # a family that calls them otherwise
            return digest_of_base(self.folder)
        return sha256(
            " ".join(map(digest_of_base, folders + sorted(self.folder.glob("*tokenizer*")))).encode()
        ).hexdigest()

    def move(self, names: Iterable[str], device: torch.device) -> None:
        """Put parts on a device."""
        for name in names:
            if name in self.parts:
                self.parts[name].to(device)


def family_of(folder: Path) -> type[Family]:
    """Who knows the pipeline in a folder. Raises `AdapterError` where it is none, or one that nobody knows."""
    path = folder / INDEX
    if not path.is_file():
        raise AdapterError(f"base {folder} is no diffusers pipeline: it has no {INDEX}")
    kind = parsed(read_bytes(path), str(path)).get("_class_name")
    if kind not in FAMILIES:
        raise AdapterError(f"base {folder} is a {named(str(kind))}; pipelines that can be trained: {listed(FAMILIES)}")
    module, _, attribute = FAMILIES[kind].partition(":")
    found: type[Family] = getattr(import_module(f"veneer.train.diffusion.{module}"), attribute)
    return found
