"""The task text-to-image: what a step is made of, what is measured, drawn and kept."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open

from train.diffusion.captioned import Heard, folder
from train.diffusion.pipelines import made
from veneer import AdapterError, files
from veneer.core.inject import adapted_layers
from veneer.train.loop import _batches
from veneer.train.processes import ALONE, World
from veneer.train.recompute import recompute_layers
from veneer.train.run import read_recipe


@pytest.fixture(scope="session")
def kind_of_things(tmp_path_factory):
    """The data of DreamBooth: three pictures of the class."""
    place = folder(tmp_path_factory.mktemp("class"), dict.fromkeys(("a.png", "b.png", "c.png")))
    return {"class_path": str(place), "class_prompt": "a thing", "class_pictures": 3, "prior_weight": 0.3}


def tensors(task, step: int, rows: list[int], turns: list[int] | None = None) -> dict[str, torch.Tensor]:
    task.step, task.turns = step, turns or [0] * len(rows)
    torch.rand(step + 3)  # what others draw does not matter
    (batch,) = task.batches(rows)
    return batch.inputs


DRAWN = {"crop": "random", "flip": True, "caption_dropout": 0.5, "trigger": "zwx"}


@pytest.mark.parametrize("text", [0, 2], ids=["captions kept", "captions learned"])
def test_what_is_learned_depends_on_seed_step_and_row_alone(built, kind_of_things, text):
    train = {"offset_noise": 0.1, "input_perturbation": 0.1}
    task = built(data={**DRAWN, **kind_of_things}, text_encoder={"r": text}, train=train)
    first = tensors(task, 5, [3, 4, 5])
    again = tensors(task, 5, [5, 3])
    for name, own in first.items():
        assert torch.equal(again[name], own[[4, 5, 0, 1]]), name  # each with its partner of the class
    for other in (tensors(task, 6, [3]), tensors(task, 5, [3], [1])):
        for name in ("x", "noise", "mixed"):
            assert not torch.equal(other[name], first[name][:2]), name


def test_the_two_that_come_up_in_one_step_are_told_apart(built):
    """A picture that a step has twice is learned at two timesteps, with two noises."""
    task = built()
    (batch,) = _batches(task, 0, [[1, 1]], ALONE)
    assert not torch.equal(*batch.inputs["noise"])
    task_of_second = _batches(task, 0, [[1, 1]], World(1, 2))
    assert torch.equal(task_of_second[0].inputs["noise"][0], batch.inputs["noise"][1])


def test_the_timesteps_of_a_step_are_spread_evenly_over_batches_and_processes(built):
    task, rows = built(), [[0, 1, 2], [3, 4]]
    alone = [t for batch in _batches(task, 0, rows, ALONE) for t in batch.inputs["t"].tolist()]
    assert [t // 200 for t in alone] == list(range(5))
    shares = [[t for batch in _batches(task, 0, rows, World(r, 2)) for t in batch.inputs["t"].tolist()] for r in (0, 1)]
    assert shares == [[alone[0], alone[2], alone[3]], [alone[1], alone[4]]]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_min_snr_with_prior_preservation(built, kind_of_things, kind):
    """Σ w(t) mse of the pictures + λ Σ w(t) mse of those of the class, λ on top of each's own weight."""
    task = built(kind, trained=True, data=kind_of_things, train={"min_snr_gamma": 2.0})
    (batch,) = task.batches([0, 2, 5])
    own, scheduler, unet = batch.inputs, task.family.scheduler, task.family.parts["unet"]
    left = scheduler.alphas_cumprod[own["t"]]
    snr = left / (1 - left)
    assert (snr > 2).any()
    kept, added = left.sqrt().view(-1, 1, 1, 1), (1 - left).sqrt().view(-1, 1, 1, 1)
    x, noise = own["x"], own["noise"]
    answer = unet(kept * x + added * noise, own["t"], own["told text"]).sample
    target = kept * noise - added * x if kind == "sd2" else noise
    weights = snr.clamp(max=2) / (snr + 1 if kind == "sd2" else snr)
    errors = weights * (answer - target).square().mean((1, 2, 3))
    wanted = errors[0::2].sum() + 0.3 * errors[1::2].sum()
    torch.testing.assert_close(task.loss(batch), wanted, rtol=1e-5, atol=1e-6)
    assert (batch.units, batch.amount) == (3, 6)
    assert [place.split(", ")[1][0] in "abc" for place in batch.places] == [False, True] * 3


