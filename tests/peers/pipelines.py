"""Tiny genuine image pipelines, with the real ones' blocks, and what loading a file changes in their weights.

`Deltas` maps a parameter's full name (`unet.conv_in.weight`) to W_after − W_before, in float64.
"""

import copy
from collections.abc import Callable, Mapping
from functools import cache

import torch
from diffusers import (
    EulerDiscreteScheduler,
    FluxTransformer2DModel,
    PriorTransformer,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from torch import Tensor, nn

from train.diffusion.pipelines import WIDTH, WIDTH_2, encoder, sizes_told, unet, vae

Deltas = dict[str, Tensor]
PARTS = ("unet", "text_encoder", "text_encoder_2")


def _sd1(**more: object) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=encoder(WIDTH),
        tokenizer=None,
        unet=unet((True, True, True, False), (4, 8, 12, 12), **more),
        scheduler=EulerDiscreteScheduler(steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl() -> StableDiffusionXLPipeline:
    """Its text goes in twice: side by side as the cross-attention's input, and pooled, with six numbers of the size."""
    depths = {"transformer_layers_per_block": [1, 1, 2], "use_linear_projection": True}
    width = WIDTH + WIDTH_2
    return StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=encoder(WIDTH),
        text_encoder_2=encoder(WIDTH_2, projected=True),
        tokenizer=None,
        tokenizer_2=None,
        unet=unet((False, True, True), (4, 8, 12), cross_attention_dim=width, **sizes_told(), **depths),
        scheduler=EulerDiscreteScheduler(steps_offset=1),
        add_watermarker=False,
    )


def _flux() -> dict[str, nn.Module]:
    sizes = {"in_channels": 8, "attention_head_dim": 8, "num_attention_heads": 2, "axes_dims_rope": (4, 2, 2)}
    text = {"joint_attention_dim": WIDTH, "pooled_projection_dim": WIDTH_2}
    return {"transformer": FluxTransformer2DModel(num_layers=2, num_single_layers=2, **sizes, **text)}


def _prior() -> dict[str, nn.Module]:
    return {"prior": PriorTransformer(2, 8, 2, embedding_dim=WIDTH, num_embeddings=5)}


class Layers(nn.Module):
    """One layer of each kind that loralib knows; two of them are projections fused from parts."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(6, 5)
        self.fused = nn.Linear(6, 12)
        self.other = nn.Linear(5, 8, bias=False)
        self.point = nn.Conv2d(4, 5, 1)
        self.wide = nn.Conv2d(4, 6, 3, padding=1)
        self.table = nn.Embedding(9, 5)


FAMILIES: dict[str, Callable[[], object]] = {
    "sd1": _sd1,
    "sd2": lambda: _sd1(use_linear_projection=True),  # its text encoder is wider, its blocks are the same
    "sdxl": _sdxl,
    "flux": _flux,
    "prior": _prior,
    "loralib": Layers,
}


@cache
def shared(family: str) -> object:
    """The one that others are copies of: to look at."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        pipeline = FAMILIES[family]()
    for model in parts(pipeline).values():
        model.requires_grad_(False).eval()
    return pipeline


def fresh(family: str) -> object:
    """A pipeline of that family, its models or its one model, the same weights each time."""
    if isinstance(shared(family), (nn.Module, dict)):
        return copy.deepcopy(shared(family))
    kept = {name: part for name, part in shared(family).components.items() if isinstance(part, nn.Module)}
    own = {name: part if name == "vae" else copy.deepcopy(part) for name, part in kept.items()}
    return type(shared(family))(**{**_arguments(shared(family)), **own})


def _arguments(pipeline: object) -> dict[str, object]:
    extra = (
        {"requires_safety_checker": False} if "safety_checker" in pipeline.components else {"add_watermarker": False}
    )
    return {**pipeline.components, **extra}


def parts(pipeline: object) -> dict[str, nn.Module]:
    """The models that adapters change, by the names that files give them; "model" where there is but one."""
    if isinstance(pipeline, (nn.Module, dict)):
        return pipeline if isinstance(pipeline, dict) else {"model": pipeline}
    return {name: getattr(pipeline, name) for name in PARTS if getattr(pipeline, name, None) is not None}


def layers(family: str, kinds: tuple[type, ...] = (nn.Linear, nn.Conv2d)) -> dict[str, nn.Module]:
    """The layers of these kinds by part and path: `unet.conv_in`, `text_encoder.encoder.layers.0.mlp.fc1`."""
    found = (
        (f"{part}.{path}", layer)
        for part, model in parts(shared(family)).items()
        for path, layer in model.named_modules()
    )
    return {name: layer for name, layer in found if isinstance(layer, kinds) and hasattr(layer, "weight")}


def values(models: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Every parameter's values, under the name that it has without any adapter."""
    return {
        f"{part}.{_plain(name)}": parameter.detach().double()
        for part, model in models.items()
        for name, parameter in model.named_parameters()
        if ".lora_" not in name and ".adapters." not in name
    }


def _plain(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def deltas(after: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> Deltas:
    """What changed, of all there is. The two name the same parameters."""
    assert after.keys() == before.keys(), sorted(after.keys() ^ before.keys())
    return {name: after[name] - before[name] for name in before if not torch.equal(after[name], before[name])}


def errors(found: Deltas, wanted: Deltas) -> dict[str, float]:
    """‖found − wanted‖ / ‖wanted‖ for every parameter that either names; infinity where nothing should change."""

    def error(name: str) -> float:
        if name not in wanted:
            return float("inf")
        if name not in found:
            return 1.0
        return float((found[name] - wanted[name]).norm() / wanted[name].norm())

    return {name: error(name) for name in sorted(found.keys() | wanted.keys())}


def wrong(found: Deltas, wanted: Deltas, tolerance: float = 1e-5) -> dict[str, float]:
    """The errors that are larger than rounding to fp32 makes them."""
    return {name: error for name, error in errors(found, wanted).items() if error > tolerance}
