"""Tiny pipelines and pictures, made once, and tasks of them."""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from train.diffusion.captioned import folder
from train.diffusion.pipelines import saved
from train.diffusion.test_families import efficient_net
from veneer.train.run import read_recipe
from veneer.train.task import Reporter

CAPTIONS = {f"{number}.png": f"thing {number}" for number in range(6)}


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """`bases("sd1")` → the folder of a pipeline of that kind."""
    place, made = tmp_path_factory.mktemp("pipelines"), dict[str, Path]()

    def base(kind: str) -> Path:
        if kind not in made:
            made[kind] = saved(kind, place / kind)
            if kind == "wuerstchen-prior":
                (made[kind] / "image_encoder").mkdir()
                save_file(efficient_net(), made[kind] / "image_encoder" / "model.safetensors")
        return made[kind]

    return base


@pytest.fixture(scope="session")
def things(tmp_path_factory) -> Path:
    """Six pictures with captions, wider than high."""
    return folder(tmp_path_factory.mktemp("things"), CAPTIONS)


@pytest.fixture
def recipe_of(bases, things, tmp_path):
    """`recipe_of("sd1", data={…})` → the file of a recipe that is done in a second."""

    def write(kind: str, **more) -> Path:
        values = {
            "task": "text-to-image",
            "base": str(bases(kind)),
            "dtype": "float32",
            "device": "cpu",
            "adapter": {"r": 2, "lora_alpha": 2, "target_modules": "attention"},
            "data": {"path": str(things), "resolution": 32},
            "train": {"steps": 3, "batch_size": 4, "lr": 1e-2},
            "sample": {"count": 0},
            "output": str(tmp_path / "runs"),
        }
        for key, value in more.items():
            values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
        path = tmp_path / "pictures.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


@pytest.fixture
def built(recipe_of):
    """`built("sd1", data={…})` → the task."""

    def build(kind: str = "sd1", trained: bool = False, **more):
        recipe, task = read_recipe(str(recipe_of(kind, **more)))
        made = task(recipe, Reporter())
        if trained:
            torch.manual_seed(1)
            with torch.no_grad():
                for parameter in made.model.parameters():
                    if parameter.requires_grad:
                        parameter.copy_(torch.randn_like(parameter) * 0.3)
        return made

    return build
