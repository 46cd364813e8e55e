"""Each family's facts, against what diffusers' own training scripts and pipelines compute from the same draws."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from train.diffusion.pipelines import CHANNELS, FACTOR, WIDTH, WIDTH_2, efficient_net, made, saved, seeing
from veneer import AdapterError
from veneer.files.pipeline import INDEX
from veneer.train.diffusion.draws import Draw
from veneer.train.diffusion.efficient_net import EfficientNetEncoder
from veneer.train.diffusion.family import Family, family_of
from veneer.train.diffusion.objective import Objective
from veneer.train.diffusion.objective_settings import ObjectiveSettings
from veneer.train.diffusion.painter import Sampling, Wish, paint
from veneer.train.diffusion.samples import Samples
from veneer.train.diffusion.schedule import schedule_of
from veneer.train.diffusion.settings import SampleSettings
from veneer.train.task import Reporter

CAPTIONS = ["a red apple", "two", ""]
SIZES = torch.tensor([[64.0, 48, 0, 3, 32, 32], [33, 32, 1, 0, 32, 32], [512, 400, 7, 9, 32, 32]])
KINDS = {"sd1": "stable-diffusion", "sd2": "stable-diffusion", "sdxl": "stable-diffusion-xl"}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    kinds = (*KINDS, "wuerstchen-prior")
    found = {kind: saved(kind, tmp_path_factory.mktemp("bases") / kind) for kind in kinds}
    seeing(found["wuerstchen-prior"])
    return found


def load(folder: Path, dtype: str | None = None) -> Family:
    return family_of(folder).load(folder, dtype, CPU)


def draw(kind: str, shape: tuple[int, ...]) -> Draw:
    noise = torch.randn(3, *shape)
    t = torch.rand(3) if kind == "wuerstchen-prior" else torch.tensor([3, 500, 999])
    return Draw(t, noise, noise)


def learned(family: Family, kept: Tensor, spread: Tensor, drawn: Draw) -> Tensor:
    """The loss of a batch, as the task makes it of its parts."""
    objective = Objective(schedule_of(family.scheduler, ObjectiveSettings()), ObjectiveSettings())
    x = family.latents_of(kept, spread)
    answer = family.predict(objective.noisy(x, drawn), drawn.t, family.encode_texts(CAPTIONS), SIZES)
    return objective.loss(answer, x, drawn).mean()


def numbers(tokenizer, captions: list[str]):
    length = tokenizer.model_max_length
    return tokenizer(captions, max_length=length, padding="max_length", truncation=True, return_tensors="pt")


@torch.no_grad()
def as_the_scripts_do(kind: str, pipe, pixels: Tensor, spread: Tensor, drawn: Draw) -> Tensor:
    """What train_text_to_image_lora.py and train_text_to_image_lora_sdxl.py compute, empty captions aside."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    dist = pipe.vae.encode(pixels).latent_dist
    latents = (dist.mean + dist.std * spread) * pipe.vae.config.scaling_factor
    noisy = scheduler.add_noise(latents, drawn.noise, drawn.t)
    if kind == "sdxl":
        hidden, pooled = [], None
        for tokenizer, encoder in ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)):
            said = encoder(numbers(tokenizer, CAPTIONS).input_ids, output_hidden_states=True, return_dict=False)
            pooled = said[0]
            hidden.append(said[-1][-2])
        text, silent = torch.cat(hidden, dim=-1), torch.tensor([1.0, 1, 0])  # the pipeline's empty prompt is zeros
        text, pooled = text * silent.view(3, 1, 1), pooled * silent.view(3, 1)
        told = {"time_ids": SIZES, "text_embeds": pooled}
        answer = pipe.unet(noisy, drawn.t, text, added_cond_kwargs=told, return_dict=False)[0]
    else:
        text = pipe.text_encoder(numbers(pipe.tokenizer, CAPTIONS).input_ids, return_dict=False)[0]
        answer = pipe.unet(noisy, drawn.t, text, return_dict=False)[0]
    v = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, drawn.noise, drawn.t) if v else drawn.noise
    return mse_loss(answer.float(), target.float())


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_diffusers_scripts(folders, kind):
    family, pipe = load(folders[kind]), made(kind)
    pixels, spread = torch.rand(3, 3, 32, 32) * 2 - 1, torch.randn(3, 4, 8, 8)
    drawn = draw(kind, (4, 8, 8))
    with torch.no_grad():
        found = learned(family, family.encode_pictures(pixels), spread, drawn)
    torch.testing.assert_close(found, as_the_scripts_do(kind, pipe, pixels, spread, drawn), rtol=1e-5, atol=1e-6)
    assert family.name == KINDS[kind]
    assert (family.factor, family.channels, family.resolution) == (FACTOR, 4, 32)


