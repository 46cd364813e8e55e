"""Stable Diffusion XL (Podell et al. 2023, arXiv:2307.01952): told by two text encoders, and of sizes."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.files.pipeline import INDEX
from veneer.safe.stored import parsed, read_bytes
from veneer.train.bases.loading import load_tokenizer, quiet
from veneer.train.diffusion.family import Conditions
from veneer.train.diffusion.stable_diffusion import StableDiffusion, draws_in, load_parts, load_scheduler, padded

_CONFIG = "config.json"


class StableDiffusionXL(StableDiffusion):
    """ε or v of `unet(noisy, t, text, pooled, sizes)`."""

    name = "stable-diffusion-xl"
    encoders = ("text_encoder", "text_encoder_2")

    def __init__(
        self, folder: Path, parts: dict[str, nn.Module], tokenizer: Any, tokenizer_2: Any, scheduler: Any
    ) -> None:
        super().__init__(folder, parts, tokenizer, scheduler)
        self.tokenizer_2 = tokenizer_2
        index = parsed(read_bytes(folder / INDEX), str(folder / INDEX))
        self.silent = bool(index.get("force_zeros_for_empty_prompt", True))
        self.nothing = self.tokens([""])

    @classmethod
    def load(cls, folder: Path, dtype: str | None, device: torch.device) -> "StableDiffusionXL":
        """Its VAE overflows in half precision, and is in float32 unless it says that it does not."""
        parts = load_parts(folder, (cls.denoiser, *cls.encoders, cls.seer), dtype, device, wide=cls.seer)
        config = folder / cls.seer / _CONFIG
        upcast = not config.is_file() or parsed(read_bytes(config), str(config)).get("force_upcast", True)
        if upcast:
            parts[cls.seer].float()
        else:
            draws_in(parts[cls.seer], dtype)
        first, second = load_tokenizer(folder / "tokenizer"), load_tokenizer(folder / "tokenizer_2")
        return cls(folder, parts, first, second, load_scheduler(folder))

    def tokens(self, captions: Sequence[str]) -> dict[str, Tensor]:
        readers = zip(self.encoders, (self.tokenizer, self.tokenizer_2), strict=True)
        return {name: padded(tokenizer, captions) for name, tokenizer in readers}

    def encode_tokens(self, tokens: Mapping[str, Tensor]) -> Conditions:
        """What the last layers but one say, side by side, and the pooled text of the second encoder. An empty caption
        is zeros where the pipeline says so, as it is to its sampler.
        """
        text, pooled = [], torch.empty(0)
        for name in self.encoders:
            encoder: Any = self.parts[name]
            said = encoder(tokens[name], output_hidden_states=True)
            text.append(said.hidden_states[-2])
            pooled = said[0]  # (n, width of the second one)
        found = {"text": torch.cat(text, dim=-1), "pooled": pooled}  # text (n, length, both widths)
        if self.silent:
            first = self.encoders[0]
            empty = (tokens[first] == self.nothing[first].to(tokens[first].device)).all(dim=1)
            if empty.any():
                found = {key: own.masked_fill(empty.view(-1, *[1] * (own.ndim - 1)), 0.0) for key, own in found.items()}
        return found

    def predict(self, noisy: Tensor, t: Tensor, conditions: Conditions, sizes: Tensor) -> Tensor:
        unet: Any = self.parts["unet"]
        added = {"text_embeds": conditions["pooled"].to(unet.dtype), "time_ids": sizes.to(noisy.device, torch.float32)}
        text = conditions["text"].to(unet.dtype)
        answer: Tensor = unet(
            noisy.to(unet.dtype), t, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False
        )[0]
        return answer.float()

    def pipeline(self) -> Any:
        vae: Any = self.parts["vae"]
        dtype: Any = self.parts["unet"].dtype
        parts = self.parts if vae.dtype == dtype else {**self.parts, "vae": deepcopy(vae).to(dtype)}  # as it draws
        with quiet():  # also while diffusers is imported
            from diffusers import StableDiffusionXLPipeline

            return StableDiffusionXLPipeline(
                **parts,
                tokenizer=self.tokenizer,
                tokenizer_2=self.tokenizer_2,
                scheduler=self.scheduler,
                force_zeros_for_empty_prompt=self.silent,
                add_watermarker=False,
            )
