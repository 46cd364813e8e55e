"""Which layers a preset means, and what text encoders have of their own."""

import peft
import pytest
import torch
from diffusers import UNet2DConditionModel
from peft.tuners.lora import LoraLayer
from transformers import CLIPTextConfig, CLIPTextModel

from train.diffusion.pipelines import made
from veneer import AdapterError, LoraConfig
from veneer.core.inject import adapted_layers
from veneer.train.diffusion.parts import chosen
from veneer.train.optimizers import optimizer

XL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
}


@pytest.fixture(scope="module")
def parts():
    """The parts of Stable Diffusion 1.5 and of SDXL, in their own size, without numbers."""
    with torch.device("meta"):
        return {
            "unet": UNet2DConditionModel(cross_attention_dim=768),
            "unet of xl": UNet2DConditionModel(**XL),
            "text_encoder": CLIPTextModel(CLIPTextConfig(num_hidden_layers=12)),
            "text_encoder_2 of xl": CLIPTextModel(CLIPTextConfig(num_hidden_layers=32)),
        }


@pytest.mark.parametrize(
    ("part", "preset", "layers"),
    [  # as kohya's scripts tell them; of diffusers' habit, eight in each of 16 blocks, and of 70
        ("unet", "kohya", 192),
        ("unet", "kohya+conv", 278),
        ("unet", "attention", 128),
        ("unet of xl", "kohya", 722),
        ("unet of xl", "attention", 560),
        ("text_encoder", "kohya", 72),
        ("text_encoder", "kohya+conv", 72),
        ("text_encoder", "attention", 48),
        ("text_encoder_2 of xl", "kohya", 192),
    ],
)
def test_a_preset_means_the_layers_that_others_mean(parts, part, preset, layers):
    found = chosen(parts[part], preset, LoraConfig(), part.startswith("text"))
    assert len(found) == len(set(found)) == layers


def test_all_means_every_linear_layer_and_convolution(parts):
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    for part, model in parts.items():
        every = [path for path, module in model.named_modules() if isinstance(module, kinds)]
        assert chosen(model, "all", LoraConfig(), part.startswith("text")) == every


def test_all_of_a_prior_is_taken_by_peft_too():
    """It has convolutions in groups, where diffusers' PEFT would refuse a rank that is no multiple of their number."""
    prior = made("wuerstchen-prior").prior
    paths = chosen(prior, "all", LoraConfig(), False)
    in_groups = {path for path, module in prior.named_modules() if getattr(module, "groups", 1) > 1}
    assert in_groups
    assert not in_groups & set(paths)
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(r=3, target_modules=paths), prior)
    assert len(paths) == sum(isinstance(module, LoraLayer) for module in theirs.modules())


def test_attention_of_rank_4_has_the_parameters_that_diffusers_tells(parts):
    unet = parts["unet"]
    layers = map(unet.get_submodule, chosen(unet, "attention", LoraConfig(), False))
    assert sum(4 * (layer.in_features + layer.out_features) for layer in layers) == 797_184


def test_names_and_expressions_mean_layers_of_the_denoiser(parts):
    named = chosen(parts["unet"], ["to_q", "to_out.0"], LoraConfig(), False)
    assert len(named) == 64
    expression = chosen(parts["unet"], r".*\.(to_q|to_out\.0)", LoraConfig(exclude_modules=["attn2.to_q"]), False)
    assert set(expression) == {path for path in named if not path.endswith("attn2.to_q")}
    with pytest.raises(AdapterError, match=r"'to_kv' matches no module.*did you mean 'to_v'"):
        chosen(parts["unet"], ["to_kv"], LoraConfig(), False)


def test_text_encoders_have_a_rank_an_alpha_and_a_rate_of_their_own(built):
    text = {"r": 3, "lora_alpha": 6, "lr": 1e-3, "target_modules": "kohya"}
    task = built("sdxl", text_encoder=text, adapter={"lora_alpha": 8, "rank_pattern": {"to_k": 1}})
    layers = {path: layer.adapters["default"] for path, layer in adapted_layers(task.model)}
    names = {path.partition(".")[0] for path in layers}
    assert names == {"unet", "text_encoder", "text_encoder_2"}
    for path, update in layers.items():
        wanted = (3, 2.0) if path.startswith("text_") else (1, 8.0) if path.endswith("to_k") else (2, 4.0)
        assert (len(update.A), update.scale) == wanted, path
    groups = optimizer(task.model, task.recipe.train, task.rates()).param_groups
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    for path, update in layers.items():
        assert rates[id(update.A)] == pytest.approx(1e-3 if path.startswith("text_") else 1e-2)


def test_what_a_pipeline_cannot_keep_is_refused_before_anything_is_learned(built):
    with pytest.raises(AdapterError, match="'modules_to_save', 'bias' cannot be kept"):
        built(adapter={"modules_to_save": ["conv_out"], "bias": "all"})
    with pytest.raises(AdapterError, match=r"(?s)unet: .*'to_kv'.*text_encoder: .*'q_prj'"):
        built(adapter={"target_modules": ["to_kv"]}, text_encoder={"r": 1, "target_modules": ["q_prj"]})
    with pytest.raises(AdapterError, match=r"unet: .*'kohia' .* matches none; did you mean 'kohya'"):
        built(adapter={"target_modules": "kohia"})
    with pytest.raises(AdapterError, match=r"prior: .*has no layers that 'kohya' means"):
        built("wuerstchen-prior", adapter={"target_modules": "kohya"}, data={"resolution": 64})
