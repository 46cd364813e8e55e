"""A genuine Stable Diffusion pipeline, tiny; known factors for its layers; and what a file changes in it."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from veneer.apart.changes import Change, adapter_of
from veneer.core.adapter import Adapter
from veneer.core.config import LoraConfig

Deltas = dict[str, Tensor]


@pytest.fixture(scope="session")
def _whole() -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    from train.diffusion.pipelines import encoder, unet

    torch.manual_seed(1)
    return StableDiffusionPipeline(
        vae=None,
        text_encoder=encoder(10, num_hidden_layers=3),
        tokenizer=None,
        unet=unet((True, True, True, False), (4, 8, 12, 12), cross_attention_dim=10),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture
def pipeline(_whole) -> Any:
    """Stable Diffusion 1's blocks, and a text encoder of three layers, as transformers has it now."""
    return copy.deepcopy(_whole)


def layers(pipeline: Any) -> dict[str, nn.Module]:
    """The linear layers and convolutions of both parts, by the paths that files have."""
    found: dict[str, nn.Module] = {}
    for part, level in (("unet", ""), ("text_encoder", "text_model.")):
        for path, module in getattr(pipeline, part).named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                found[f"{part}.{level}{path}"] = module
    return found


@pytest.fixture
def weights() -> Callable[[Any], Deltas]:
    """Copies of the layers' weights, in fp64; of adapted ones after a merge these are the changed ones."""

    def of(pipeline: Any) -> Deltas:
        return {path: layer.weight.detach().double().clone() for path, layer in layers(pipeline).items()}

    return of


@pytest.fixture
def factors(pipeline) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) of random entries for every layer, of ranks 1 to 4 by turns."""
    torch.manual_seed(2)
    found = {}
    for place, (path, layer) in enumerate(layers(pipeline).items()):
        r, (rows, columns, *kernel) = 1 + place % 4, layer.weight.shape
        found[path] = torch.randn(r, columns, *kernel), torch.randn(rows, r, *(1 for _ in kernel))
    return found


@pytest.fixture
def adapter(factors) -> Adapter:
    """All of these, with α of 1, 2, 3 by turns."""
    changes = {}
    for place, (path, (A, B)) in enumerate(factors.items()):
        changes[path] = Change(LoraConfig(r=len(A), lora_alpha=1 + place % 3), {"A": A, "B": B})
    return adapter_of(changes, parts=("unet", "text_encoder"), metadata={"ss_comment": "mine"})


@pytest.fixture
def wanted(factors) -> Deltas:
    """ΔW = α / r · B A of that adapter."""
    return {path: (1 + place % 3) / len(A) * product(A, B) for place, (path, (A, B)) in enumerate(factors.items())}


def product(A: Tensor, B: Tensor) -> Tensor:
    """B A in fp64, in the shape of the layer's weight."""
    return (B.double().flatten(1) @ A.double().flatten(1)).view(len(B), *A.shape[1:])


@pytest.fixture(name="product")
def _product() -> Callable[[Tensor, Tensor], Tensor]:
    return product


@pytest.fixture
def expect_change() -> Callable[[Mapping[str, Tensor], Mapping[str, Tensor], Mapping[str, Tensor]], None]:
    """`expect_change(before, after, wanted)`: every layer changed by the wanted ΔW, and the others not at all."""

    def expect(before: Mapping[str, Tensor], after: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
        assert before.keys() == after.keys() >= wanted.keys()
        for path, old in before.items():
            if path in wanted:
                torch.testing.assert_close(after[path] - old, wanted[path], rtol=1e-4, atol=2e-5, msg=path)
            else:
                assert torch.equal(after[path], old), path

    return expect
