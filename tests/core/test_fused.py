"""The fused forward: its formula with dropout, and what it keeps for the backward."""

import pytest
import torch
from torch import nn

from veneer import LoraConfig, get_peft_model
from veneer.core import fused
from veneer.core.fused import Change, Mask, fused_linear


def problem(dtype: torch.dtype, tokens: int = 3) -> tuple[torch.Tensor, ...]:
    sizes = ((tokens, 8), (5, 8), (5,), (2, 8), (5, 2))
    return tuple(torch.randn(size, dtype=dtype, requires_grad=True) for size in sizes)


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8), (0, 8)], ids=str)
def test_dropout_drops_inputs_of_the_change_and_scales_the_rest(shape):
    x, (_, W, b, A, B) = torch.randn(shape, dtype=torch.float64, requires_grad=True), problem(torch.float64)
    torch.manual_seed(1)
    y = fused_linear(x, W, b, [Change(A, B, 3.0, 0.25), Change(A, B, -1.0, 0.0)])
    torch.manual_seed(1)
    mask = Mask(int(torch.randint(2**62, ())), 0.25)(x)
    exact = x @ W.T + b + 3 * (x * mask / 0.75) @ A.T @ B.T - x @ A.T @ B.T
    torch.testing.assert_close(y, exact, rtol=1e-12, atol=1e-12)
    found, wanted = (torch.autograd.grad(out.square().sum(), (x, W, b, A, B)) for out in (y, exact))
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dropout", [0.01, 0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_the_share_that_it_says_evenly_and_the_same_for_the_same_seed(dropout, dtype):
    x, many = torch.randn(64, 101, dtype=dtype), 200
    seeds = torch.randint(2**62, (many,)).tolist()
    kept = torch.stack([Mask(seed, dropout)(x) for seed in seeds]).float()  # (many, 64, 101)
    assert set(kept.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(kept[0], Mask(seeds[0], dropout)(x).float())
    assert not torch.equal(kept[0], kept[1])
    deviation = (dropout * (1 - dropout)) ** 0.5
    assert abs(kept.mean().item() - (1 - dropout)) < 5 * deviation / kept.numel() ** 0.5 + 1 / 256 / many**0.5
    for way in (1, 2):  # no row or column is treated otherwise, and neighbours are independent
        shares = kept.mean((0, 3 - way)) - (1 - dropout)
        assert shares.abs().max() < 6 * deviation / (many * x.shape[2 - way]) ** 0.5 + 1 / 256 / many**0.5
        near = (kept - (1 - dropout)) * (kept.roll(1, way) - (1 - dropout))
        assert abs(near.mean().item()) < 5 * deviation**2 / kept.numel() ** 0.5 + 2 / 256**2


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_of_the_activations_only_x_itself_and_thin_products_are_kept(dropout):
    x, W, b, A, B = problem(torch.bfloat16, tokens=16)
    W.requires_grad_(False)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    change = Change(A.float().detach().requires_grad_(), B.float().detach().requires_grad_(), 1.0, dropout)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        fused_linear(x, W, b, [change])
    already = {tensor.untyped_storage().data_ptr() for tensor in (x, W)}
    thin = 2 * (A.numel() + B.numel() + 16 * 2)
    assert already <= set(kept)
    assert sum(size for place, size in kept.items() if place not in already) == thin


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4)])
@pytest.mark.parametrize("change", [torch.relu_, lambda y: y.add_(1)])
def test_the_output_may_be_changed_in_place(shape, change):
    """As that of a plain linear layer may."""
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    change(model(torch.randn(shape))).sum().backward()


def test_a_gain_multiplies_the_rows_of_the_base_without_its_bias():
    x, W, b, A, B = problem(torch.float64)
    gain = torch.randn(1, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *p: fused_linear(*p[:3], [Change(A, B, 3.0, 0.0)], p[3]), (x, W, b, gain))
    y = fused_linear(x, W, b, [Change(A, B, 3.0, 0.0)], gain)
    torch.testing.assert_close(y, x @ W.T * (1 + gain) + b + 3 * x @ A.T @ B.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", [65, 200])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_where_bf16_products_are_slow_they_are_made_in_fp32_and_rounded_once(monkeypatch, tokens, dropout):
    monkeypatch.setattr(fused, "is_quick", lambda dtype: False)
    x, W, b, _, _ = problem(torch.bfloat16, tokens)
    A, B = torch.randn(2, 8, requires_grad=True), torch.randn(5, 2, requires_grad=True)
    torch.manual_seed(0)
    y = fused_linear(x, W, b, [Change(A, B, 0.5, dropout)])
    wide = [own.detach().float().requires_grad_() for own in (x, W, b)]
    torch.manual_seed(0)
    exact = fused_linear(*wide, [Change(A, B, 0.5, dropout)])
    assert torch.equal(y, exact.to(torch.bfloat16))
    grad = torch.randn_like(y)
    found, wanted = (
        torch.autograd.grad(y, (x, W, b, A, B), grad),
        torch.autograd.grad(exact, (*wide, A, B), grad.float()),
    )
    for got, own in zip(found, wanted, strict=True):
        assert torch.equal(got, own.to(got.dtype))
