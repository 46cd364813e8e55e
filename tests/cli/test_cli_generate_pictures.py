"""`veneer generate` on pipelines, through the real entry point."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from train.diffusion.pipelines import made, saved
from train.diffusion.test_painter import adapter_for, merge_by_hand, plain
from veneer import LoraConfig, files
from veneer.apart.changes import Change, adapter_of, changes

FEW = ("--steps", 2, "--device", "cpu", "--dtype", "float32")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny Stable Diffusion in a folder."""
    return saved("sd1", tmp_path_factory.mktemp("bases") / "sd1")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with two adapters, of different formats, to be in."""
    monkeypatch.chdir(tmp_path)
    pipeline = made("sd1")
    files.write(adapter_for(pipeline, 1), tmp_path / "style.safetensors", "kohya")
    shape = adapter_for(pipeline, 2, ("unet",))
    shape.metadata["modelspec.trigger_phrase"] = "bent"
    files.write(shape, tmp_path / "shape.safetensors", "diffusers")
    return tmp_path


@pytest.fixture
def draw(veneer, base, place):
    """`draw("style.safetensors", "--prompt", "a cat")` on that base, in few steps."""
    return lambda *words: veneer("generate", *words, "--base", base, *FEW)


def opened(path):
    """The picture, whose file is closed."""
    with Image.open(path) as picture:
        picture.load()
    return picture


def expected(*weighted, prompt="a cat", seed=1):
    """What diffusers draws with W + Σ weight · ΔW, as 8 bits."""
    pipeline = made("sd1")
    for (which, parts), weight in weighted:
        merge_by_hand(pipeline, adapter_for(pipeline, which, parts), weight)
    return plain(pipeline, prompt, seed) * 255


STYLE, SHAPE = (1, ("unet", "text_encoder")), (2, ("unet",))


def test_a_picture_is_what_diffusers_draws_and_says_how_it_was_made(draw, place):
    words = ["style.safetensors:0.7", "shape.safetensors:-0.5", "--prompt", "a cat", "--seed", 1, "--out", "cat.png"]
    said = draw(*words)
    assert (said.code, said.out) == (0, "cat.png\n"), said.err
    picture = opened("cat.png")
    assert abs(np.asarray(picture) - expected((STYLE, 0.7), (SHAPE, -0.5))).max() < 0.502
    prompt, line = picture.info["parameters"].split("\n")
    assert prompt == "a cat <lora:style:0.7> <lora:shape:-0.5>"
    facts = dict(pair.split(": ") for pair in line.split(", "))
    known = {"Steps": "2", "Sampler": "PLMS", "CFG scale": "7.5", "Seed": "1", "Size": "32x32", "Model": "sd1"}
    assert facts | known == facts
    assert json.loads(picture.info["veneer"])["adapters"][0] == {"name": "style", "text": 0.7, "denoiser": 0.7}
    assert said.err.splitlines()[0] == "note: the prompt 'a cat' lacks the word that shape was trained with: bent"
    again = draw(*words)
    assert again.code == 2
    assert "exists already; nothing was drawn" in again.err
    assert "cat.png is no folder; nothing was drawn" in draw(*words[:-1], "cat.png/deep.png").err


def test_one_picture_of_many_is_the_one_alone_and_strength_0_the_base(draw, place):
    words = ["style.safetensors", "--prompt", "a cat", "--prompt", "a dog", "--seed", "1-2", "--strength", "0,0.5,1"]
    said = draw(*words, "--out", "many")
    assert said.code == 0, said.err
    assert len(said.out.split()) == len(list((place / "many").iterdir())) == 12
    assert "12 of 12 pictures" in said.err
    assert draw("style.safetensors:0.5", "--prompt", "a dog", "--seed", 2, "--out", "alone.png").code == 0
    assert draw("--prompt", "a cat", "--seed", 1, "--out", "base.png").code == 0
    pixels = {path.stem: opened(path).tobytes() for path in place.rglob("*.png")}
    assert pixels["a-dog-2-x0.5"] == pixels["alone"]
    assert pixels["a-cat-1-x0"] == pixels["base"]
    assert len(set(pixels.values())) == 12
    assert pixels["base"] == expected().round().astype(np.uint8).tobytes()


def test_prompts_name_adapters_as_webui_does(draw, veneer, place):
    assert veneer("library", "add", "shape.safetensors", "--name", "bent").code == 0
    prompt = "a <lora:style:0.5:0.25> cat <lora:bent>"
    said = draw("--prompt", prompt, "--seed", 1, "--lora-dir", ".", "--strength", "0.5,1", "--out", ".")
    assert said.code == 0, said.err
    pipeline = made("sd1")
    every = changes(adapter_for(pipeline, 1))
    only = {path: own for path, own in every.items() if path.startswith("unet.")}
    rest = {path: own for path, own in every.items() if path not in only}
    merge_by_hand(pipeline, adapter_of(only, parts=("unet",)), 0.25)
    merge_by_hand(pipeline, adapter_of(rest, parts=("text_encoder",)), 0.5)
    merge_by_hand(pipeline, adapter_for(pipeline, *SHAPE), 1)
    picture = opened("a-cat-1-x1.png")
    assert picture.info["parameters"].startswith("a cat <lora:style:0.5:0.25> <lora:bent:1>\n")
    assert opened("a-cat-1-x0.5.png").info["parameters"].startswith("a cat <lora:style:0.25:0.125> <lora:bent:0.5>")
    assert abs(np.asarray(picture) - plain(pipeline, "a cat", 1) * 255).max() < 0.502


def test_a_sheet_shows_strengths_and_the_base_beside(draw, place):
    said = draw("style.safetensors", "--prompt", "a cat", "--seed", "1,2", "--compare", "--out", "sheet.png")
    assert (said.code, said.out) == (0, "sheet.png\n"), said.err
    own = json.loads(opened("sheet.png").info["veneer"])
    assert [(cell["seed"], cell["strength"]) for cell in own] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    said = draw("style.safetensors", "--prompt", "a cat", "--seed", "1-3", "--grid", "--merged", "--out", "grid.png")
    assert said.code == 0, said.err
    sheet, times = opened("grid.png"), 176 // 32
    assert sheet.width == 3 * (32 * times + 10) + 10
    draw("style.safetensors", "--prompt", "a cat", "--seed", 3, "--out", "third.png")
    own = np.asarray(opened("third.png")).repeat(times, 0).repeat(times, 1).astype(int)
    top = 10 + 17 + 17
    shown = np.asarray(sheet)[top : top + 32 * times, 10 + 2 * (32 * times + 10) :][:, : 32 * times]
    assert abs(shown - own).max() <= 1  # which is merged


def test_an_adapter_of_one_model_is_put_where_its_layers_are(draw, place):
    pipeline = made("sd1")
    adapter = adapter_for(pipeline, *SHAPE)
    model = files.attach(pipeline.unet, adapter, parts=["unet"])
    model.save_pretrained(place / "unet-alone")
    assert draw("unet-alone", "--prompt", "a cat", "--seed", 1, "--out", "one.png").code == 0
    assert abs(np.asarray(opened("one.png")) - expected((SHAPE, 1))).max() < 0.502


@pytest.mark.filterwarnings("ignore:drawn by v_prediction")
def test_how_pictures_are_drawn_is_in_the_adapters_folder(veneer, base, place):
    folder = place / "run" / "adapter"
    folder.mkdir(parents=True)
    (place / "shape.safetensors").rename(folder / "pytorch_lora_weights.safetensors")
    sample = {"steps": 3, "guidance": 2.0, "guidance_rescale": 0.5, "negative_prompt": "a dog", "width": None}
    changed = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    usage = {"task": "text-to-image", "sample": sample, "data": {"resolution": [40, 32]}, "scheduler": changed}
    (folder / "veneer.json").write_text(json.dumps(usage))
    with pytest.warns(UserWarning, match="drawn by v_prediction, as was trained, and not by epsilon"):
        said = veneer("generate", "run", "--base", base, "--prompt", "a cat", "--out", "a.png", "--guidance", 3)
    assert said.code == 0, said.err
    _, negative, line = opened("a.png").info["parameters"].split("\n")
    assert negative == "Negative prompt: a dog"
    for fact in ("Steps: 3", "Sampler: DDIM", "CFG scale: 3", "CFG Rescale: 0.5", "Size: 40x32"):
        assert fact in line
    assert veneer("library", "add", "run", "--name", "kept").code == 0
    said = veneer("generate", "kept", "--base", base, "--prompt", "a cat", "--out", "b.png", "--guidance", 3)
    assert opened("a.png").tobytes() == opened("b.png").tobytes(), said.err
    (place / "veneer.json").write_text(json.dumps({"scheduler": {"prediction_type": "epsilon"}}))
    with pytest.warns(UserWarning, match="trained for other schedules, of which the first"):
        veneer("generate", "run", "style.safetensors", "--base", base, "--prompt", "a cat", "--out", "c.png")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["style.safetensors"], "--prompt TEXT"),
        (["style.safetensors", "--prompt", "a", "--beams", 2], "--beams is for language models"),
        (["style.safetensors", "--prompt", "a", "--seed", "3-1"], "--seed: expected numbers"),
        (["style.safetensors", "--prompt", "a", "--strength", "much"], "--strength: expected finite numbers"),
        (["style.safetensors", "--prompt", "a <lora:styl:1>"], "did you mean 'style'"),
        (["style.safetensors", "--prompt", "a <lora:style:x>"], "a weight is a finite number, found 'x'"),
        (["style.safetensors", "--prompt", "a <hypernet:style:1>"], "only <lora:name:weight> is known"),
        (["style.safetensors", "--prompt", "a", "--seed", "1,2", "--out", "a.png"], "--grid makes a sheet"),
        (["style.safetensors", "--prompt", "a", "--out", "a.jpg"], "written as .png"),
        (["style.safetensors", "--prompt", "a", "--width", 33, "--height", 32], "divisible by 8"),
        (["xl.safetensors", "--prompt", "a"], "the adapter is for 'text_encoder_2' too"),
        (["other", "--prompt", "a"], "none have its layers"),
    ],
)
def test_faults_are_one_error_and_nothing_is_written(draw, place, words, message):
    if words[0] == "xl.safetensors":
        files.write(adapter_for(made("sdxl"), 1, ("unet", "text_encoder_2")), place / words[0], "diffusers")
    if words[0] == "other":
        config = LoraConfig(r=2, lora_alpha=2)
        own = Change(config, {"A": torch.randn(2, 4), "B": torch.randn(4, 2)})
        files.write(adapter_of({"down_blocks.7.to_q": own}), place / "other", "peft")
    before = sorted(place.rglob("*"))
    said = draw(*words)
    assert (said.code, message in said.err, said.err.count("error: ")) == (2, True, 1), said.err
    assert sorted(place.rglob("*")) == before


def test_without_a_base_it_is_asked_for(veneer, place):
    said = veneer("generate", "style.safetensors", "--prompt", "a cat")
    assert said.code == 2
    assert "give --base" in said.err


def test_a_prior_needs_its_decoder(veneer, place, tmp_path_factory):
    bases = tmp_path_factory.mktemp("wuerstchen")
    prior, decoder = (saved(f"wuerstchen-{kind}", bases / kind) for kind in ("prior", "decoder"))
    words = ["generate", "--base", prior, "--prompt", "a cat", *FEW, "--width", 128, "--height", 128, "--out", "a.png"]
    assert "--decoder names" in veneer(*words).err
    said = veneer(*words, "--decoder", decoder)
    assert said.code == 0, said.err
    assert opened("a.png").size[0] >= 128
