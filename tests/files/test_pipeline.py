"""Adapters merged into a pipeline's folder: every weight is W + Σ weight · ΔW, the rest is the base's, to the byte."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from veneer import Adapter, AdapterError, LoraConfig
from veneer.files.pipeline import merge_pipeline

QUERY = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q"
VALUE = "text_encoder.text_model.encoder.layers.0.self_attn.v_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A pipeline of Stable Diffusion's shape, of tiny parts, without a tokenizer."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = tmp_path_factory.mktemp("bases") / "tiny-sd"
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    )
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)
    sizes = {"hidden_size": 12, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    text = CLIPTextModel(CLIPTextConfig(vocab_size=20, bos_token_id=0, eos_token_id=1, pad_token_id=1, **sizes))
    for name, model in (("unet", unet), ("vae", vae), ("text_encoder", text)):
        model.save_pretrained(folder / name)
    diffusers.DDIMScheduler(steps_offset=1, clip_sample=False).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def adapter(r: int = 2, alpha: float = 3, **layers: tuple[int, int]) -> Adapter:
    """Random factors for `{path: (out, in)}`, with an alpha of its own."""
    sizes = layers or {QUERY: (8, 8), VALUE: (12, 12)}
    tensors = {path: {"A": torch.randn(r, i), "B": torch.randn(o, r)} for path, (o, i) in sizes.items()}
    parts = tuple(dict.fromkeys(path.partition(".")[0] for path in sizes))
    return Adapter(LoraConfig(r=r, lora_alpha=alpha, target_modules=[*sizes]), tensors, parts=parts)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor in a pipeline, by part and name; CLIP's level, which versions spell otherwise, left out."""
    found = {}
    for path in folder.rglob("*.safetensors"):
        for name, tensor in load_file(path).items():
            found[f"{path.parent.name}.{name.removeprefix('text_model.')}"] = tensor
    return found


def plain(path: str) -> str:
    return path.replace("text_model.", "")


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_every_weight_is_the_weighted_sum_and_the_rest_is_the_bases(base, tmp_path, variant):
    if variant:
        base = shutil.copytree(base, tmp_path / "base")
        for path in [*base.rglob("*.safetensors")]:
            path.rename(path.with_suffix(f".{variant}.safetensors"))
    one, two = adapter(), adapter(r=3, alpha=-1, **{QUERY: (8, 8)})
    merge_pipeline(base, [(one, 0.5), (two, 2.0)], tmp_path / "merged")
    before, after = weights(base), weights(tmp_path / "merged")
    assert after.keys() == before.keys()
    for name, old in before.items():
        expected = old.clone()
        for held, weight in ((one, 0.5), (two, 2.0)):
            for path, own in held.tensors.items():
                if name == f"{plain(path)}.weight":
                    expected += weight * held.config.lora_alpha / held.config.r * own["B"] @ own["A"]
        torch.testing.assert_close(after[name], expected)
        assert torch.equal(after[name], old) == torch.equal(expected, old)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert sorted(changed) == sorted(f"{plain(path)}.weight" for path in one.tensors)
    for part in ("vae", "scheduler"):
        for path in (base / part).iterdir():
            assert (tmp_path / "merged" / part / path.name).read_bytes() == path.read_bytes()
    (written,) = (tmp_path / "merged").glob("unet/*.safetensors")
    assert (".fp16." in written.name) == bool(variant)


def test_the_merged_folder_is_a_pipeline(base, tmp_path):
    from diffusers import DiffusionPipeline

    merge_pipeline(base, [(adapter(), 1.0)], tmp_path / "merged")
    unet = DiffusionPipeline.from_pretrained(
        tmp_path / "merged", text_encoder=None, tokenizer=None, safety_checker=None, feature_extractor=None
    ).unet
    weight = unet.get_submodule(QUERY.removeprefix("unet.")).weight
    assert torch.equal(weight, weights(tmp_path / "merged")[f"{QUERY}.weight"])


def test_in_the_type_that_the_base_is_stored_in_or_another(base, tmp_path):
    from diffusers import UNet2DConditionModel

    half = shutil.copytree(base, tmp_path / "half")
    UNet2DConditionModel.from_pretrained(base / "unet").half().save_pretrained(half / "unet")
    only = adapter(**{QUERY: (8, 8)})
    merge_pipeline(half, [(only, 1.0)], tmp_path / "stored")
    merge_pipeline(half, [(only, 1.0)], tmp_path / "asked", "bfloat16")
    assert weights(tmp_path / "stored")[f"{QUERY}.weight"].dtype == torch.float16
    assert weights(tmp_path / "asked")[f"{QUERY}.weight"].dtype == torch.bfloat16


def test_what_does_not_fit_is_told_of_all_parts_and_nothing_is_written(base, tmp_path):
    wrong = adapter(**{QUERY: (8, 9), VALUE: (13, 12)})
    with pytest.raises(AdapterError) as said:
        merge_pipeline(base, [(wrong, 1.0)], tmp_path / "merged")
    assert "unet: " in str(said.value)
    assert "text_encoder: " in str(said.value)
    with pytest.raises(AdapterError, match="'transformer' too, and"):
        merge_pipeline(base, [(adapter(**{"transformer.blocks.0.to_q": (8, 8)}), 1.0)], tmp_path / "merged")
    with pytest.raises(AdapterError, match="one model by itself"):
        merge_pipeline(base, [(Adapter(LoraConfig(r=1), {}), 1.0)], tmp_path / "merged")
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="exists"):
        merge_pipeline(base, [(adapter(), 1.0)], tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
