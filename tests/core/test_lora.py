"""LoRA by hand: the numbers of the formula, and how it starts."""

import math

import pytest
import torch
from torch import nn

from veneer import AdapterError, LoraConfig
from veneer.core.methods import METHODS
from veneer.core.methods.dora import Dora, row_norms
from veneer.core.methods.lora import Lora


def update(**settings: object) -> Lora:
    return Lora(torch.zeros(2, 3), LoraConfig(r=2, target_modules=["q"], **settings))


@pytest.mark.parametrize(("rslora", "scale"), [(False, 3.0), (True, 6 / math.sqrt(2))])
def test_delta_is_scale_times_b_a(rslora, scale):
    lora = update(lora_alpha=6, use_rslora=rslora)
    lora.A.data = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, -1.0]])
    lora.B.data = torch.tensor([[1.0, 0.0], [2.0, 3.0]])
    exact = scale * torch.tensor([[1.0, 2.0, 0.0], [2.0, 7.0, -3.0]])
    torch.testing.assert_close(lora.delta(torch.full((2, 3), math.nan)), exact)


def test_the_starts():
    wide = torch.zeros(4000, 300)
    for start, deviation in ((True, 1 / math.sqrt(3 * 300)), ("gaussian", 1 / 200), (False, 1 / math.sqrt(3 * 300))):
        lora = Lora(wide, LoraConfig(r=200, init_lora_weights=start, target_modules=["q"]))
        assert abs(lora.A.std().item() / deviation - 1) < 0.02
        assert lora.B.any() == (start is False)
        assert start == "gaussian" or lora.A.abs().max() <= 1 / math.sqrt(300)


def test_the_parameters_live_where_the_weight_lives_in_at_least_fp32():
    for dtype, own in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        lora = Lora(torch.zeros(2, 3, dtype=dtype, device="meta"), LoraConfig(target_modules=["q"]))
        assert {(p.device.type, p.dtype) for p in lora.parameters()} == {("meta", own)}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_names_its_parameters_in_a_file(name):
    made = METHODS[name](nn.Linear(3, 2).weight, LoraConfig(r=1, peft_type=name, target_modules=["q"]))
    assert set(dict(made.named_parameters())) <= set(made.file_names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_norm_of_dora_needs_no_sum_of_matrices_and_a_row_of_zeros_is_one(dtype):
    weight = torch.randn(40, 30).to(dtype)
    weight[3] = 0
    dora = Dora(weight, update := Lora(weight, LoraConfig(target_modules=["q"])))
    assert not dora.delta(weight).any()
    nn.init.normal_(update.B)
    update.B.data[3] = 0
    torch.testing.assert_close(row_norms(weight, update), (weight.float() + update.delta(weight)).norm(dim=1))
    assert not dora.delta(weight)[3].any()
    dora.delta(weight).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in dora.parameters())


def test_the_starts_from_the_weight():
    weight = torch.randn(50, 4) @ torch.diag(torch.tensor([9.0, 4.0, 2.0, 1.0])) @ torch.randn(4, 40)
    weight += 1e-3 * torch.randn(50, 40)
    U, S, Vt = torch.linalg.svd(weight)
    principal = U[:, :3] @ S[:3].diag() @ Vt[:3]
    for how in ("pissa", "pissa_niter_4"):
        lora = Lora(weight, LoraConfig(r=3, lora_alpha=5, init_lora_weights=how, target_modules=["q"]))
        torch.testing.assert_close(lora.scale * lora.B @ lora.A, principal, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(lora.A @ lora.A.T, lora.B.T @ lora.B, rtol=1e-4, atol=1e-3)
    lora = Lora(weight, LoraConfig(r=3, init_lora_weights="olora", target_modules=["q"]))
    torch.testing.assert_close(lora.B.T @ lora.B, torch.eye(3))
    torch.testing.assert_close(lora.B @ (lora.B.T @ weight), lora.B @ lora.A, rtol=1e-4, atol=1e-3)
    for r in (1, 2, 5):
        lora = Lora(weight, LoraConfig(r=r, init_lora_weights="orthogonal", target_modules=["q"]))
        assert lora.A.any()
        assert lora.B.any() == (r > 1)
        assert not (lora.B @ lora.A).any()


@pytest.mark.parametrize("settings", [{"r": 4}, {"lora_alpha": 0}, {"lora_alpha": -1}], ids=str)
@pytest.mark.parametrize("how", ["pissa", "pissa_niter_2", "olora"])
def test_a_start_that_the_weight_cannot_give_is_refused(how, settings):
    with pytest.raises(AdapterError, match=r"weight \(3, 5\) needs r of at most 3 and lora_alpha above 0"):
        Lora(torch.randn(3, 5), LoraConfig(init_lora_weights=how, target_modules=["q"], **{"r": 2, **settings}))
