"""Pictures from a live pipeline: each is its own, whatever stands beside it, and nothing is other than before."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from train.diffusion.pipelines import made
from veneer import AdapterError, LoraConfig, attach, detach
from veneer.apart.changes import Change, adapter_of, changes
from veneer.files.parts import by_part
from veneer.train.diffusion.painter import Sampling, Wish, paint

FEW = Sampling(steps=2)
SOME = ("to_q", "to_v", "q_proj", "ff.net.2", "to_out.0", "conv1")


def adapter_for(pipeline, seed, parts=("unet", "text_encoder"), r=2):
    """Random changes, that can be seen, of some layers."""
    generator = torch.Generator().manual_seed(seed)
    every = {}
    for part in parts:
        for path, layer in getattr(pipeline, part).named_modules():
            if path.endswith(SOME) and isinstance(layer, (nn.Linear, nn.Conv2d)):
                rows, columns, *kernel = layer.weight.shape
                A = torch.randn(r, columns, *kernel, generator=generator)
                B = torch.randn(rows, r, *(1 for _ in kernel), generator=generator)
                every[f"{part}.{path}"] = Change(LoraConfig(r=r, lora_alpha=1, lora_dropout=0.5), {"A": A, "B": B / 2})
    return adapter_of(every, parts=parts)


def merge_by_hand(pipeline, adapter, weight):
    """W ← W + weight · scale · B A."""
    for part, own in by_part(adapter).items():
        for path, change in changes(own).items():
            layer = getattr(pipeline, part).get_submodule(path)
            A, B = (change.tensors[name].double() for name in "AB")
            product = (B.flatten(1) @ A.flatten(1)).view(layer.weight.shape)
            layer.weight.data += (weight * change.config.lora_alpha / len(A) * product).float()


def plain(pipeline, prompt, seed, **more):
    """What diffusers itself draws, as numbers."""
    generator = torch.Generator().manual_seed(seed)
    drawn = pipeline(prompt, generator=generator, num_inference_steps=2, output_type="np", **more)
    return drawn.images[0]


def bytes_of(pictures):
    return [picture.tobytes() for picture in pictures]


@pytest.fixture
def painted():
    """A pipeline with two adapters, of other parts."""
    pipeline = made("sd1")
    attach(pipeline, adapter_for(pipeline, 1), "a")
    carriers = attach(pipeline, adapter_for(pipeline, 2, ("unet",)), "b")
    return pipeline, carriers


def test_a_picture_is_the_same_alone_and_among_others(painted):
    pipeline, _ = painted
    wishes = [
        Wish("a cat", 1, {"a": 1}),
        Wish("a dog", 1, {"a": 0.5}),
        Wish("a cat", 2, {"a": 1}),
        Wish("a cat", 1, {"a": 1, "b": 1}),
        Wish("a cat", 1, {}),
        Wish("a cat", 1, {"a": {"unet": 1.0, "text_encoder": 0.0}}),
    ]
    together = bytes_of(paint(pipeline, wishes, FEW))
    assert len(set(together)) == len(wishes)
    assert [bytes_of(paint(pipeline, [wish], FEW))[0] for wish in reversed(wishes)] == together[::-1]


def test_strength_0_is_the_base_to_the_bit(painted):
    pipeline, _ = painted
    none = bytes_of(paint(pipeline, [Wish("a cat", 3, {}), Wish("a cat", 3, {"a": 0.0, "b": 0})], FEW))
    base = (plain(made("sd1"), "a cat", 3) * 255).round().astype(np.uint8)
    assert none == [base.tobytes()] * 2


@pytest.mark.parametrize("weights", [{"a": 0.6}, {"a": 0.7, "b": -0.5}], ids=["one", "blend"])
def test_a_strength_is_a_scaled_change_and_a_blend_their_sum(painted, weights):
    pipeline, carriers = painted
    by_hand = made("sd1")
    own = {"a": adapter_for(by_hand, 1), "b": adapter_for(by_hand, 2, ("unet",))}
    for name, weight in weights.items():
        merge_by_hand(by_hand, own[name], weight)
    expected = plain(by_hand, "a cat", 1)
    with carriers.using(weights):
        assert abs(plain(pipeline, "a cat", 1) - expected).max() < 1e-5
    (picture,) = paint(pipeline, [Wish("a cat", 1, weights)], FEW)
    assert abs(np.asarray(picture) / 255 - expected).max() < 0.502 / 255
    assert abs(plain(made("sd1"), "a cat", 1) - expected).max() > 0.01


def test_merged_pictures_are_those_of_live_adapters_and_the_weights_come_back(painted, bits):
    pipeline, carriers = painted
    before = {part: bits(model) for part, model in carriers.items()}
    wishes = [Wish("a cat", seed, {"a": strength}) for seed in (1, 2) for strength in (0.0, 0.8)]
    live, merged = paint(pipeline, wishes, FEW), paint(pipeline, wishes, FEW, merged=True)
    assert bytes_of(live[::2]) == bytes_of(merged[::2])
    for one, other in zip(live, merged, strict=True):
        assert abs(np.asarray(one).astype(int) - np.asarray(other)).max() <= 1
    assert {part: bits(model) for part, model in carriers.items()} == before


@pytest.mark.parametrize("fails", [False, True], ids=["drawn", "refused"])
def test_nothing_is_other_than_before(painted, fails):
    pipeline, carriers = painted
    carriers.set_adapter({"b": 0.3})
    pipeline.unet.train()  # whose adapters have dropout
    pipeline.unet.mid_block.eval()
    pipeline.set_progress_bar_config(disable=True, desc="mine")
    scheduler, config = pipeline.scheduler, pipeline._progress_bar_config
    modes = [module.training for module in pipeline.unet.modules()]
    state, terms = torch.get_rng_state(), [model.adapter_plan.terms for model in carriers.values()]
    wishes = [Wish("a cat", 1, {"a": 1}), Wish("a cat", 1)]
    if fails:
        with pytest.raises(AdapterError, match="divisible by 8"):
            paint(pipeline, wishes, Sampling(steps=2, width=33, height=32))
    else:
        first = bytes_of(paint(pipeline, wishes, FEW))
        assert first == bytes_of(paint(pipeline, wishes, FEW))
        pipeline.unet.eval()
        assert first == bytes_of(paint(pipeline, wishes, FEW))
        pipeline.unet.train()
        pipeline.unet.mid_block.eval()
    assert torch.equal(torch.get_rng_state(), state)
    assert [model.adapter_plan.terms for model in carriers.values()] == terms
    assert [module.training for module in pipeline.unet.modules()] == modes
    assert pipeline.scheduler is scheduler
    assert pipeline._progress_bar_config == config


def test_settings_reach_the_pipeline_and_are_diffusers_own():
    pipeline = made("sd2")
    words = {"guidance_scale": 4.0, "guidance_rescale": 0.7, "negative_prompt": "a dog", "width": 40, "height": 48}
    sampling = Sampling(2, 4.0, 0.7, "a dog", 40, 48)
    (picture,) = paint(pipeline, [Wish("a cat", 5)], sampling)
    assert picture.size == (40, 48)
    expected = (plain(made("sd2"), "a cat", 5, **words) * 255).round().astype(np.uint8)
    assert picture.tobytes() == expected.tobytes()
    assert Sampling(steps=3).over(sampling) == Sampling(3, 4.0, 0.7, "a dog", 40, 48)


def test_progress_goes_from_step_to_step():
    told = []
    paint(made("sd2"), [Wish("a", 1), Wish("a", 2)], FEW, progress=lambda done, every: told.append((done, every)))
    assert told == [(0.5, 2), (0.99, 2), (1, 2), (1.5, 2), (1.99, 2), (2, 2)]


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers' Euler sampler and NumPy 2
def test_sdxl_draws_as_diffusers_does():
    pipeline = made("sdxl")
    attach(pipeline, adapter_for(pipeline, 1, ("unet", "text_encoder", "text_encoder_2")), "a")
    base, adapted = paint(pipeline, [Wish("a cat", 1, {}), Wish("a cat", 1, {"a": 0.5})], FEW)
    detach(pipeline)
    expected = (plain(pipeline, "a cat", 1) * 255).round().astype(np.uint8)
    assert base.tobytes() == expected.tobytes() != adapted.tobytes()


def test_wuerstchen_draws_with_its_decoder_as_diffusers_does():
    from diffusers import WuerstchenCombinedPipeline

    held = {f"prior_{part}": own for part, own in made("wuerstchen-prior").components.items()}
    pipeline = WuerstchenCombinedPipeline(**made("wuerstchen-decoder").components, **held)
    pipeline.set_progress_bar_config(disable=True)
    attach(pipeline, adapter_for(SimpleNamespace(prior=pipeline.prior_prior), 1, ("prior",)), "a")
    few = Sampling(steps=2, width=128, height=128)
    base, adapted = paint(pipeline, [Wish("a cat", 1, {}), Wish("a cat", 1, {"a": 1})], few)
    detach(pipeline)
    size = {"prior_num_inference_steps": 2, "width": 128, "height": 128}
    drawn = pipeline("a cat", generator=torch.Generator().manual_seed(1), **size).images[0]
    assert base.tobytes() == drawn.tobytes() != adapted.tobytes()


def test_what_cannot_be_drawn_is_refused(painted):
    pipeline, _ = painted
    with pytest.raises(AdapterError, match="no adapter named 'c'"):
        paint(pipeline, [Wish("a cat", 1, {"c": 1})], FEW)
    with pytest.raises(AdapterError, match="needs its decoder"):
        paint(made("wuerstchen-prior"), [Wish("a cat", 1)], FEW)
    with pytest.raises(AdapterError, match="knows no guidance_rescale"):
        paint(made("wuerstchen-prior"), [Wish("a cat", 1)], Sampling(guidance_rescale=0.5))
    with pytest.raises(AdapterError, match="said together"):
        paint(pipeline, [Wish("a cat", 1)], Sampling(width=32))
