"""Pieces of image models: frozen layers, diffusers' attention and gated activation, with fewer bytes kept."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from veneer import LoraConfig, get_peft_model
from veneer.core import fused
from veneer.core.fused import wide_linear, wide_product
from veneer.core.reclass import mixin_of
from veneer.train.pieces import quick_pieces

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
WINDOWS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": 1, "stride": 2},
    {"kernel_size": 1, "bias": False},
    {"kernel_size": (3, 2), "padding": (0, 1), "stride": (1, 2), "dilation": (2, 1)},
    {"kernel_size": 2, "stride": 3},
]
INPUTS = {
    "sample": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)),
    "timestep": torch.tensor([1, 700]),
    "encoder_hidden_states": torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1)),
}


def _error(expected: torch.Tensor, found: torch.Tensor) -> float:
    return float((found.detach().double() - expected.detach().double()).norm() / expected.detach().double().norm())


def _run(model: nn.Module) -> list[torch.Tensor]:
    model.zero_grad()
    dtype = next(model.parameters()).dtype
    y = model(**{name: x if name == "timestep" else x.to(dtype) for name, x in INPUTS.items()}).sample
    y.float().square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.fixture
def adapted(unet):
    unet.to(torch.float32)
    return get_peft_model(unet, LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)).train()


@pytest.mark.parametrize("size", [(2, 5, 6), (1, 9, 4), (3, 12, 12)], ids=str)
@pytest.mark.parametrize("out", [3, 200])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_a_frozen_convolution_is_a_convolution(window, out, size):
    layer = nn.Sequential(nn.Conv2d(3, out, **window)).double().requires_grad_(False)
    x = torch.randn(size[0], 3, *size[1:], dtype=torch.float64, requires_grad=True)
    y = layer(x)
    expected = torch.autograd.grad(y, x, g := torch.randn_like(y))
    with quick_pieces(layer) as pieces:
        found = layer(x)
        gradient = torch.autograd.grad(found, x, g)
        assert [mixin_of(piece).__name__ for piece in pieces.replaced.values()] == ["QuickConv2d"]
    assert found.is_contiguous()
    torch.testing.assert_close((found, *gradient), (y, *expected), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rows", [33, 600])
def test_a_weight_of_another_dtype_is_cast_by_blocks(rows, monkeypatch):
    monkeypatch.setattr(fused, "BLOCK", 2**10)
    for W in (torch.randn(150, 40).bfloat16(), torch.randn(40, 150).bfloat16().t()):
        x, b, g = torch.randn(rows, 40), torch.randn(150).bfloat16(), torch.randn(rows, 150)
        assert _error(x @ W.float().t() + b.float(), wide_linear(x, W, b)) < 1e-6
        for own in (g, g.t().contiguous().t()):
            assert _error(g @ W.float(), wide_product(own, W)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_than_a_few_tokens_under_autocast_are_computed_as_the_plain_layer_does(dtype):
    base = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 8)).to(dtype)
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    x, plain = torch.randn(100, 16).to(dtype), copy.deepcopy(model)
    plain.merge_adapter()
    exact = F.linear(F.linear(x, plain[0].weight, plain[0].bias), plain[1].weight, plain[1].bias)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert _error(exact, y) < 0.02
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_what_is_replaced_in_a_unet(adapted):
    with quick_pieces(adapted) as pieces:
        kinds = {mixin_of(piece).__name__ for piece in pieces.replaced.values()}
    assert kinds == {"QuickConv2d", "QuickAttention", "HalvesGelu"}
    with quick_pieces(adapted.bfloat16()) as pieces:
        kinds = {mixin_of(piece).__name__ for piece in pieces.replaced.values()}
    assert kinds == {"QuickConv2d", "QuickLinear", "QuickAttention", "HalvesGelu"}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_unet_has_its_own_outputs_and_gradients(adapted, dtype):
    model = adapted.to(dtype)
    expected = _run(model)
    with quick_pieces(model):
        found = _run(model)
    assert len(found) == len(expected) > 1
    assert max(map(_error, expected, found)) <= TOLERANCE[dtype]
    assert all(torch.equal(a, b) for a, b in zip(expected, _run(model), strict=True))


def test_half_precision_is_as_good_as_the_unets_own(adapted):
    model = adapted.bfloat16()
    exact, plain = _run(copy.deepcopy(model).double()), _run(model)
    with quick_pieces(model):
        quick = _run(model)
    errors = [list(map(_error, exact, found)) for found in (quick, plain)]  # of output and gradients
    assert sum(errors[0]) <= 1.5 * sum(errors[1])


def test_a_unet_keeps_less_for_the_backward(adapted):
    own = {p.untyped_storage().data_ptr() for p in adapted.parameters()}

    def kept() -> int:
        found = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = adapted(**INPUTS).sample
        del y
        return sum(storage.nbytes() for storage in found.values())

    plain = kept()
    with quick_pieces(adapted):
        assert kept() < 0.8 * plain


def test_attention_of_half_precision_keeps_its_gradients():
    from diffusers.models.attention_processor import Attention

    layer = Attention(16, heads=2, dim_head=8, cross_attention_dim=12).requires_grad_(False)
    x, text = torch.randn(2, 40, 16), torch.randn(2, 7, 12)

    def run(layer: nn.Module, dtype: torch.dtype, **more: torch.Tensor) -> list[torch.Tensor]:
        inputs = [own.to(dtype).requires_grad_() for own in (x.clone(), text.clone())]
        y = layer(inputs[0], encoder_hidden_states=inputs[1], **more)
        return [y, *torch.autograd.grad(y.float().square().sum(), inputs)]

    exact, plain = run(layer, torch.float32), run(copy.deepcopy(layer).bfloat16(), torch.bfloat16)
    half = nn.Sequential(layer.bfloat16())
    with quick_pieces(half) as pieces:
        assert "0" in pieces.replaced
        quick = run(half[0], torch.bfloat16)
        told = run(half[0], torch.bfloat16, attention_mask=torch.zeros(2, 1, 7).bfloat16())
    assert max(map(_error, exact, quick)) <= max(map(_error, exact, plain))
    assert max(map(_error, exact, told)) <= 1.5 * max(map(_error, exact, plain))


def test_layers_that_are_something_else_are_left_alone():
    class Odd(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    layers = nn.Sequential(
        Odd(2, 2, 3), nn.Conv2d(2, 2, 3, groups=2), nn.Conv2d(2, 2, 3, padding="same"),
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), nn.Conv1d(2, 2, 3),
    )  # fmt: skip
    with quick_pieces(layers.requires_grad_(False)) as pieces:
        assert pieces.replaced == {}
    with quick_pieces(nn.Sequential(nn.Conv2d(2, 2, 3))) as pieces:
        assert pieces.replaced == {}