@torch.no_grad()
def test_wuerstchens_loss_is_that_of_diffusers_script(folders):
    family, pipe = load(folders["wuerstchen-prior"]), made("wuerstchen-prior")
    pixels = torch.rand(3, 3, 64, 96) * 2 - 1
    drawn = draw("wuerstchen-prior", (CHANNELS, 2, 3))
    found = learned(family, family.encode_pictures(pixels), torch.randn(3, CHANNELS, 2, 3), drawn)
    # train_text_to_image_lora_prior.py, whose pictures are normalised so
    mean, deviation = (torch.tensor(own).view(3, 1, 1) for own in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    seen = family.parts["image_encoder"]
    latents = seen.mapper(seen.backbone(((pixels + 1) / 2 - mean) / deviation)).add(1.0).div(42.0)
    said = numbers(pipe.tokenizer, CAPTIONS)
    text = pipe.text_encoder(said.input_ids, attention_mask=said.attention_mask.bool()).last_hidden_state
    noisy = pipe.scheduler.add_noise(latents, drawn.noise, drawn.t)
    wanted = mse_loss(pipe.prior(noisy, drawn.t, text).float(), drawn.noise.float())
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert (family.factor, family.channels) == (32, CHANNELS)


@torch.no_grad()
@pytest.mark.parametrize("silent", [True, False])
def test_sdxl_is_told_what_its_pipeline_is_told(tmp_path, silent):
    """Also of nothing: zeros where the pipeline says so, else what the encoders make of it."""
    folder = saved("sdxl", tmp_path)
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps({**index, "force_zeros_for_empty_prompt": silent}))
    family, pipe = load(folder), made("sdxl")
    found = family.encode_texts(["a red apple", ""])
    text, _, pooled, _ = pipe.encode_prompt("a red apple", do_classifier_free_guidance=False)
    pipe.register_to_config(force_zeros_for_empty_prompt=silent)
    _, no_text, _, no_pooled = pipe.encode_prompt("a red apple", do_classifier_free_guidance=True)
    torch.testing.assert_close(found["text"], torch.cat([text, no_text]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["pooled"], torch.cat([pooled, no_pooled]), rtol=1e-5, atol=1e-6)
    assert found["text"].shape[-1] == WIDTH + WIDTH_2
    assert bool(found["text"][1].any()) != silent


def test_sdxl_sees_every_size_in_full(folders):
    """Not rounded to the few bits of a half-precision base."""
    family = load(folders["sdxl"], "bfloat16")
    seen = []
    family.parts["unet"].add_time_proj.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    told = {key: own.detach() for key, own in family.encode_texts(CAPTIONS).items()}
    family.predict(torch.randn(3, 4, 8, 8), torch.tensor([1, 2, 3]), told, SIZES + 1000)
    assert torch.equal(seen[0], (SIZES + 1000).flatten())


def test_sdxls_vae_is_in_float32_unless_it_says_otherwise(folders, tmp_path):
    family = load(folders["sdxl"], "bfloat16")
    assert (family.parts["vae"].dtype, family.parts["unet"].dtype) == (torch.float32, torch.bfloat16)
    assert family.pipeline().vae.dtype == torch.bfloat16
    folder = saved("sdxl", tmp_path)
    config = json.loads((folder / "vae" / "config.json").read_text())
    (folder / "vae" / "config.json").write_text(json.dumps({**config, "force_upcast": False}))
    assert load(folder, "bfloat16").parts["vae"].decoder.conv_in.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [*KINDS, "wuerstchen-prior"])
def test_learning_text_encoders_get_gradients(folders, kind):
    family = load(folders[kind])
    for name in family.encoders:
        family.parts[name].requires_grad_(True)
    told = family.encode_texts(CAPTIONS[:2])
    side = 2 if kind == "wuerstchen-prior" else 8
    t = torch.tensor([0.2, 0.7]) if kind == "wuerstchen-prior" else torch.tensor([2, 700])
    family.predict(torch.randn(2, 4, side, side), t, told, SIZES[:2]).square().sum().backward()
    for name in family.encoders:
        assert any(own.grad is not None and own.grad.any() for own in family.parts[name].parameters()), name


@pytest.mark.parametrize("kind", [*KINDS, "wuerstchen-prior"])
def test_its_pipeline_is_made_of_the_live_parts(folders, kind):
    family = load(folders[kind])
    pipe, wanted = family.pipeline(), made(kind)
    assert type(pipe) is type(wanted)
    for name in (family.denoiser, *family.encoders):
        assert getattr(pipe, name) is family.parts[name]
    config = {key: own for key, own in pipe.config.items() if key != "_name_or_path"}
    assert config == {key: own for key, own in wanted.config.items() if key != "_name_or_path"}