def test_text_encoders_that_learn_give_what_they_give_frozen(built):
    """An adapter that changes nothing yet: the loss is that of kept texts, and the text encoder gets gradients."""
    plain, learning = built(), built(text_encoder={"r": 2})
    losses = [task.loss(task.batches([0, 1])[0]) for task in (plain, learning)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-7)
    losses[1].backward()
    updates = {path: layer.adapters["default"] for path, layer in adapted_layers(learning.model)}
    assert all(update.B.grad is not None for path, update in updates.items())
    assert any(update.B.grad.any() for path, update in updates.items() if path.startswith("text_encoder"))


def test_checkpointed_layers_give_the_same_gradients(built):
    found = []
    for again in (False, True):
        task = built(trained=True, text_encoder={"r": 2})
        if again:
            recompute_layers(task.model)
        task.model.train()
        task.loss(task.batches([0, 1])[0]).backward()
        found.append([parameter.grad for parameter in task.model.parameters() if parameter.requires_grad])
    assert all(map(torch.equal, *found))


def test_held_out_pictures_are_measured_in_the_same_way_each_time(built):
    task = built(trained=True, data={"eval_share": 0.4, **DRAWN}, eval={"timesteps": 3}, train={"min_snr_gamma": 1})
    first = task.evaluate(whole=True)
    task.step = 7
    torch.rand(3)
    assert task.evaluate(whole=False) == first
    with task.model.disable_adapter():
        assert task.evaluate(whole=True) != first
    assert built(data={"eval_share": 0}).evaluate(whole=True) == {}


def test_pictures_of_different_shapes_go_through_the_model_apart(built, tmp_path):
    place = folder(tmp_path / "wide", {"a.png": "wide"}, (64, 32))
    folder(place, {"b.png": "high"}, (32, 64))
    folder(place, {"c.png": "wide too"}, (64, 32))
    task = built(data={"path": str(place), "buckets": True, "resolution": 40})
    found = task.batches([0, 1, 2])
    assert sorted((len(batch.places), *batch.inputs["x"].shape[2:]) for batch in found) == [(1, 12, 8), (2, 8, 12)]
    assert sum(batch.units for batch in found) == 3


@pytest.mark.parametrize(
    ("adapter", "text"),
    [({}, 0), ({"use_dora": True, "rank_pattern": {"to_k": 3}}, 2), ({"peft_type": "LOHA"}, 2)],
    ids=["lora", "dora", "loha"],
)
def test_what_is_kept_is_what_was_learned(built, tmp_path, adapter, text):
    task = built(trained=True, adapter=adapter, text_encoder={"r": text}, data={"trigger": "zwx"})
    task.save(tmp_path / "adapter")
    batch = task.batches([0, 1])[0]
    with torch.no_grad():
        wanted = task.loss(batch)
        other = built(adapter=adapter, text_encoder={"r": text}, data={"trigger": "zwx"})
        assert not torch.isclose(other.loss(batch), wanted, rtol=1e-4)
        other.load(tmp_path / "adapter")
        torch.testing.assert_close(other.loss(batch), wanted, rtol=1e-5, atol=1e-6)
    there = files.read(tmp_path / "adapter")
    assert set(there.parts) == {"unet", *["text_encoder"][: bool(text)]}
    assert there.metadata["modelspec.trigger_phrase"] == "zwx"
    assert there.metadata["base_model"] == task.recipe.base


