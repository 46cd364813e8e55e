"""The shipped styles are what their recipes say, and a run of one tells how its own pictures look."""

import json

import pytest
from PIL import Image, ImageStat

from veneer import zoo
from veneer.recipes import SHIPPED
from veneer.train.data.rows import evenly
from veneer.train.diffusion.adapted import AdaptedPipeline, sampling_of
from veneer.train.diffusion.painter import Sampling, Wish, paint
from veneer.train.diffusion.prompts import Tag
from veneer.train.diffusion.strengths import strengths_sheet
from veneer.train.diffusion.style import looks, saturation
from veneer.train.drawing.sheet import GAP, SIDE
from veneer.train.run import read_recipe, run
from veneer.train.task import Reporter
from veneer.train.trained import usage_of

STYLES = ("emoji-delft", "emoji-high-contrast")
PROMPTS, SIZE = ["red apple", "rocket"], 64


def opened(path):
    """The picture in a file."""
    with Image.open(path) as picture:
        return picture.convert("RGB")


def captions(folder):
    """The captions of a set, by file."""
    rows = map(json.loads, (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines())
    return {row["file_name"]: row["text"] for row in rows}


def test_both_styles_show_the_same_things():
    drawn = [{part: captions(SHIPPED / "data" / style / part) for part in ("train", "held-out")} for style in STYLES]
    assert drawn[0] == drawn[1]
    train, held_out = drawn[0]["train"], drawn[0]["held-out"]
    assert (len(train), len(held_out), train.keys() & held_out.keys()) == (100, 20, set())
    assert all(text == file.removesuffix(".png").replace("-", " ") for file, text in {**train, **held_out}.items())


@pytest.mark.parametrize("style", STYLES)
def test_a_style_is_learned_from_small_pictures_and_shown_on_others(style):
    recipe, _ = read_recipe(style)
    learned, held_out = (SHIPPED / "data" / style / part for part in ("train", "held-out"))
    assert (recipe.data.path, recipe.data.eval_path) == (str(learned), str(held_out))
    assert set(recipe.sample.prompts) <= set(captions(held_out).values())
    for folder in (learned, held_out):
        assert {path.name for path in folder.glob("*.png")} == set(captions(folder))
        pictures = [opened(path) for path in folder.glob("*.png")]
        assert {picture.size for picture in pictures} == {(SIZE, SIZE)}
        assert all(saturation(picture) == 0 for picture in pictures) == (style == "emoji-high-contrast")
        means = [ImageStat.Stat(picture).mean for picture in pictures]
        assert all(red <= green <= blue for red, green, blue in means)
    assert (SHIPPED / "data" / style / "LICENSE").is_file()


def test_the_base_is_drawn_with_as_its_styles_are():
    own = read_recipe(STYLES[1])[0].sample
    expected = Sampling(steps=own.steps, guidance=own.guidance, guidance_rescale=own.guidance_rescale)
    assert sampling_of(usage_of(zoo.resolve("emoji"))) == expected


def test_a_sheet_has_a_row_for_each_label_and_measures_against_the_first():
    red, grey = Image.new("RGB", (SIZE, SIZE), "red"), Image.new("RGB", (SIZE, SIZE), "grey")
    one = strengths_sheet({"before": [red, red]}, PROMPTS, [grey])
    two = strengths_sheet({"before": [red, red], "after": [grey, grey]}, PROMPTS, [grey])
    row = two.height - one.height
    assert row > SIZE * (SIDE // SIZE) + GAP
    assert two.width == one.width
    assert two.getpixel((GAP + SIZE, two.height - GAP - SIZE)) == (128, 128, 128)
    assert two.getpixel((GAP + SIZE, two.height - GAP - SIZE - row)) == (255, 0, 0)


@pytest.mark.slow
def test_a_run_measures_the_pictures_that_its_adapter_draws(tmp_path):
    own = [f"output={tmp_path}", "train.steps=2", "train.batch_size=2", "sample.steps=2", "eval.rows=2", "device=cpu"]
    own += [f"sample.prompts={json.dumps(PROMPTS)}", "sample.strengths=[0.5]", "eval.timesteps=1"]
    result = run(*read_recipe("emoji-high-contrast", own), Reporter())
    folder, base = result.run.folder, zoo.resolve("emoji")
    adapted = AdaptedPipeline.load(base, {"style": folder / "adapter"}, "float32", "cpu")
    rows = [adapted.acting([Tag("style", own, own)] if own else []) for own in (0.0, 0.5, 1.0)]
    wishes = [Wish(prompt, 1, row) for row in rows for prompt in PROMPTS]
    drawn = paint(adapted.pipeline, wishes, adapted.sampling, adapted.carriers)
    before, half, after = drawn[:2], drawn[2:4], drawn[4:]
    pictures = result.recipe.data.eval_path
    style = [opened(SHIPPED / pictures / name) for name in evenly(sorted(captions(SHIPPED / pictures)), 2)]
    for measured, drawn in ((result.before, before), (result.after, after)):
        expected = vars(looks(drawn, style, before))
        assert {name: measured[name] for name in expected} == expected
    rows = {"before: strength 0": before, "strength 0.5": half, "after: strength 1": after}
    sheet = strengths_sheet(rows, PROMPTS, style)
    assert opened(folder / "samples" / "answers.png").tobytes() == sheet.tobytes()