def test_wuerstchens_prior_beside_its_decoder(tmp_path):
    from diffusers import WuerstchenCombinedPipeline

    prior, decoder = made("wuerstchen-prior"), made("wuerstchen-decoder")
    own = {f"prior_{part}": held for part, held in prior.components.items()}
    WuerstchenCombinedPipeline(**decoder.components, **own).save_pretrained(tmp_path)
    family = load(tmp_path)
    pipe = family.pipeline()
    assert isinstance(pipe, WuerstchenCombinedPipeline)
    assert pipe.prior_prior is family.parts["prior"]
    assert pipe.prior_text_encoder is family.parts["text_encoder"]
    assert family.pipeline().decoder is pipe.decoder  # read once
    assert family.drawn((768, 512)) == (1024, 640)  # its 24 × 16 latents, up to what the decoder can draw
    with pytest.raises(AdapterError, match="multiples of 128, not 832×768"):
        paint(pipe, [Wish("an apple")], Sampling(steps=1, width=832, height=768))
    before = family.digest("text_encoder")  # which names what is cached: of the prior's, not of the decoder's
    for part, same in (("text_encoder", True), ("prior_text_encoder", False)):
        tensors = load_file(path := tmp_path / part / "model.safetensors")
        save_file({name: own + 1 for name, own in tensors.items()}, path, {"format": "pt"})
        assert (family.digest("text_encoder") == before) == same
    said = family.encode_texts(CAPTIONS)["text"]
    assert torch.equal(said, prior.encode_prompt("cpu", 1, False, prompt=CAPTIONS)[0])


def test_without_an_image_encoder_it_says_what_to_do(tmp_path):
    family = load(saved("wuerstchen-prior", tmp_path))
    with pytest.raises(AdapterError, match=r"(?s)no image_encoder.*data\.latents"):
        family.encode_pictures(torch.zeros(1, 3, 32, 32))


def test_a_size_that_the_base_cannot_draw_is_told_at_once(folders):
    def samples(kind: str, **said: int) -> Samples:
        family = load(folders[kind])
        schedule = schedule_of(family.scheduler, ObjectiveSettings())
        return Samples(family, schedule, SampleSettings(**said), (64, 32), Reporter())

    with pytest.raises(AdapterError, match=r"sample\.width=832: expected multiples of 128"):
        samples("wuerstchen-prior", width=832, height=768)
    with pytest.raises(AdapterError, match=r"sample\.height=36: expected multiples of 8"):
        samples("sd1", width=32, height=36)
    own = samples("sd1").sampling
    assert (own.width, own.height) == (64, 32)


def test_an_image_encoder_that_is_none_is_named(tmp_path):
    tensors = efficient_net()
    lacking = {name: own for name, own in tensors.items() if name != "mapper.0.weight"}
    save_file(lacking, path := tmp_path / "model.safetensors")
    with pytest.raises(AdapterError, match=r"no EfficientNetV2 with a mapper: it lacks mapper\.0\.weight"):
        EfficientNetEncoder.load(path)
    save_file({**tensors, "backbone.9.weight": torch.zeros(1)}, path)
    with pytest.raises(AdapterError, match=r"(?s)no EfficientNetV2 with a mapper.*backbone\.9\.weight"):
        EfficientNetEncoder.load(path)
    path.write_bytes(b"nothing")
    with pytest.raises(AdapterError, match="cannot be read as safetensors"):
        EfficientNetEncoder.load(path)


@torch.no_grad()
def test_the_image_encoders_blocks_are_what_the_papers_say():
    """Of a fused block, silu(BN(W x)) projected by BN(W x); of the others the gate too; x + block(x) of one shape."""
    tensors = {name: own.double() if own.is_floating_point() else own for name, own in efficient_net().items()}
    encoder = EfficientNetEncoder(tensors).double().eval()

    def normed(x: Tensor, name: str, stride: int = 1, groups: int = 1) -> Tensor:
        weight = tensors[f"{name}.0.weight"]
        y = nn.functional.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2, groups=groups)
        mean, variance, scale, shift = (
            tensors[f"{name}.1.{own}"].view(-1, 1, 1) for own in ("running_mean", "running_var", "weight", "bias")
        )
        return (y - mean) / (variance + 1e-3).sqrt() * scale + shift

    silu, x = nn.functional.silu, torch.randn(2, 6, 8, 8, dtype=torch.float64)
    fused = normed(silu(normed(x, "backbone.3.0.block.0", stride=2)), "backbone.3.0.block.1")
    torch.testing.assert_close(encoder.backbone[3](x), fused)
    name, x = "backbone.6.1.block", torch.randn(2, 8, 4, 4, dtype=torch.float64)
    h = silu(normed(silu(normed(x, f"{name}.0")), f"{name}.1", groups=12))
    first, last = tensors[f"{name}.2.fc1.bias"], tensors[f"{name}.2.fc2.bias"]
    weights = tensors[f"{name}.2.fc2.weight"][..., 0, 0]
    gate = silu(h.mean((2, 3)) @ tensors[f"{name}.2.fc1.weight"][..., 0, 0].T + first) @ weights.T + last
    wanted = x + normed(h * gate.sigmoid()[..., None, None], f"{name}.3")
    torch.testing.assert_close(encoder.backbone[6][1](x), wanted)
