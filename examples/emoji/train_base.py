"""A text-to-image pipeline from nothing: the base `emoji`, as veneer ships it.

    python examples/emoji/train_base.py emoji --packages FOLDER        # where the .tgz files of pictures.py lie

Four trainings, one after the other: an autoencoder on both styles; a UNet together with its text encoder on the flat
pictures, by v-prediction (Salimans and Ho 2022, arXiv:2202.00512) with zero terminal SNR (Lin et al. 2023,
arXiv:2305.08891); the decoder again, on sharp edges. On two cores with matrix units the default steps took 76 minutes.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from pictures import FLAT, HIGH_CONTRAST, bodies, caption, high_contrast, render, subjects

TOKENS, LENGTH = 1058, 24  # of the tokenizer, and at most of a caption
START, END = "<|startoftext|>", "<|endoftext|>"
EMPTY = 0.1  # share of the captions that are left out, for guidance
AVERAGE = 0.999  # of the weights, a step

Loss = Callable[[Tensor], Tensor]  # of the rows of a batch


def main() -> None:
    """Train and save the whole pipeline, in half precision."""
    given = arguments()
    torch.manual_seed(given.seed)
    names = subjects(given.packages)
    drawn, lines = bodies(given.packages / FLAT), bodies(given.packages / HIGH_CONTRAST)
    flat = pixels(render(drawn[name]) for name in names)
    both = torch.cat([flat, pixels(high_contrast(lines[name]) for name in names)])
    captions = [caption(name) for name in names]
    print(f"{len(flat)} pictures, each in both styles")

    vae = autoencoder()
    train_autoencoder(vae, both, given.vae_steps)
    centre(vae, flat)
    tokenizer = learned_tokenizer(captions)
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )
    text_encoder, unet = train_denoiser(vae, scheduler, tokenizer, flat, captions, given.unet_steps)
    sharpen(vae, both, given.decoder_steps)
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(dtype=torch.float16).save_pretrained(given.out)
    print(f"the base is in {given.out}")


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder that gets the pipeline")
    parser.add_argument("--packages", type=Path, default=Path(), help="where the two .tgz files of npm lie")
    parser.add_argument("--vae-steps", type=int, default=650)
    parser.add_argument("--unet-steps", type=int, default=3474)
    parser.add_argument("--decoder-steps", type=int, default=1650)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def pixels(pictures: Iterable[Image.Image]) -> Tensor:
    """Pictures as `(n, 3, 64, 64)` in [-1, 1]."""
    found = [torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures]
    return torch.stack(found).float() / 127.5 - 1


def autoencoder() -> AutoencoderKL:
    """1.6 million parameters; 64×64 points become 16×16 of 4 channels."""
    return AutoencoderKL(
        block_out_channels=(32, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=16,
        sample_size=64,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    ).to(memory_format=torch.channels_last)


def train_autoencoder(vae: AutoencoderKL, pictures: Tensor, steps: int) -> None:
    """|x̂ - x| + 10⁻⁶ KL, whole."""

    def loss(rows: Tensor) -> Tensor:
        seen = pictures[rows]
        told = vae.encode(seen).latent_dist
        return functional.l1_loss(vae.decode(told.sample()).sample.float(), seen) + 1e-6 * told.kl().mean()

    for _ in trained("autoencoder", list(vae.parameters()), loss, len(pictures), steps, batch=24, lr=1e-3):
        pass


@torch.no_grad()
def centre(vae: AutoencoderKL, pictures: Tensor) -> None:
    """Fold each channel's mean m and deviation s over the pictures into the outermost convolutions:
    z' = (z - m) / s, its logarithm of the variance less 2 log s, and z = s z' + m again before the decoder.
    """
    means = torch.cat([vae.encode(part).latent_dist.mean for part in pictures.split(64)])
    m, s = means.mean((0, 2, 3)), means.std((0, 2, 3))  # (channels,)
    into, out = vae.quant_conv, vae.post_quant_conv
    channels = len(m)
    into.weight[:channels] /= s[:, None, None, None]
    into.bias[:channels] = (into.bias[:channels] - m) / s
    into.bias[channels:] -= 2 * s.log()
    out.bias += out.weight[:, :, 0, 0] @ m
    out.weight *= s[None, :, None, None]


def learned_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """CLIP's tokenizer with byte pairs of these captions."""
    learner = CLIPTokenizer(vocab={START: 0, END: 1}, merges=[]).train_new_from_iterator(captions, TOKENS)
    pairs = json.loads(learner.backend_tokenizer.to_str())["model"]["merges"]
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, pairs)][: TOKENS - 2]
    vocabulary = {token: number for number, token in enumerate([*tokens, START, END])}
    merges = [tuple(pair) for pair in pairs if "".join(pair) in vocabulary]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)


