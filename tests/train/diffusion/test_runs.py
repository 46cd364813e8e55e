"""Whole runs: the recipes by their names, a run that is killed, and runs of two processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from train.diffusion.captioned import folder
from veneer import files
from veneer.recipes import names, summary
from veneer.train.evaluate import measured
from veneer.train.run import read_recipe, run
from veneer.train.task import Reporter

DISTURBING = Path(__file__).parent / "disturbing.py"
WUERSTCHEN = "wuerstchen_prior_lora_pokemon_blip"
DREAMBOOTH = "stable_diffusion_v15_dreambooth_lora_dog"
RECIPES = {  # by DiffEngine's names: a tiny base of their kind; r, lr, batch, epochs or steps, side, checkpointing
    "stable_diffusion_v15_lora_pokemon_blip": ("sd1", (32, 1e-5, 4, 50, None, 512, False)),
    DREAMBOOTH: ("sd1", (8, 1e-4, 4, None, 1000, 512, False)),
    "stable_diffusion_xl_lora_pokemon_blip": ("sdxl", (8, 1e-5, 2, 50, None, 1024, True)),
    "stable_diffusion_xl_dreambooth_lora_dog": ("sdxl", (8, 1e-4, 2, None, 500, 1024, True)),
    WUERSTCHEN: ("wuerstchen-prior", (8, 1e-4, 8, 50, None, 768, False)),
}


def losses(place: Path) -> list[float]:
    records = map(json.loads, (place / "metrics.jsonl").read_text().splitlines())
    return [record.get("loss", record.get("eval_loss")) for record in records]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_what_diffengines_says(name):
    recipe = read_recipe(name)[0]
    r, lr, batch, epochs, steps, side, again = RECIPES[name][1]
    own, train, data = recipe.adapter, recipe.train, recipe.data
    assert (own.r, own.lora_alpha, own.target_modules) == (r, r, ["to_q", "to_k", "to_v", "to_out.0"])
    assert (train.lr, train.batch_size, train.gradient_checkpointing) == (lr, batch, again)
    assert (train.steps, train.epochs if epochs else None) == (steps, epochs)
    assert (train.schedule, train.warmup, train.weight_decay, train.max_grad_norm) == ("constant", 0, 1e-2, 1)
    assert (data.resolution, data.crop, data.flip) == ((side, side), "random", True)
    assert (data.class_prompt, data.class_pictures) == (("a photo of dog", 200) if name == DREAMBOOTH else (None, 100))
    assert data.instance_prompt == ("a photo of sks dog" if "dreambooth" in name else None)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers' Euler scheduler
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_by_its_name_runs_on_a_tiny_base_of_its_kind(bases, things, tmp_path, name):
    """Only the base, the data and their sizes are others."""
    kind, dog = RECIPES[name][0], "dreambooth" in name
    place = folder(tmp_path / "bare", dict.fromkeys(("a.png", "b.png"))) if dog else things
    over = [f"base={bases(kind)}", f"data.path={place}", f"output={tmp_path / 'runs'}", "device=cpu", "dtype=float32"]
    over += [f"data.resolution={64 if name == WUERSTCHEN else 32}", "train.steps=2", "train.batch_size=2"]
    over += ["sample.steps=1", "sample.seeds=[0]"]
    if name == DREAMBOOTH:
        over += [f"data.class_path={tmp_path / 'class'}", "data.class_pictures=1"]
    recipe, task = read_recipe(name, over)
    result = run(recipe, task, Reporter())
    assert result.outcome.steps == 2
    adapter = files.read(result.run.folder)
    assert adapter.parts == (("prior",) if name == WUERSTCHEN else ("unet",))
    assert all(own["B"].any() for own in adapter.tensors.values())
    sheets = [path.name for path in (result.run.folder / "samples").glob("*.png")]
    assert sheets == ([] if name == WUERSTCHEN else ["answers.png"])
    assert adapter.metadata.get("instance_prompt") == ("a photo of sks dog" if dog else None)


def test_the_recipes_are_listed_with_what_they_do():
    for name in [*RECIPES, "text-to-image"]:
        assert name in names()
        assert len(summary(name)) > 20


@pytest.fixture(scope="module")
def disturbed(bases, things, tmp_path_factory):
    """The folder of all runs, and their codes: of a recipe with all that is drawn by chance."""
    import yaml

    place = tmp_path_factory.mktemp("disturbed")
    kind = folder(tmp_path_factory.mktemp("class"), dict.fromkeys(("a.png", "b.png", "c.png")))
    values = {
        "task": "text-to-image",
        "base": str(bases("sd1")),
        "dtype": "float32",
        "device": "cpu",
        "adapter": {"r": 2, "target_modules": "attention", "lora_dropout": 0.1, "use_dora": True},
        "text_encoder": {"r": 2, "lr": 1e-3},
        "data": {"path": str(things), "resolution": 32, "crop": "random", "flip": True, "caption_dropout": 0.3}
        | {"eval_share": 0.2, "class_path": str(kind), "class_prompt": "a thing", "class_pictures": 3},
        "train": {"steps": 4, "batch_size": 3, "accumulation": 2, "lr": 1e-2, "min_snr_gamma": 5, "offset_noise": 0.1},
        "eval": {"every_steps": 2, "timesteps": 2},
        "sample": {"prompts": ["thing 1"], "steps": 1, "every_steps": 2, "guidance": 1},
        "checkpoint": {"every_steps": 1},
    }
    recipe = place / "pictures.yaml"
    recipe.write_text(yaml.safe_dump(values))
    done = subprocess.run([sys.executable, str(DISTURBING), str(recipe), "3"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + (place / "log").read_text()[-2000:]
    return place, json.loads(done.stdout.splitlines()[-1])


def adapter_in(place: Path, name: str) -> Path:
    (path,) = (place / name).glob("*/adapter/pytorch_lora_weights.safetensors")
    return path


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_to_the_same_bits(disturbed):
    place, codes = disturbed
    assert codes["kills"] >= 3
    whole, killed = (adapter_in(place, name) for name in ("undisturbed", "killed"))
    assert killed.read_bytes() == whole.read_bytes()
    assert losses(killed.parents[1]) == losses(whole.parents[1])
    for sheet in whole.parents[1].glob("samples/*"):
        assert (killed.parents[1] / "samples" / sheet.name).read_bytes() == sheet.read_bytes(), sheet.name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two", "spread"])
def test_two_processes_make_the_run_of_one(disturbed, name):
    place, codes = disturbed
    assert codes[name] == [0, 0], (place / "log").read_text()[-2000:]
    alone, other = (adapter_in(place, own) for own in ("alone", name))
    assert losses(other.parents[1]) == pytest.approx(losses(alone.parents[1]), rel=1e-5)
    wanted, found = load_file(alone), load_file(other)
    assert wanted.keys() == found.keys()
    for key, tensor in wanted.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=2e-5, msg=key)


@pytest.mark.slow
def test_the_figures_of_a_run_are_measured_again(recipe_of):
    recipe, task = read_recipe(str(recipe_of("sd1", data={"eval_share": 0.4}, text_encoder={"r": 2})))
    result = run(recipe, task, Reporter())
    again = measured(result.run.folder, None, (), True, Reporter())
    assert again["base"]["eval_loss"] == pytest.approx(result.before["eval_loss"], rel=1e-6)
    assert again["adapted"]["eval_loss"] == pytest.approx(result.after["eval_loss"], rel=1e-6)
    assert again["adapted"] != again["base"]
