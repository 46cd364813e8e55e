"""Stable Diffusion 1.x and 2.x (Rombach et al. 2021, arXiv:2112.10752): a UNet over a VAE's latents, told by CLIP."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.errors import AdapterError
from veneer.files.pipeline import load_part, part_kinds
from veneer.train.bases.loading import load_tokenizer, quiet
from veneer.train.diffusion.family import Conditions, Family


class StableDiffusion(Family):
    """ε or v of `unet(noisy, t, text)`."""

    name = "stable-diffusion"

    def __init__(self, folder: Path, parts: dict[str, nn.Module], tokenizer: Any, scheduler: Any) -> None:
        self.folder, self.parts, self.tokenizer, self.scheduler = folder, parts, tokenizer, scheduler
        unet, vae = self.config("unet"), self.config("vae")
        self.channels, self.kept = unet.in_channels, 2 * unet.in_channels
        if self.channels != vae.latent_channels:
            raise AdapterError(
                f"base {folder}: its unet takes {self.channels} channels and its vae makes {vae.latent_channels}: "
                "pipelines for inpainting, depth or instructions are not trained"
            )
        self.factor = 2 ** (len(vae.block_out_channels) - 1)
        size = unet.sample_size
        self.resolution = self.factor * (size if isinstance(size, int) else min(size))

    @classmethod
    def load(cls, folder: Path, dtype: str | None, device: torch.device) -> "StableDiffusion":
        parts = load_parts(folder, (cls.denoiser, *cls.encoders, cls.seer), dtype, device, wide=cls.seer)
        draws_in(parts[cls.seer], dtype)
        return cls(folder, parts, load_tokenizer(folder / "tokenizer"), load_scheduler(folder))

    def config(self, part: str) -> Any:
        """The config of a part."""
        return self.parts[part].config

    def encode_pictures(self, pixels: Tensor) -> Tensor:
        vae: Any = self.parts["vae"]
        own = next(vae.encoder.parameters())
        moments: Tensor = vae.encode(pixels.to(own.device, own.dtype)).latent_dist.parameters
        return moments.float()

    def latents_of(self, kept: Tensor, noise: Tensor) -> Tensor:
        return vae_latents(kept, noise, self.config("vae"))

    def tokens(self, captions: Sequence[str]) -> dict[str, Tensor]:
        return {"text_encoder": padded(self.tokenizer, captions)}

    def encode_tokens(self, tokens: Mapping[str, Tensor]) -> Conditions:
        encoder: Any = self.parts["text_encoder"]
        return {"text": encoder(tokens["text_encoder"])[0]}  # (n, length, width)

    def predict(self, noisy: Tensor, t: Tensor, conditions: Conditions, sizes: Tensor) -> Tensor:
        unet: Any = self.parts["unet"]
        text = conditions["text"].to(unet.dtype)
        answer: Tensor = unet(noisy.to(unet.dtype), t, encoder_hidden_states=text, return_dict=False)[0]
        return answer.float()

    def pipeline(self) -> Any:
        with quiet():  # also while diffusers is imported
            from diffusers import StableDiffusionPipeline

            return StableDiffusionPipeline(
                **self.parts,
                tokenizer=self.tokenizer,
                scheduler=self.scheduler,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )


def load_parts(
    folder: Path, names: Sequence[str], dtype: str | None, device: torch.device, wide: str = ""
) -> dict[str, nn.Module]:
    """Models of a pipeline's folder, frozen, in `dtype` (None: as stored), or in float32 the one that is `wide`. Raises
    one `AdapterError` for all.
    """
    kinds, found, faults = part_kinds(folder), dict[str, nn.Module](), []
    for name in names:
        if name not in kinds:
            faults.append(f"base {folder}: its model_index.json names no {name}")
            continue
        try:
            with quiet():
                own = "float32" if dtype and name == wide else dtype
                model: nn.Module = load_part(folder / name, kinds[name], own)[0]
        except AdapterError as error:
            faults.append(f"base {error}")
            continue
        found[name] = model.to(device).requires_grad_(False).eval()
    if faults:
        raise AdapterError("\n".join(faults))
    return found


def draws_in(vae: nn.Module, dtype: str | None) -> None:
    """Let the half of a VAE that draws be in `dtype`; the half that sees stays in float32, as latents are kept."""
    for name, half in vae.named_children():
        if dtype and name in ("decoder", "post_quant_conv"):
            half.to(getattr(torch, dtype))


def load_scheduler(folder: Path, part: str = "scheduler") -> Any:
    """The scheduler of a pipeline's folder."""
    import diffusers

    kinds = part_kinds(folder)
    library, name = kinds.get(part, ("", ""))
    made_by = getattr(diffusers, name, None) if library == "diffusers" else None
    if made_by is None or not (folder / part / "scheduler_config.json").is_file():
        raise AdapterError(f"base {folder}: expected {part}/scheduler_config.json and its class in model_index.json")
    with quiet():
        return made_by.from_pretrained(folder / part, local_files_only=True)


def padded(tokenizer: Any, captions: Sequence[str]) -> Tensor:
    """The captions' numbers `(n, length)`, cut and filled up as CLIP was trained."""
    length = tokenizer.model_max_length
    found = tokenizer(list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    numbers: Tensor = found.input_ids
    return numbers


def vae_latents(kept: Tensor, noise: Tensor, config: Any) -> Tensor:
    """(mean + deviation · noise - shift) · scale, of a VAE's moments; the logarithm of the variance is bounded. A VAE
    may say the mean and the deviation of its latents, a number a channel, to be shifted and divided by.
    """
    mean, spread = kept.float().chunk(2, dim=1)
    deviation = torch.exp(0.5 * spread.clamp(-30.0, 20.0))
    shift = getattr(config, "shift_factor", None) or 0.0
    latents: Tensor = mean + deviation * noise - shift
    if config.get("latents_mean") and config.get("latents_std"):
        centre, width = (mean.new_tensor(config[key]).view(-1, 1, 1) for key in ("latents_mean", "latents_std"))
        latents = (latents - centre) / width
    return latents * config.scaling_factor