def train_denoiser(
    vae: AutoencoderKL,
    scheduler: DDIMScheduler,
    tokenizer: CLIPTokenizer,
    pictures: Tensor,
    captions: list[str],
    steps: int,
) -> tuple[CLIPTextModel, UNet2DConditionModel]:
    """(answer - v)², v = √ᾱ ε - √(1-ᾱ) x; the running means of both models are what comes back."""
    pair = nn.ModuleList([text_encoder(tokenizer), denoiser()])
    average = deepcopy(pair).requires_grad_(False)
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.mean for part in pictures.split(64)])
    numbers = tokenizer([*captions, ""], padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids

    def loss(rows: Tensor) -> Tensor:
        x, noise = latents[rows], torch.randn(len(rows), *latents.shape[1:])
        t = strata(len(rows), scheduler.config.num_train_timesteps)
        told = torch.where(torch.rand(len(rows)) < EMPTY, len(captions), rows)
        states = pair[0](numbers[told])[0]  # (rows, tokens, width)
        answer = pair[1](scheduler.add_noise(x, noise, t), t, states).sample
        return functional.mse_loss(answer.float(), scheduler.get_velocity(x, noise, t))

    for step in trained("UNet and text encoder", list(pair.parameters()), loss, len(latents), steps, batch=64, lr=4e-4):
        kept = min(AVERAGE, (1 + step) / (10 + step))  # its first steps are forgotten sooner
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(pair.parameters()), 1 - kept)
    return average[0], average[1]


def text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """0.7 million parameters."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            projection_dim=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def denoiser() -> UNet2DConditionModel:
    """8.8 million parameters; it reads on its two larger scales and in the middle."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 128, 192),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    ).to(memory_format=torch.channels_last)


def strata(count: int, steps: int) -> Tensor:
    """A timestep from each of `count` equal parts of the schedule, in no order."""
    return ((torch.randperm(count) + torch.rand(count)) / count * steps).long()


def sharpen(vae: AutoencoderKL, pictures: Tensor, steps: int) -> None:
    """The decoder alone, by |x̂ - x| + |∇x̂ - ∇x|: fills without blotches."""
    with torch.no_grad():
        told = [vae.encode(part).latent_dist for part in pictures.split(64)]
        mean, deviation = torch.cat([own.mean for own in told]), torch.cat([own.std for own in told])
    learned = [*vae.post_quant_conv.parameters(), *vae.decoder.parameters()]

    def loss(rows: Tensor) -> Tensor:
        made = vae.decode(mean[rows] + deviation[rows] * torch.randn(mean[rows].shape)).sample.float()
        missing = made - pictures[rows]
        return missing.abs().mean() + missing.diff(dim=2).abs().mean() + missing.diff(dim=3).abs().mean()

    for _ in trained("decoder", learned, loss, len(pictures), steps, batch=24, lr=5e-4):
        pass


def trained(
    what: str, learned: list[nn.Parameter], loss: Loss, rows: int, steps: int, batch: int, lr: float
) -> Iterator[int]:
    """AdamW with a warm-up and a cosine, on all rows in turn; gives the number of each step that is done."""
    optimizer = torch.optim.AdamW(learned, lr=lr, weight_decay=0.01)
    warm = max(1, steps // 20)
    course = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / steps)))
    )
    order, began, mean = torch.empty(0, dtype=torch.long), time.perf_counter(), None
    for step in range(steps):
        if len(order) < batch:
            order = torch.cat([order, torch.randperm(rows)])
        chosen, order = order[:batch], order[batch:]
        with torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_amx_tile_supported()):
            found = loss(chosen)
        found.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        course.step()
        optimizer.zero_grad()
        mean = found.item() if mean is None else 0.98 * mean + 0.02 * found.item()
        if step % 50 == 49 or step + 1 == steps:
            print(
                f"{what}: step {step + 1} of {steps}, loss {mean:.4f}, {time.perf_counter() - began:.0f} s", flush=True
            )
        yield step


if __name__ == "__main__":
    main()
