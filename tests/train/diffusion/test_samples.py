"""Pictures that a run draws: samples, and those of a class; and what is not drawn when a recipe is looked at."""

import pytest
import torch
from PIL import Image

from train.diffusion.captioned import Heard
from train.diffusion.pipelines import made
from veneer import AdapterError
from veneer.core.inject import adapted_layers
from veneer.train.run import preview, read_recipe


def test_what_is_drawn_touches_nothing_that_is_learned(built):
    sample = {"prompts": ["thing 1", "thing 2"], "seeds": [0, 3], "steps": 1, "guidance": 2}
    task = built(trained=True, sample=sample, adapter={"lora_dropout": 0.5})
    task.model.train()
    before = torch.get_rng_state()
    assert task.sample() == [{"prompt": f"thing {n}", "seed": "0"} for n in (1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert task.model.training
    bare = made("sd1")
    wanted = [
        bare(prompt, generator=torch.Generator().manual_seed(seed), num_inference_steps=1, guidance_scale=2).images[0]
        for prompt in sample["prompts"]
        for seed in sample["seeds"]
    ]
    assert [picture.tobytes() for picture in task.samples.before] == [picture.tobytes() for picture in wanted]
    first = task.drawn
    task.sample()
    assert task.drawn.tobytes() == first.tobytes()
    with torch.no_grad():
        for layer in (own.adapters["default"] for _, own in adapted_layers(task.model)):
            layer.B.zero_()
    task.sample()
    assert task.drawn.tobytes() != first.tobytes()


def test_class_pictures_are_those_of_the_base(built, tmp_path):
    place = tmp_path / "class"
    data = {"class_path": str(place), "class_prompt": "a thing", "class_pictures": 2}
    task = built(data=data, sample={"steps": 1, "guidance": 2})
    drawn = [Image.open(place / f"class-0000{number}.png") for number in range(2)]
    pipe = made("sd1")
    for seed, picture in enumerate(drawn):
        generator = torch.Generator().manual_seed(seed)
        wanted = pipe("a thing", generator=generator, num_inference_steps=1, guidance_scale=2).images[0]
        assert picture.tobytes() == wanted.tobytes()
    assert task.kind is not None
    assert len(task.kind) == 2
    with pytest.raises(AdapterError, match=r"pictures were painted otherwise: sampling was"):
        built(data={**data, "class_pictures": 3}, sample={"steps": 2})


def test_a_look_at_a_recipe_paints_nothing(recipe_of, tmp_path):
    place = tmp_path / "class"
    data = {"class_path": str(place), "class_prompt": "a thing", "class_pictures": 2}
    reporter = Heard()
    recipe, task = read_recipe(str(recipe_of("sd1", data=data)))
    seen = preview(recipe, task, reporter)
    assert reporter.told[0] == f"2 pictures of 'a thing' would be painted into {place}"
    assert not place.exists()
    assert seen.recipe["data"]["class_path"] == str(place)
    assert seen.unit == "pictures"
    (batch,) = task.looked_at(recipe, reporter).batches([0])
    assert (batch.units, batch.amount) == (1, 2)  # as much goes through the model as in the run


def test_zero_terminal_snr_is_trained_and_drawn(built):
    """The scheduler that draws begins where nothing is left of the picture; one that cannot is exchanged."""
    train = {"zero_terminal_snr": True, "prediction": "v_prediction"}
    task = built("sd1", train=train, sample={"prompts": ["thing 1"], "steps": 2})
    assert task.objective.schedule.alpha_bar(torch.tensor(999)) == 0
    kinds = []
    pipeline = task.family.pipeline

    def seen():
        kinds.append(pipeline())
        return kinds[-1]

    task.family.pipeline = seen
    task.sample()
    assert kinds[0].scheduler.config.prediction_type == "v_prediction"
    assert task.usage()["scheduler"] == {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    }
