"""The fused forward: its formula with dropout, and what it keeps for the backward."""

import pytest
import torch
from torch import nn

from veneer import LoraConfig, get_peft_model
from veneer.core.fused import Change, fused_linear


def problem(dtype: torch.dtype, tokens: int = 3) -> tuple[torch.Tensor, ...]:
    sizes = ((tokens, 8), (5, 8), (5,), (2, 8), (5, 2))
    return tuple(torch.randn(size, dtype=dtype, requires_grad=True) for size in sizes)


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8), (0, 8)], ids=str)
def test_dropout_drops_inputs_of_the_change_and_scales_the_rest(shape):
    x, (_, W, b, A, B) = torch.randn(shape, dtype=torch.float64, requires_grad=True), problem(torch.float64)
    torch.manual_seed(1)
    y = fused_linear(x, W, b, [Change(A, B, 3.0, 0.25), Change(A, B, -1.0, 0.0)])
    torch.manual_seed(1)
    mask = torch.empty(shape, dtype=torch.bool).bernoulli_(0.75)
    exact = x @ W.T + b + 3 * (x * mask / 0.75) @ A.T @ B.T - x @ A.T @ B.T
    torch.testing.assert_close(y, exact, rtol=1e-12, atol=1e-12)
    found, wanted = (torch.autograd.grad(out.square().sum(), (x, W, b, A, B)) for out in (y, exact))
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("dropout", "extra"), [(0.0, 0), (0.5, 1)])
def test_of_the_activations_only_x_itself_and_thin_products_are_kept(dropout, extra):
    x, W, b, A, B = problem(torch.bfloat16, tokens=64)
    W.requires_grad_(False)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    change = Change(A.float().detach().requires_grad_(), B.float().detach().requires_grad_(), 1.0, dropout)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        fused_linear(x, W, b, [change])
    already = {tensor.untyped_storage().data_ptr() for tensor in (x, W)}
    thin = 2 * (A.numel() + B.numel() + 64 * 2)
    assert already <= set(kept)
    assert sum(size for place, size in kept.items() if place not in already) == thin + extra * x.numel()


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
