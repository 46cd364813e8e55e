"""Tiny genuine diffusers pipelines with random weights, whole, as objects and as the folders that they are had in.

A tokenizer knows every letter, so that no two captions look the same to a pipeline.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMWuerstchenScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

WIDTH, WIDTH_2 = 12, 16  # of the text encoders
LENGTH = 24  # tokens of a caption
FACTOR = 4  # pixels of a latent point, in each direction
CHANNELS = 4  # of Würstchen's latents
_CROSS = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
_PLAIN = "DownBlock2D", "UpBlock2D"
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@cache
def tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """CLIP's own, of letters alone: a token for a byte, and another for one that ends a word."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], pad_token=pad, model_max_length=LENGTH)


def encoder(width: int, projected: bool = False, **more: object) -> nn.Module:
    """CLIP's text encoder, of two layers."""
    sizes = {"hidden_size": width, "intermediate_size": width + 8, "projection_dim": width, "num_attention_heads": 2}
    tokens = {"vocab_size": 24, "max_position_embeddings": 6, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    config = CLIPTextConfig(**{"num_hidden_layers": 2, **sizes, **tokens, **more})
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def unet(crossed: tuple[bool, ...], widths: tuple[int, ...], **more: object) -> nn.Module:
    """Blocks from the outermost to the innermost, with cross-attention or without it."""
    down = tuple(_CROSS[0] if each else _PLAIN[0] for each in crossed)
    up = tuple(_CROSS[1] if each else _PLAIN[1] for each in reversed(crossed))
    usual = {"sample_size": 8, "attention_head_dim": 2, "cross_attention_dim": WIDTH, "norm_num_groups": 4}
    shape = {"block_out_channels": widths, "down_block_types": down, "up_block_types": up, "layers_per_block": 2}
    return UNet2DConditionModel(**{**usual, **shape, **more})


def sizes_told(width: int = WIDTH_2) -> dict[str, object]:
    """What lets a U-Net see the pooled text, with six numbers of sizes."""
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    return {**added, "projection_class_embeddings_input_dim": width + 6 * 4}


def vae(**more: object) -> nn.Module:
    """`FACTOR` pixels to a point of four numbers."""
    shape = {"block_out_channels": (4, 4, 8), "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 32}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    return AutoencoderKL(**{**shape, **blocks, **more})


def _reading(width: int, projected: bool = False, **more: object) -> nn.Module:
    words = tokenizer()
    tokens = {"vocab_size": len(words), "max_position_embeddings": LENGTH, "bos_token_id": words.bos_token_id}
    ends = {"eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    return encoder(width, projected, **tokens, **ends, **more)


def _stable_diffusion(scheduler: Any, text: dict[str, object], **more: object) -> DiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=_reading(WIDTH, **text),
        tokenizer=tokenizer(),
        unet=unet((True, False), (8, 16), layers_per_block=1, **more),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _first() -> DiffusionPipeline:
    return _stable_diffusion(PNDMScheduler(**_BETAS, skip_prk_steps=True, steps_offset=1), {"hidden_act": "quick_gelu"})


def _second() -> DiffusionPipeline:
    """It predicts v, its projections are linear layers, its heads differ from block to block."""
    scheduler = DDIMScheduler(
        **_BETAS, prediction_type="v_prediction", steps_offset=1, clip_sample=False, set_alpha_to_one=False
    )
    shape = {"use_linear_projection": True, "attention_head_dim": [2, 4]}
    return _stable_diffusion(scheduler, {"hidden_act": "gelu"}, **shape)


def _xl() -> DiffusionPipeline:
    """Text goes in twice: side by side as the cross-attention's input, and pooled, with six numbers of sizes. Its U-Net
    has the real one's blocks, as names in files count them.
    """
    shape = {"transformer_layers_per_block": [1, 1, 2], "use_linear_projection": True}
    width = WIDTH + WIDTH_2
    return StableDiffusionXLPipeline(
        vae=vae(force_upcast=True, scaling_factor=0.13025),
        text_encoder=_reading(WIDTH),
        text_encoder_2=_reading(WIDTH_2, projected=True, num_hidden_layers=3),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer("!"),
        unet=unet((False, True, True), (4, 8, 12), cross_attention_dim=width, **sizes_told(), **shape),
        scheduler=EulerDiscreteScheduler(**_BETAS, steps_offset=1, timestep_spacing="leading"),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def _prior() -> DiffusionPipeline:
    """Würstchen's stage C: from text to the latents of a picture."""
    from diffusers import WuerstchenPriorPipeline
    from diffusers.pipelines.deprecated.wuerstchen import WuerstchenPrior

    prior = WuerstchenPrior(c_in=CHANNELS, c=16, c_cond=WIDTH, c_r=8, depth=2, nhead=2)
    nn.init.normal_(prior.out[1].weight, std=0.02)  # what it says is divided by about 1, as in a trained one
    return WuerstchenPriorPipeline(
        tokenizer=tokenizer(),
        text_encoder=_reading(WIDTH),
        prior=prior,
        scheduler=DDPMWuerstchenScheduler(),
    )


def _decoder() -> DiffusionPipeline:
    """Würstchen's stages B and A: from those latents to the picture."""
    from diffusers import WuerstchenDecoderPipeline
    from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel, WuerstchenDiffNeXt

    decoder = WuerstchenDiffNeXt(
        c_r=8,
        c_cond=8,
        c_hidden=[8, 8],
        nhead=[-1, 2],
        blocks=[1, 1],
        level_config=["CT", "CTA"],
        inject_effnet=[False, True],
        effnet_embd=CHANNELS,
        clip_embd=WIDTH,
    )
    vqgan = PaellaVQModel(bottleneck_blocks=1, embed_dim=8, num_vq_embeddings=16)
    for module in decoder.modules():  # whose blocks say next to nothing when they are new, and clf nothing
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.reset_parameters()
    for name, parameter in vqgan.named_parameters():
        if "gammas" in name:
            nn.init.normal_(parameter, std=0.3)  # which are zero too
    scheduler = DDPMWuerstchenScheduler()
    return WuerstchenDecoderPipeline(tokenizer(), _reading(WIDTH), decoder, scheduler, vqgan)


KINDS: dict[str, Callable[[], DiffusionPipeline]] = {
    "sd1": _first,
    "sd2": _second,
    "sdxl": _xl,
    "wuerstchen-prior": _prior,
    "wuerstchen-decoder": _decoder,
}


def made(kind: str) -> Any:
    """A pipeline of that kind, frozen and still; the same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        pipeline = KINDS[kind]()
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def saved(kind: str, folder: Path) -> Path:
    """The folder, with a pipeline of that kind inside as diffusers saves it."""
    made(kind).save_pretrained(folder)
    return folder


def seeing(folder: Path) -> Path:
    """The folder of Würstchen's prior, with its image encoder where veneer looks for it."""
    (folder / "image_encoder").mkdir()
    save_file(efficient_net(), folder / "image_encoder" / "model.safetensors")
    return folder


def efficient_net() -> dict[str, Tensor]:
    """A tiny EfficientNetV2's weights by torchvision's names: three stages fused, two with gates, and the mapper."""
    shapes: dict[str, tuple[int, ...]] = {}

    def normed(name: str, *shape: int) -> None:
        shapes[f"{name}.0.weight"] = shape
        shapes.update({f"{name}.1.{own}": shape[:1] for own in ("weight", "bias", "running_mean", "running_var")})
        shapes[f"{name}.1.num_batches_tracked"] = ()

    normed("backbone.0", 4, 3, 3, 3)
    normed("backbone.1.0.block.0", 4, 4, 3, 3)
    for stage, seen, made_of in ((2, 4, 6), (3, 6, 6)):
        normed(f"backbone.{stage}.0.block.0", 8, seen, 3, 3)
        normed(f"backbone.{stage}.0.block.1", made_of, 8, 1, 1)
    for stage, block, seen, made_of in ((4, 0, 6, 8), (5, 0, 8, 8), (6, 0, 8, 8), (6, 1, 8, 8)):
        name = f"backbone.{stage}.{block}.block"
        normed(f"{name}.0", 12, seen, 1, 1)
        normed(f"{name}.1", 12, 1, 3, 3)
        shapes.update({f"{name}.2.fc1.weight": (2, 12, 1, 1), f"{name}.2.fc1.bias": (2,)})
        shapes.update({f"{name}.2.fc2.weight": (12, 2, 1, 1), f"{name}.2.fc2.bias": (12,)})
        normed(f"{name}.3", made_of, 12, 1, 1)
    normed("backbone.7", 10, 8, 1, 1)
    normed("mapper", CHANNELS, 10, 1, 1)
    torch.manual_seed(5)
    return {name: _drawn(name, shape) for name, shape in shapes.items()}


def _drawn(name: str, shape: tuple[int, ...]) -> Tensor:
    if name.endswith("tracked"):
        return torch.tensor(0)
    return torch.rand(shape) + 0.5 if name.endswith((".1.weight", "var")) else torch.randn(shape) / 3
