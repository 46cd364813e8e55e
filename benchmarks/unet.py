"""Text-to-image training against diffusers with PEFT: python benchmarks/unet.py [--rows step script] [--steps 8]

A randomly initialised UNet of Stable Diffusion 1.5's size (860 million), one picture of 256 pixels, r=16 on attention.

step     the UNet's step alone: latents and text embeddings are given, as a cache gives them
latents  the VAE's encoder makes the latents in the step on both sides; text embeddings are given
script   what diffusers' example script does, VAE and text encoder in the step, beside veneer with its caches;
         "script, latents": beside veneer with the VAE's encoder in the step

Each side is a process of its own; they take turns, a step each, with the same weights, adapter, pictures, noise and
timesteps. Prints medians, the median of the peer's time by veneer's, each process's peak memory, and the losses.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

PIXELS, FACTOR, WORDS, RANK = 256, 8, 77, 16
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
UNET = {"sample_size": 64, "cross_attention_dim": 768}  # the rest as diffusers has it
VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4}
VAE |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
TEXT |= {"vocab_size": 49408, "projection_dim": 768}
DTYPES = ("bfloat16", "float32")
LR, DECAY, CLIP = 1e-4, 1e-2, 1.0
AGREE = 0.5  # percent of a loss
SKIPPED = 2  # steps in which things are made ready are not timed


@dataclass(frozen=True)
class Side:
    """How one side trains; `parts`: what stands in its memory beside the UNet."""

    dtype: str
    parts: tuple[str, ...] = ()
    option: bool = False  # of veneer: layers run again in the backward; of the peer: its adapter is in bf16


# the parts beside the UNet, of veneer and of the peer
ROWS = {
    "step": ((), ()),
    "latents": (("vae",), ("vae",)),
    "script": ((), ("vae", "text_encoder")),
    "script, latents": (("vae",), ("vae", "text_encoder")),
}


def build(part: str, dtype: str) -> Any:
    """A part with random weights, the same ones in every process, to rounding in every dtype."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from veneer.train.bases.loading import choose_device

    makers: dict[str, Callable[[], Any]] = {
        "unet": lambda: UNet2DConditionModel(**UNET),
        "vae": lambda: AutoencoderKL(**VAE),
        "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**TEXT)),
    }
    with torch.device("meta"):
        model = makers[part]()
    model = model.to(getattr(torch, dtype)).to_empty(device="cpu").requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            draw = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(draw.mul_(parameter[0].numel() ** -0.5))
        else:
            parameter.zero_()
    for module in model.modules():
        if type(module).__name__.endswith("Norm"):
            module.weight.fill_(1)
    for name, buffer in model.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1]))
    return model.to(choose_device("auto"))


def draws(step: int) -> dict[str, Any]:
    """What is random in a step."""
    import torch

    generator, latents = torch.Generator().manual_seed(step), (1, 4, PIXELS // FACTOR, PIXELS // FACTOR)
    return {
        "pixels": torch.rand(1, 3, PIXELS, PIXELS, generator=generator) * 2 - 1,
        "of_latents": torch.randn(latents, generator=generator),  # the draw from what the VAE says of a picture
        "noise": torch.randn(latents, generator=generator),
        "t": torch.randint(1000, (1,), generator=generator),
        "ids": torch.randint(TEXT["vocab_size"], (1, WORDS), generator=generator),
        "text": torch.randn(1, WORDS, UNET["cross_attention_dim"], generator=generator),
    }


def latents_of(vae: Any, drawn: dict[str, Any]) -> Any:
    """The latents of a picture, of deviation 1, which random weights do not give them."""
    import torch

    with torch.no_grad():
        found = vae.encode(drawn["pixels"].to(vae.encoder.conv_in.weight.dtype)).latent_dist
    latents = found.mean + found.std * drawn["of_latents"].to(found.mean)
    return latents / latents.std()


def cached(start: Path, dtype: str) -> list[Any]:
    """The latents of each step's picture, made before."""
    from safetensors.torch import load_file

    return list(load_file(start / f"latents-{dtype}.safetensors")["latents"].unsqueeze(1))


def loss_of(unet: Any, parts: dict[str, Any], step: int, latents: Any, autocast: Any) -> Any:
    """The loss of a step, as the script computes it: the mean squared error of the noise that is found."""
    import torch
    import torch.nn.functional as F
    from diffusers import DDPMScheduler

    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    drawn, dtype = {name: value.to(unet.device) for name, value in draws(step).items()}, unet.dtype
    latents, text = latents.to(unet.device), drawn["text"].to(dtype)
    with torch.no_grad():
        if "vae" in parts:
            latents = latents_of(parts["vae"], drawn)
        if "text_encoder" in parts:
            parts["text_encoder"](drawn["ids"])  # in the peer's time; what it says is given, that the sides agree
    noisy = schedule.add_noise(latents.to(dtype), drawn["noise"].to(dtype), drawn["t"])
    with autocast:
        found = unet(noisy, drawn["t"], text, return_dict=False)[0]
    return F.mse_loss(found.float(), drawn["noise"])


def veneer_side(turn: Any, side: Side, start: Path, steps: int) -> None:
    """veneer's adapter, its pieces and its optimizer step, in the base's dtype."""
    import veneer
    from veneer.train.heap import step_heap
    from veneer.train.optimizers import Stepper
    from veneer.train.pieces import quick_pieces
    from veneer.train.recompute import recompute_layers
    from veneer.train.settings import TrainSettings

    parts, latents = {part: build(part, side.dtype) for part in side.parts}, cached(start, side.dtype)
    for half in ("encoder", "quant_conv") if "vae" in parts else ():
        getattr(parts["vae"], half).float()  # as veneer has the half that sees
    unet = veneer.PeftModel.from_pretrained(build("unet", side.dtype), start, is_trainable=True).train()
    if side.option:
        recompute_layers(unet)
    stepper = Stepper(unet, TrainSettings(lr=LR, weight_decay=DECAY, max_grad_norm=CLIP))
    turn()
    with step_heap(keeps=not side.option), quick_pieces(unet):
        for step in range(steps):
            loss = loss_of(unet, parts, step, latents[step], nullcontext())
            stepper.backward(loss)
            stepper.step(LR)
            turn(loss=loss.item())


def peft_side(turn: Any, side: Side, start: Path, steps: int) -> None:
    """What examples/text_to_image/train_text_to_image_lora.py does, with `--mixed_precision bf16` where it is bf16."""
    import torch
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig, set_peft_model_state_dict
    from safetensors.torch import load_file

    parts, latents = {part: build(part, side.dtype) for part in side.parts}, cached(start, side.dtype)
    unet = build("unet", side.dtype)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=TARGETS))
    prefix = "base_model.model."
    weights = load_file(start / "adapter_model.safetensors")
    set_peft_model_state_dict(unet, {name.removeprefix(prefix): value for name, value in weights.items()})
    if not side.option:
        cast_training_params(unet, dtype=torch.float32)
    learned = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=LR, weight_decay=DECAY)
    mixed = torch.autocast(unet.device.type, torch.bfloat16, enabled=side.dtype == "bfloat16")
    unet.train()
    turn()
    for step in range(steps):
        loss = loss_of(unet, parts, step, latents[step], mixed)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        turn(loss=loss.item())


