"""The family of the base: from names and shapes, and what the file claims."""

import pytest
import torch

from veneer import LoraConfig, get_peft_model
from veneer.analyse.family import base_of
from veneer.analyse.summary import summary


def unet_adapter(width):
    from diffusers import UNet2DConditionModel

    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    with torch.device("meta"):
        sizes = {"block_out_channels": (8,), "norm_num_groups": 4, "attention_head_dim": 4, "layers_per_block": 1}
        unet = UNet2DConditionModel(sample_size=8, cross_attention_dim=width, **sizes, **blocks)
    return get_peft_model(unet, LoraConfig(r=2, target_modules=["to_k", "to_q"])).get_adapter()


@pytest.mark.parametrize(
    ("width", "family"), [(768, "SD 1.x"), (1024, "SD 2.x"), (2048, "SDXL"), (1280, "SDXL refiner")]
)
def test_an_image_model_is_known_by_what_its_cross_attention_reads(width, family):
    base = summary(unet_adapter(width), values=False).base
    assert base.family == family
    assert str(width) in base.because


@pytest.mark.parametrize(
    ("family", "told"),
    [
        ("llama", "Llama-like, width 32, 2 layers"),
        ("qwen3", "Llama-like, width 32, 2 layers"),
        ("gpt2", "GPT-2, width 32, 2 layers"),
        ("gpt_neox", "GPT-NeoX, width 32, 2 layers"),
        ("bloom", "Bloom or Falcon, width 32, 2 layers"),
        ("opt", "OPT or BART, width 32, 2 layers"),
        ("bert", "BERT, width 32, 2 layers"),
        ("roberta", "RoBERTa, width 32, 2 layers"),
        ("distilbert", "DistilBERT, width 32, 2 layers"),
        ("t5", "T5, 2 layers"),
        ("vit", "ViT, width 32, 2 layers"),
    ],
)
def test_a_language_model_is_known_by_its_names_its_width_and_its_layers(tiny, family, told):
    adapter = get_peft_model(tiny(family), LoraConfig(r=2, target_modules="all-linear")).get_adapter()
    assert summary(adapter, values=False).base.family == told


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"ss_base_model_version": "sd_v1"}, "SD 1.x"),
        ({"ss_base_model_version": "sd_v2_768_v"}, "SD 2.x"),
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "SDXL"),
        ({"modelspec.architecture": "stable-diffusion-v1/lora"}, "SD 1.x"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, "SD 2.x"),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "SDXL"),
        ({"modelspec.architecture": "flux-1-dev/lora"}, "Flux"),
        ({"ss_sd_model_name": "my-own.safetensors"}, None),
    ],
)
def test_what_a_file_claims(metadata, said):
    base = base_of({"strange": None}, (), None, metadata)
    assert (base.said, base.family) == (said, said)
    assert base.name == next(iter(metadata.values()))


def test_a_text_encoder_by_itself_may_be_a_pipelines():
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {"hidden_size": 768, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 3}
    text = CLIPTextModel(CLIPTextConfig(vocab_size=20, bos_token_id=0, eos_token_id=1, pad_token_id=1, **sizes))
    adapter = get_peft_model(text, LoraConfig(r=2, target_modules=["q_proj", "fc1"])).get_adapter()
    assert summary(adapter, values=False).base.family == "CLIP's text encoder, width 768, 3 layers"
    shapes = {f"text_encoder.{path}": (8, 768) for path in adapter.tensors}
    assert base_of(shapes, ("text_encoder",), None, {}).family == "SD 1.x"


def test_shapes_count_more_than_names_and_a_file_more_than_what_two_bases_share():
    llama = {"model.layers.0.self_attn.q_proj": (8, 8)}
    assert base_of(llama, (), "me/flux-writer", {}).family == "Llama-like, width 8, 1 layers"
    first = {"text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (768, 768)}
    assert base_of(first, ("text_encoder",), None, {"ss_base_model_version": "sdxl_base_v1-0"}).family == "SDXL"


def test_a_unet_of_no_known_width_is_what_the_file_says():
    paths = ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k", "text_encoder.encoder.layers.0.mlp.fc1")
    sizes, parts = dict.fromkeys(paths, (8, 8)), ("unet", "text_encoder")
    assert base_of(sizes, parts, None, {}).family == "a UNet"
    assert base_of(sizes, parts, None, {"ss_base_model_version": "sd_v2"}).family == "SD 2.x"


def test_names_of_other_image_models():
    def family(*paths, parts=("transformer",)):
        return base_of({f"{parts[0]}.{path}": (8, 8) for path in paths}, parts, None, {}).family

    assert family("single_transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.add_q_proj") == "Flux"
    assert family("transformer_blocks.0.attn.add_q_proj", "transformer_blocks.0.attn.to_q") == "SD 3"
    assert family("blocks.0.channelwise.0", parts=("prior",)) == "Würstchen prior"
    assert family("text_model.encoder.layers.0.self_attn.q_proj", parts=("text_encoder_2",)) == "SDXL"