def test_plain_diffusers_reads_the_adapter(built, bases, tmp_path):
    """Pixel by pixel this is shown for each family elsewhere; here, that the folder of a run is what it looks for."""
    task = built(trained=True, adapter={"target_modules": "kohya+conv"}, text_encoder={"r": 2})
    task.save(tmp_path)
    pipe = made("sd1")
    pipe.load_lora_weights(tmp_path)
    given = torch.randn(2, 4, 8, 8), torch.tensor([3, 400]), torch.randn(2, 24, 12)
    with torch.no_grad():
        theirs, own = pipe.unet(*given).sample, task.family.parts["unet"].eval()(*given).sample
        tokens = task.family.tokens(["thing 1"])["text_encoder"]
        said, wanted = pipe.text_encoder(tokens)[0], task.family.parts["text_encoder"].eval()(tokens)[0]
    torch.testing.assert_close(theirs, own, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(said, wanted, rtol=1e-5, atol=1e-5)
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["unet.r"] == 2


@pytest.mark.parametrize(
    ("more", "idle"),
    [
        ({}, {"text_encoder", "vae"}),
        ({"text_encoder": {"r": 1}}, {"vae"}),
        ({"data": {"crop": "random"}}, {"text_encoder"}),
        ({"data": {"cache": False}}, set()),
    ],
    ids=["kept", "read anew", "seen anew", "nothing kept"],
)
def test_parts_that_have_done_their_work_rest(built, more, idle):
    task = built(**more)
    assert set(task.idle()) == idle
    asked = []
    for name in ("text_encoder", "vae"):  # which would say so
        task.family.parts[name].register_forward_pre_hook(lambda module, given, name=name: asked.append(name))
    encode = task.family.parts["vae"].encode
    task.family.parts["vae"].encode = lambda *given: asked.append("vae") or encode(*given)
    task.loss(task.batches([0, 1])[0])
    assert {"text_encoder", "vae"} - set(asked) == idle


def test_captions_that_are_cut_are_told(recipe_of, tmp_path):
    long = "a thing of many words, " * 4  # each letter is a token of this tokenizer, and 22 fit
    place = folder(tmp_path / "long", {"a.png": long.strip(), "b.png": "twenty two " + "x" * 10 + " y"})
    reporter = Heard()
    recipe, task = read_recipe(str(recipe_of("sd1", data={"path": str(place)})))
    task(recipe, reporter)
    (told,) = [own for own in reporter.told if "captions" in own]
    assert "captions longer than the 24 tokens that the text encoders read are cut (1)" in told
    assert long.strip()[:40] in told


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"base": "nowhere/at all"}, "is neither a folder"),
        ({"quantization": "int8"}, "the parts of a pipeline are not quantised"),
        ({"data": {"resolution": 30}}, r"expected multiples of 4"),
        ({"train": {"timesteps": [0, 2000]}}, "timesteps should be within 0 to 1000"),
        ({"sample": {"seeds": []}}, r"sample\.seeds"),
    ],
    ids=["no pipeline", "quantised", "resolution", "timesteps", "seeds"],
)
def test_what_cannot_be_is_said(built, more, said):
    with pytest.raises(AdapterError, match=said):
        built(**more)


def test_parts_that_lack_are_named_all_at_once(bases, built, tmp_path):
    broken = shutil.copytree(bases("sd1"), tmp_path / "broken")
    shutil.rmtree(broken / "unet")
    (broken / "vae/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"(?s)unet has no weights in safetensors.*vae has no weights"):
        built(base=str(broken))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_a_sheet_after_a_step_is_of_what_was_learned_until_then(built):
    """Also where the adapter acted from the beginning, and its pictures were measured then."""
    task = built("sd1", trained=True, eval={"looks": True}, sample={"count": 1, "steps": 2})
    task.evaluate(whole=True)
    tensors(task, 0, [0])
    with torch.no_grad():
        for parameter in task.model.parameters():
            if parameter.requires_grad:
                parameter.mul_(-2)
    task.sample()
    found = task.drawn
    task.sample()  # which draws anew in any case
    assert found.tobytes() == task.drawn.tobytes()