def prepare(turn: Any, start: Path, steps: int) -> None:
    """Write the adapter that both sides start from, and the latents of the pictures."""
    import torch
    from safetensors.torch import save_file

    import veneer

    unet = build("unet", "bfloat16")
    torch.manual_seed(0)
    config = veneer.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, init_lora_weights="gaussian")
    veneer.get_peft_model(unet, config).save_pretrained(start)
    for dtype in DTYPES:
        vae = build("vae", dtype)
        drawn = ({name: value.to(vae.device) for name, value in draws(step).items()} for step in range(steps))
        latents = torch.cat([latents_of(vae, own) for own in drawn])
        save_file({"latents": latents.cpu()}, start / f"latents-{dtype}.safetensors")


def measure(
    row: str, dtype: str, start: Path, steps: int, options: tuple[bool, bool]
) -> dict[str, list[dict[str, float]]]:
    """The records of the steps of both sides."""
    from turns import Process

    names, sides = ("veneer", "peft"), (Side(dtype, ROWS[row][0], options[0]), Side(dtype, ROWS[row][1], options[1]))
    works = (veneer_side, peft_side)
    running = {name: Process(*own, start, steps) for name, *own in zip(names, works, sides, strict=True)}
    records: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for process in running.values():
        process.take()
    for step in range(steps):
        for name in names if step % 2 else reversed(names):
            records[name].append(running[name].turn())
        print(f"{step + 1}/{steps}", end="\r", file=sys.stderr)
    for process in running.values():
        process.turn()
    return records


def summary(records: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians and ratios."""
    skip = min(SKIPPED, len(records["veneer"]) - 1)
    timed = {name: [step["seconds"] for step in steps[skip:]] for name, steps in records.items()}
    ratios = [theirs / own for own, theirs in zip(timed["veneer"], timed["peft"], strict=True)]
    computed = {name: statistics.median([step["cpu seconds"] for step in own[skip:]]) for name, own in records.items()}
    peaks, losses = (
        {name: [step[key] for step in steps] for name, steps in records.items()} for key in ("peak", "loss")
    )
    off = [abs(own / theirs - 1) for own, theirs in zip(losses["veneer"], losses["peft"], strict=True)]
    return {
        "s/step": {name: statistics.median(own) for name, own in timed.items()},
        "cpu s/step": computed,
        "peak GB": {name: own[-1] / 1e9 for name, own in peaks.items()},
        "time x": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "cpu time x": computed["peft"] / computed["veneer"],
        "memory x": peaks["veneer"][-1] / peaks["peft"][-1],
        "loss off %": 100 * max(off),
        "losses": losses,
    }


def show(name: str, found: dict[str, Any]) -> None:
    """The row's table."""
    print(f"## {name}")
    for side in found["s/step"]:
        times = f"{found['s/step'][side]:10.2f} s/step{found['cpu s/step'][side]:10.2f} of the CPU"
        print(f"{side:8}{times}{found['peak GB'][side]:10.2f} GB")
    print(f"time x {found['time x']:.2f} ({found['least']:.2f} to {found['most']:.2f})", end=", ")
    print(f"of the CPU x {found['cpu time x']:.2f}, memory x {found['memory x']:.2f}")
    print(f"losses {'agree' if found['loss off %'] <= AGREE else 'DIFFER'}, {found['loss off %']:.3f} % at most")
    for step, losses in enumerate(zip(*found["losses"].values(), strict=True)):
        print(f"{step + 1:4}", *(f"{loss:12.6f}" for loss in losses), flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--bf16-adapter", action="store_true", help="of the peer, as its script has it")
    parser.add_argument("--recompute", action="store_true", help="veneer with train.gradient_checkpointing")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    from turns import Process

    all_found, own = {}, (options.recompute, options.bf16_adapter)
    with tempfile.TemporaryDirectory() as folder:
        Process(prepare, Path(folder), options.steps).take()
        for dtype in options.dtypes:
            for name in options.rows:
                records = measure(name, dtype, Path(folder), options.steps, own)
                found = all_found[f"{name}, {dtype}"] = summary(records)
                show(f"{name}, {dtype}", found)
                if options.json:
                    options.json.write_text(json.dumps(all_found, indent=1))


if __name__ == "__main__":
    main()
