"""Names of layers: every module of the genuine bases, to kohya's names and back; the original checkpoints' spelling."""

from collections.abc import Iterator

import pytest
import torch
from diffusers import StableCascadeUNet, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from veneer.files import names
from veneer.files.names_sgm import from_sgm, to_sgm

LEAVES = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm, nn.Embedding)
CROSS, PLAIN = "CrossAttn{}Block2D", "{}Block2D"
UNETS = {
    "SD1": {"cross_attention_dim": 768},
    "SD2": {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
    "SDXL": {
        "cross_attention_dim": 2048,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}


@pytest.fixture(scope="module")
def unets() -> dict[str, nn.Module]:
    with torch.device("meta"):
        return {name: UNet2DConditionModel(**config) for name, config in UNETS.items()}


def paths(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, LEAVES)]


@pytest.mark.parametrize("family", UNETS)
def test_every_module_of_a_unet_comes_back(unets, family):
    own = paths(unets[family])
    assert len(own) > 250
    assert [names.split(f"lora_unet_{path.replace('.', '_')}") for path in own] == [("unet", path) for path in own]
    assert [names.split(names.joined("unet", path, family)) for path in own] == [("unet", path) for path in own]
    assert [names.split(f"lycoris_{names.flat(path)}") for path in own] == [("", path) for path in own]
    assert names.part_of(own) == "unet"


@pytest.mark.parametrize(
    ("kind", "part", "family", "prefix"),
    [
        (CLIPTextModel, "text_encoder", "SD1", "lora_te_"),
        (CLIPTextModel, "text_encoder", "SDXL", "lora_te1_"),
        (CLIPTextModelWithProjection, "text_encoder_2", "SDXL", "lora_te2_"),
        (CLIPTextModelWithProjection, "text_encoder", "Cascade", "lora_prior_te_"),
    ],
)
def test_every_module_of_a_text_encoder_comes_back(kind, part, family, prefix):
    with torch.device("meta"):
        model = kind(CLIPTextConfig(num_hidden_layers=12))
    for own in paths(model):
        whole = own if own.startswith(("text_model.", "text_projection")) else f"text_model.{own}"
        assert names.split(prefix + names.flat(own)) == (part, whole)
        assert names.joined(part, own, family) == prefix + names.flat(whole)
        without = names.flat(whole).removeprefix("text_model_")  # as some files have it
        assert names.split(prefix + without) == (part, whole)


def test_every_module_of_cascades_prior_comes_back():
    with torch.device("meta"):
        prior = StableCascadeUNet(down_num_layers_per_block=(1, 1), up_num_layers_per_block=(1, 1))
    for own in paths(prior):
        assert names.split(names.joined("prior", own, "Cascade")) == ("prior", own)
        assert names.split(f"lora_prior_unet_{names.flat(own)}") == ("prior", own)
    assert names.split("lora_prior_unet_down_blocks_0_11_attention_attn_out_proj") == (
        "prior",
        "down_blocks.0.11.attention.to_out.0",
    )


def original(levels: int, transformers: tuple[int, ...], depths: tuple[int, ...], label: bool) -> Iterator[tuple]:
    """(original name, diffusers' path) of every module, as the original's constructor numbers its blocks one by one.

    `transformers` are the levels with attention; blocks are counted, not computed.
    """

    def residual(theirs: str, ours: str, widens: bool) -> Iterator[tuple]:
        inner = ["in_layers.0 norm1", "in_layers.2 conv1", "emb_layers.1 time_emb_proj", "out_layers.0 norm2"]
        for pair in [*inner, "out_layers.3 conv2"] + ["skip_connection conv_shortcut"] * widens:
            yield tuple(f"{where}.{own}" for where, own in zip((theirs, ours), pair.split(), strict=True))

    def transformer(theirs: str, ours: str, depth: int) -> Iterator[tuple]:
        own = ["norm", "proj_in", "proj_out"]
        for block in range(depth):
            attentions = [f"attn{n}.{to}" for n in "12" for to in ("to_q", "to_k", "to_v", "to_out.0")]
            inner = [*attentions, "ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3"]
            own += [f"transformer_blocks.{block}.{name}" for name in inner]
        yield from ((f"{theirs}.{name}", f"{ours}.{name}") for name in own)

    yield from [("time_embed.0", "time_embedding.linear_1"), ("time_embed.2", "time_embedding.linear_2")]
    yield from [("out.0", "conv_norm_out"), ("out.2", "conv_out"), ("input_blocks.0.0", "conv_in")]
    if label:
        yield from [("label_emb.0.0", "add_embedding.linear_1"), ("label_emb.0.2", "add_embedding.linear_2")]
    count = 1
    for level in range(levels):
        for layer in range(2):
            ours = f"down_blocks.{level}"
            widens = layer == 0 and 0 < level < 3
            yield from residual(f"input_blocks.{count}.0", f"{ours}.resnets.{layer}", widens)
            if level in transformers:
                yield from transformer(f"input_blocks.{count}.1", f"{ours}.attentions.{layer}", depths[level])
            count += 1
        if level < levels - 1:
            yield f"input_blocks.{count}.0.op", f"down_blocks.{level}.downsamplers.0.conv"
            count += 1
    yield from residual("middle_block.0", "mid_block.resnets.0", False)
    yield from transformer("middle_block.1", "mid_block.attentions.0", depths[-1])
    yield from residual("middle_block.2", "mid_block.resnets.1", False)
    count = 0
    for block, level in enumerate(reversed(range(levels))):
        for layer in range(3):
            ours, place = f"up_blocks.{block}", 1
            yield from residual(f"output_blocks.{count}.0", f"{ours}.resnets.{layer}", True)
            if level in transformers:
                yield from transformer(f"output_blocks.{count}.1", f"{ours}.attentions.{layer}", depths[level])
                place = 2
            if level and layer == 2:
                yield f"output_blocks.{count}.{place}.conv", f"{ours}.upsamplers.0.conv"
            count += 1


ORIGINALS = {
    "SD1": (4, (0, 1, 2), (1, 1, 1, 1), False),
    "SD2": (4, (0, 1, 2), (1, 1, 1, 1), False),
    "SDXL": (3, (1, 2), (0, 2, 10), True),
}


@pytest.mark.parametrize("family", ORIGINALS)
def test_the_original_spelling_is_the_same_modules(unets, family):
    pairs = list(original(*ORIGINALS[family]))
    assert sorted(ours for _, ours in pairs) == sorted(paths(unets[family]))
    for theirs, ours in pairs:
        assert names.split(f"lora_unet_{names.flat(theirs)}") == ("unet", ours)
        if family == "SDXL":
            assert names.joined("unet", ours, family, sgm=True) == f"lora_unet_{names.flat(theirs)}"


def test_diffusers_reads_the_original_spelling_of_sdxl_so(unets):
    from diffusers.loaders import lora_conversion_utils as theirs

    own = {path for path, module in unets["SDXL"].named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    keys = [names.joined("unet", path, "SDXL", sgm=True) for path in own]
    down = {f"{key}.lora_{way}.weight": torch.tensor(0) for key in keys for way in ("down", "up")}
    mapped = theirs._maybe_map_sgm_blocks_to_diffusers(dict(down), unets["SDXL"].config)
    read, _ = theirs._convert_non_diffusers_lora_to_diffusers(mapped)
    found = {
        key.removeprefix("unet.").removesuffix(".down.weight").replace(".processor", "").removesuffix(".lora")
        for key in read
        if key.endswith(".down.weight")
    }
    found = {key.replace("to_out_lora", "to_out.0").removesuffix("_lora") for key in found}
    assert found == {
        path for path, module in unets["SDXL"].named_modules() if isinstance(module, nn.Linear | nn.Conv2d)
    }


@pytest.mark.parametrize(
    "name",
    [
        "lora_unet_input_blocks_4_0_op",  # only what ends a resolution halves it
        "lora_unet_input_blocks_3_0_in_layers_2",
        "lora_unet_output_blocks_1_2_conv",
        "lora_unet_middle_block_3_proj_in",
        "lora_unet_double_blocks_0_img_attn_proj",
        f"lora_unet_input_blocks_{'9' * 5000}_0_op",
        "lora_unet_mid_block_attentions_0_proj_in_",
        "lora_transformer_single_transformer_blocks_0_attn_to_q",
    ],
)
def test_what_no_grammar_knows_stays_flat(name):
    part, path = names.split(name)
    assert "." not in path
    assert names.joined(part, path, None) == name


@pytest.mark.parametrize("name", ["lora_vae_conv_in", "unet.conv_in", "lora_unet_", "lora_unet_a.b", "text_model"])
def test_other_names_are_none_of_kohyas(name):
    assert names.split(name) is None


def test_a_path_that_is_not_in_the_original_spelling_is_made_flat():
    assert to_sgm("some.other_module") == "some_other_module"
    assert from_sgm("some_other_module") == "some_other_module"


@pytest.mark.parametrize("family", UNETS)
def test_the_family_is_found_from_widths_or_from_names(unets, family):
    shapes = {
        f"unet.{path}": tuple(module.weight.flatten(1).shape)
        for path, module in unets[family].named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    assert names.family(shapes) == family
    unknown = dict.fromkeys(shapes)
    assert names.family(unknown) == (family if family == "SDXL" else None)
    encoder = {"text_encoder.text_model.encoder.layers.0.mlp.fc1": (1, {"SD2": 1024}.get(family, 768))}
    assert names.family(unknown | encoder) == family


@pytest.mark.parametrize(
    ("part", "own"),
    [
        ("unet", ["conv_in", "mid_block.attentions.0.proj_in"]),
        ("prior", ["down_blocks.0.2.attention.to_q", "clf.1"]),
        ("text_encoder", ["text_model.encoder.layers.0.mlp.fc1"]),
        (None, ["encoder.layers.0.self_attn.q_proj"]),  # many models are made so
        (None, ["transformer_blocks.0.attn1.to_q"]),
        (None, ["mid_block.attentions.0.proj_in", "model.layers.0"]),
        (None, []),
    ],
)
def test_the_part_of_paths_without_one_is_told_only_where_it_is_plain(part, own):
    assert names.part_of(own) == part


def test_the_family_is_found_from_parts():
    assert names.family({"prior.blocks.0.norm": None}) == "Cascade"
    assert names.family({"text_encoder_2.text_model.encoder.layers.0.mlp.fc1": None}) == "SDXL"
    assert names.family({"unet.conv_in": None}) is None
    assert names.family({}) is None
