"""The same trained adapter in veneer and in plain diffusers: python benchmarks/pictures.py [--base DIR] [--steps 20]

Each of Stable Diffusion 1 and 2, SDXL and Würstchen's prior learns some pictures, with its text encoders, by LoRA and
by DoRA: tiny pipelines of the real classes, or the one in DIR. Prints how far pictures of the adapted pipeline are from
those of the base; and the largest difference between veneer's and those of diffusers, after `load_lora_weights` of the
run's `adapter/`, in numbers of 0 to 1 and in steps of 256; between live pictures and those of the pipeline that `veneer
merge` writes; and between its weights and those of diffusers' `fuse_lora`.
"""

import argparse
import json
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

sys.path[0] = str(Path(__file__).resolve().parents[1] / "tests")  # in place of this folder's train.py

from train.diffusion.pipelines import made, saved, seeing  # noqa: E402
from veneer import files  # noqa: E402
from veneer.files.pipeline import load_pipeline, merge_pipeline  # noqa: E402
from veneer.train.run import read_recipe, run  # noqa: E402
from veneer.train.task import Reporter  # noqa: E402

KINDS = ("sd1", "sd2", "sdxl", "wuerstchen-prior")
COLOURS = ("red", "green", "blue", "yellow", "black", "orange")
PROMPTS = ("a red circle", "an orange square")


@dataclass(frozen=True)
class Outcome:
    """How far pictures are from each other, and weights."""

    moved: float
    apart: float
    merged: float
    weights: float


def pictures(folder: Path, size: int) -> Path:
    """Circles and squares with captions."""
    folder.mkdir()
    for number, colour in enumerate(COLOURS):
        shape = ("circle", "square")[number % 2]
        picture = Image.new("RGB", (size, size), "white")
        draw = ImageDraw.Draw(picture)
        (draw.ellipse if shape == "circle" else draw.rectangle)((size // 4, size // 4, size - 8, size - 8), colour)
        picture.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a {colour} {shape}")
    return folder


def drawn(pipeline: Any, size: int) -> Tensor:
    """The pictures of all prompts, in numbers of 0 to 1; of a prior, what a decoder makes of its latents."""
    prior = hasattr(pipeline, "prior")
    side = 128 if prior else size
    found = []
    for seed, prompt in enumerate(PROMPTS):
        source = torch.Generator().manual_seed(seed)
        own: dict[str, Any] = {"width": side, "height": side, "num_inference_steps": 10, "generator": source}
        if not prior:
            found.append(pipeline(prompt, output_type="np", **own).images[0])
            continue
        latents = pipeline(prompt, **own).image_embeddings
        again = torch.Generator().manual_seed(seed)
        picture = made("wuerstchen-decoder")(latents, prompt, num_inference_steps=4, generator=again, output_type="np")
        found.append(picture.images[0])
    return torch.from_numpy(np.stack(found))


def opened(folder: Path) -> Any:
    """The pipeline as veneer loads it, which says nothing."""
    pipeline = load_pipeline(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def compared(base: Path, dora: bool, steps: int, size: int) -> Outcome:
    """Train, then draw by each library."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        recipe = {
            "task": "text-to-image",
            "base": str(base),
            "dtype": "float32",
            "device": "cpu",
            "adapter": {"r": 4, "lora_alpha": 8, "use_dora": dora},
            "text_encoder": {"r": 2, "lora_alpha": 4},
            "data": {"path": str(pictures(folder / "pictures", size)), "resolution": size},
            "train": {"steps": steps, "batch_size": 3, "lr": 0.02},
            "sample": {"count": 0},
            "output": str(folder),
        }
        (folder / "recipe.yaml").write_text(json.dumps(recipe))
        read, task = read_recipe(str(folder / "recipe.yaml"))
        adapter = run(read, task, Reporter()).run.folder / "adapter"
        ours, theirs = opened(base), opened(base)
        plain = drawn(ours, size)
        held = files.read(adapter)
        files.attach(ours, held)
        theirs.load_lora_weights(adapter)
        one, two = drawn(ours, size), drawn(theirs, size)
        merge_pipeline(base, [(held, 1.0)], folder / "merged")
        merged = opened(folder / "merged")
        theirs.fuse_lora(components=list(held.parts))
        theirs.unload_lora_weights()
        return Outcome(far(plain, one), far(one, two), far(one, drawn(merged, size)), weights_apart(merged, theirs))


def far(one: Tensor, other: Tensor) -> float:
    """The largest difference."""
    return (one.double() - other.double()).abs().max().item()


def weights_apart(one: Any, other: Any) -> float:
    """The largest difference of any weight of the two pipelines."""
    parts = {name: part for name, part in one.components.items() if isinstance(part, torch.nn.Module)}
    return max(
        far(own, other.components[name].state_dict()[key])
        for name, part in parts.items()
        for key, own in part.state_dict().items()
    )


def main() -> None:
    """Print a line for each family and method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="a pipeline's folder, in place of the tiny ones")
    parser.add_argument("--steps", type=int, default=20, help="of training")
    parser.add_argument("--size", type=int, default=32, help="width and height of the pictures")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    print(f"{'base':18}{'method':8}{'moved by':>10}{'apart':>12}{'of 255':>10}{'merged':>12}{'weights':>12}")
    with tempfile.TemporaryDirectory() as place:
        for kind in (str(asked.base),) if asked.base else KINDS:
            base = asked.base or saved(kind, Path(place) / kind)
            if kind == "wuerstchen-prior":
                seeing(base)
            for dora in (False, True):
                found = compared(base, dora, asked.steps, asked.size)
                name = asked.base.name if asked.base else kind
                print(
                    f"{name:18}{'DoRA' if dora else 'LoRA':8}{found.moved:10.3f}{found.apart:12.1e}"
                    f"{255 * found.apart:10.4f}{found.merged:12.1e}{found.weights:12.1e}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
