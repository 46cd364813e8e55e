"""Würstchen's prior (Pernias et al. 2023, arXiv:2306.00637): from text to the latents of a picture, 42 times smaller.

Its image encoder is no part of the folders that it is had in. It is read from `image_encoder/` in them, a safetensors
file of an EfficientNetV2 with its mapper; without it, latents that were computed elsewhere can be learned.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.errors import AdapterError
from veneer.files.parts import prior_places
from veneer.files.pipeline import INDEX, load_components, part_kinds
from veneer.safe.stored import parsed, read_bytes
from veneer.train.bases.loading import load_tokenizer, quiet
from veneer.train.diffusion.efficient_net import FACTOR, EfficientNetEncoder
from veneer.train.diffusion.family import Conditions, Family
from veneer.train.diffusion.painter import STEP_OF_A_PRIOR
from veneer.train.diffusion.stable_diffusion import load_parts, load_scheduler

SEER = "image_encoder"
_DECODER = ("tokenizer", "text_encoder", "decoder", "scheduler", "vqgan")


class WuerstchenPrior(Family):
    """ε of `prior(noisy, t, text)`, t in [0, 1)."""

    name = "wuerstchen-prior"
    denoiser = "prior"
    seer = SEER
    factor = FACTOR
    resolution, step = 768, STEP_OF_A_PRIOR

    def __init__(self, folder: Path, parts: dict[str, nn.Module], tokenizer: Any, scheduler: Any) -> None:
        self.folder, self.parts, self.tokenizer, self.scheduler = folder, parts, tokenizer, scheduler
        prior: Any = parts["prior"]
        self.channels = self.kept = prior.config.c_in
        index = parsed(read_bytes(folder / INDEX), str(folder / INDEX))
        # as the pipeline names them: its latents are mean · x - deviation
        self.mean, self.deviation = index.get("latent_mean", 42.0), index.get("latent_std", 1.0)
        self.multiple = index.get("resolution_multiple", 42.67)  # pixels that are drawn of a latent's point
        self.places = prior_places(part_kinds(folder))
        self.draws, self.decoder = bool(self.places), dict[str, Any]()

    @classmethod
    def load(cls, folder: Path, dtype: str | None, device: torch.device) -> "WuerstchenPrior":
        places = prior_places(part_kinds(folder)) or {part: part for part in ("prior", "text_encoder")}
        found = load_parts(folder, tuple(places.values()), dtype, device)
        parts = {part: found[place] for part, place in places.items()}
        files = sorted((folder / SEER).glob("*.safetensors"))
        if len(files) > 1:
            raise AdapterError(f"base {folder}: expected one safetensors file in {SEER}, found {len(files)}")
        if files:
            encoder = EfficientNetEncoder.load(files[0])
            parts[SEER] = encoder.to(device, torch.float32).requires_grad_(False).eval()
        level = "prior_" if places["prior"] != "prior" else ""
        tokenizer = load_tokenizer(folder / f"{level}tokenizer")
        return cls(folder, parts, tokenizer, load_scheduler(folder, f"{level}scheduler"))

    def part(self, name: str) -> nn.Module:
        if name == SEER and name not in self.parts:
            raise AdapterError(
                f"base {self.folder} has no {SEER}, which makes latents of pictures: put the safetensors file of "
                f"Würstchen's EfficientNet into {self.folder / SEER}, or say data.latents, computed elsewhere"
            )
        return super().part(name)

    def encode_pictures(self, pixels: Tensor) -> Tensor:
        encoder = self.part(SEER)
        with torch.no_grad():
            kept: Tensor = encoder(pixels.to(next(encoder.parameters()).device, torch.float32))
        return kept

    def latents_of(self, kept: Tensor, noise: Tensor) -> Tensor:
        """(e + 1) / 42; nothing of it is drawn."""
        return (kept.float() + self.deviation) / self.mean

    def tokens(self, captions: Sequence[str]) -> dict[str, Tensor]:
        length = self.tokenizer.model_max_length
        options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
        found = self.tokenizer(list(captions), **options)
        return {"text_encoder": found.input_ids, "attended": found.attention_mask}

    def encode_tokens(self, tokens: Mapping[str, Tensor]) -> Conditions:
        encoder: Any = self.parts["text_encoder"]
        said = encoder(tokens["text_encoder"], attention_mask=tokens["attended"])
        return {"text": said.last_hidden_state}  # (n, length, width)

    def predict(self, noisy: Tensor, t: Tensor, conditions: Conditions, sizes: Tensor) -> Tensor:
        prior: Any = self.parts["prior"]
        text = conditions["text"].to(prior.dtype)
        answer: Tensor = prior(noisy.to(prior.dtype), t.to(prior.dtype), text)
        return answer.float()

    def digest(self, *names: str) -> str:
        return super().digest(*(self.places.get(name, name) for name in names))

    def drawn(self, size: tuple[int, int]) -> tuple[int, int]:
        """As large as its decoder makes of so many latents, 42.67 pixels of each side of one."""
        width, height = (max(1, round(side / self.factor * self.multiple / self.step)) for side in size)
        return width * self.step, height * self.step

    def pipeline(self) -> Any:
        """The prior's, which draws latents; with the decoder too, which draws pictures, where the folder has it."""
        prior: Any = self.parts["prior"]
        own = {"prior": prior, "text_encoder": self.parts["text_encoder"]}
        own |= {"tokenizer": self.tokenizer, "scheduler": self.scheduler}
        with quiet():  # also while diffusers is imported
            from diffusers import WuerstchenCombinedPipeline, WuerstchenPriorPipeline

            if not self.draws:
                numbers = {"latent_mean": self.mean, "latent_std": self.deviation}
                return WuerstchenPriorPipeline(**own, **numbers, resolution_multiple=self.multiple)
            if not self.decoder:
                dtype = str(prior.dtype).removeprefix("torch.")
                self.decoder = load_components(self.folder, _DECODER, dtype)
            for part in self.decoder.values():
                if isinstance(part, nn.Module):
                    part.requires_grad_(False).to(prior.device)
            return WuerstchenCombinedPipeline(**self.decoder, **{f"prior_{part}": one for part, one in own.items()})
