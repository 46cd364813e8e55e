"""The base that comes with veneer: here without a network or a cache, whole in the wheel, and it draws."""

import json
import tomllib
from pathlib import Path

import pytest
import torch

from veneer import zoo
from veneer.zoo.cache import SHIPPED

ROOT = Path(zoo.__file__).parents[3]
NAMES = [name for name, base in zoo.CATALOGUE.items() if base.wheel is None]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_shipped_is_here_and_leaves_the_cache_alone(name, cache):
    folder, base = SHIPPED / name, zoo.CATALOGUE[name]
    lines: list[str] = []
    assert zoo.is_here(name)
    assert zoo.resolve(name, download=False) == zoo.pull(name, report=lines.append) == zoo.folder_of(name) == folder
    assert (lines, cache.exists()) == ([], False)
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) == pytest.approx(
        base.disk_bytes, rel=0.01
    )
    assert base.licence in (folder / "LICENSE").read_text(encoding="utf-8")
    assert (folder / "ORIGIN.md").read_text(encoding="utf-8").startswith(f"# {name}\n")


def test_every_file_of_the_shipped_bases_goes_into_the_wheel():
    package = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    patterns = tomllib.loads(package)["tool"]["setuptools"]["package-data"]["veneer.zoo"]
    packed = {path for pattern in patterns for path in SHIPPED.parent.glob(pattern) if path.is_file()}
    assert {path for path in SHIPPED.rglob("*") if path.is_file()} == packed
    assert {path.name for path in SHIPPED.iterdir()} == set(NAMES)


def test_the_emoji_base_draws_a_red_apple_on_white():
    from diffusers import StableDiffusionPipeline

    folder = zoo.resolve("emoji", download=False)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    parameters = sum(weight.numel() for part in parts for weight in part.parameters())
    assert parameters == zoo.CATALOGUE["emoji"].parameters
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == type(pipeline).__name__
    picture = pipeline(
        "red apple",
        num_inference_steps=10,
        guidance_scale=4.0,
        guidance_rescale=0.7,
        generator=torch.Generator().manual_seed(1),
        output_type="pt",
    ).images[0]  # (3, 64, 64) in [0, 1]
    red, green, blue = picture[:, 24:48, 24:40].mean((1, 2))
    assert red > max(green, blue) + 0.3
    assert picture[:, [0, 0, -1, -1], [0, -1, 0, -1]].mean() > 0.9
