"""Pipelines made from their folders, Würstchen's too, wherever the homes and names of their classes are by now."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from veneer import AdapterError, LoraConfig
from veneer.core.adapter import Adapter
from veneer.files import adapter_on, attach, detach
from veneer.files.pipeline import INDEX, load_pipeline, merge_pipeline

QUERY, FIRST = "prior.blocks.2.attention.to_q", "text_encoder.text_model.encoder.layers.0.mlp.fc1"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    from train.diffusion.pipelines import saved

    return saved("wuerstchen-prior", tmp_path_factory.mktemp("bases") / "prior")


@pytest.fixture
def adapter() -> Adapter:
    shapes = {QUERY: (16, 16), FIRST: (20, 12)}
    tensors = {path: {"A": torch.randn(2, i), "B": torch.randn(o, 2)} for path, (o, i) in shapes.items()}
    return Adapter(LoraConfig(r=2, lora_alpha=3, target_modules=[*shapes]), tensors, parts=("prior", "text_encoder"))


@pytest.mark.parametrize("library", ["diffusers", "wuerstchen"])
def test_a_saved_pipeline_is_made_again(base, tmp_path, bits, library):
    from train.diffusion.pipelines import made

    folder = shutil.copytree(base, tmp_path / "prior")
    index = json.loads((folder / INDEX).read_text())
    index["prior"], index["latent_mean"] = [library, "WuerstchenPrior"], 41.0
    (folder / INDEX).write_text(json.dumps(index))
    found, wanted = load_pipeline(folder), made("wuerstchen-prior")
    assert type(found) is type(wanted)
    assert found.config.latent_mean == 41.0
    for part in ("prior", "text_encoder"):
        assert bits(getattr(found, part)) == bits(getattr(wanted, part))
    assert load_pipeline(folder, "bfloat16").prior.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["sd1", "sdxl", "wuerstchen-decoder"])
def test_others_are_as_they_were(kind, tmp_path, bits):
    from train.diffusion.pipelines import made, saved

    found, wanted = load_pipeline(saved(kind, tmp_path)), made(kind)
    assert dict(found.config) == {key: value for key, value in wanted.config.items() if key != "_name_or_path"}
    for part, model in wanted.components.items():
        if isinstance(model, torch.nn.Module):
            assert bits(found.components[part]) == bits(model)


def test_a_folder_of_old_with_a_safety_checker(tmp_path, bits):
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    from train.diffusion.pipelines import made, saved

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    vision = {**sizes, "image_size": 8, "patch_size": 4, "projection_dim": 6}
    config = CLIPConfig(text_config=sizes, vision_config=vision, projection_dim=6)
    folder = saved("sd1", tmp_path)
    StableDiffusionSafetyChecker(config).save_pretrained(folder / "safety_checker")
    CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=8).save_pretrained(folder / "feature_extractor")
    index = json.loads((folder / INDEX).read_text()) | {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPFeatureExtractor"],
        "tokenizer": ["transformers", "CLIPTokenizerFast"],
    }
    (folder / INDEX).write_text(json.dumps(index))
    tensors = load_file(path := folder / "text_encoder" / "model.safetensors")
    old = {f"text_model.{name.removeprefix('text_model.')}": own for name, own in tensors.items()}
    save_file({**old, "text_model.embeddings.position_ids": torch.arange(24)[None]}, path, {"format": "pt"})
    tensors = load_file(path := folder / "vae" / "diffusion_pytorch_model.safetensors")
    words = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, past in words.items():
        tensors = {name.replace(f".{new}.", f".{past}."): own for name, own in tensors.items()}
    save_file(tensors, path, {"format": "pt"})
    found = load_pipeline(folder)
    assert bits(found.vae) == bits(made("sd1").vae)
    assert bits(found.text_encoder) == bits(made("sd1").text_encoder)
    assert isinstance(found.safety_checker, StableDiffusionSafetyChecker)
    assert isinstance(found.feature_extractor, CLIPImageProcessor)
    (folder / INDEX).write_text(json.dumps({**index, "safety_checker": ["os.path", "StableDiffusionSafetyChecker"]}))
    with pytest.raises(AdapterError, match=r"is a 'StableDiffusionSafetyChecker' of 'os\.path'"):
        load_pipeline(folder)


def test_all_that_lacks_is_told(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "prior")
    shutil.rmtree(folder / "scheduler")
    (folder / "prior" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"(?s)prior has no weights.*scheduler cannot be loaded as a DDPMW"):
        load_pipeline(folder)
    index = json.loads((base / INDEX).read_text())
    less = {key: own for key, own in index.items() if key not in ("scheduler", "prior")}
    (folder / INDEX).write_text(json.dumps(less))
    with pytest.raises(AdapterError, match=r"holds not what a WuerstchenPriorPipeline is made of: .*'scheduler'"):
        load_pipeline(folder)
    with pytest.raises(AdapterError, match="no diffusers pipeline: it has no model_index"):
        load_pipeline(folder / "tokenizer")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("_class_name", "logging", "'logging' is no pipeline of diffusers"),
        ("_class_name", "UNet2DModel", "'UNet2DModel' is no pipeline of diffusers"),
        ("_class_name", "NoSuchPipeline", "diffusers have no 'NoSuchPipeline'"),
        ("scheduler", ["transformers", "set_seed"], "'set_seed' of transformers is no part of a pipeline"),
        ("more", ["diffusers", "DDPMScheduler"], "cannot be loaded as a DDPMScheduler"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_an_index_that_lies_is_told(base, tmp_path, key, value, said):
    folder = shutil.copytree(base, tmp_path / "prior")
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps({**index, key: value}))
    with pytest.raises(AdapterError, match=said):
        load_pipeline(folder)


def test_a_weight_that_lacks_is_never_a_random_one(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "prior")
    tensors = load_file(path := folder / "prior" / "diffusion_pytorch_model.safetensors")
    del tensors["projection.bias"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(AdapterError, match="lacks weights of a WuerstchenPrior: "):
        load_pipeline(folder)


def _combined(prior, decoder):
    from diffusers import WuerstchenCombinedPipeline

    own = {f"prior_{part}": held for part, held in prior.components.items()}
    return WuerstchenCombinedPipeline(**decoder.components, **own)


def test_merged_into_the_prior_alone_and_beside_its_decoder(base, tmp_path, adapter):
    from train.diffusion.pipelines import made

    pipeline = _combined(made("wuerstchen-prior"), made("wuerstchen-decoder"))
    pipeline.save_pretrained(tmp_path / "combined")
    for folder, place in ((base, "{}"), (tmp_path / "combined", "prior_{}")):
        merge_pipeline(folder, [(adapter, 0.5)], out := tmp_path / f"{folder.name} merged")
        before, after = load_pipeline(folder), load_pipeline(out)
        for path, own in adapter.tensors.items():
            part, _, inner = path.replace("text_model.", "").partition(".")
            old, new = (getattr(pipe, place.format(part)).get_submodule(inner).weight for pipe in (before, after))
            torch.testing.assert_close(new, old + 0.5 * 3 / 2 * own["B"] @ own["A"])


def test_on_a_prior_beside_its_decoder(adapter, bits):
    from train.diffusion.pipelines import made

    prior, decoder = made("wuerstchen-prior"), made("wuerstchen-decoder")
    pipeline, before = _combined(prior, decoder), bits(decoder.text_encoder)
    models = attach(pipeline, adapter)
    assert models == {"prior": prior.prior, "text_encoder": prior.text_encoder}
    assert bits(decoder.text_encoder) == before
    held = adapter_on(pipeline)
    assert set(held.parts) == {"prior", "text_encoder"}
    assert held.tensors.keys() == adapter.tensors.keys()
    detach(pipeline)
    assert not hasattr(prior.prior, "peft_config")
