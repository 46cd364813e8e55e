"""Fused projections in parts, which PEFT reads as an ordinary LoRA: the same outputs and gradients."""

import pytest
import torch
from torch import nn

from veneer import LoraConfig, get_peft_model

peft = pytest.importorskip("peft")


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}], ids=str)
@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_peft_reads_the_parts(tmp_path, conv1d, settings):
    settings = dict(settings)
    from transformers.pytorch_utils import Conv1D

    base = nn.Sequential(nn.Linear(6, 6), Conv1D(12, 6) if conv1d else nn.Linear(6, 12))
    fused = {"1": {"r": [4, 0, 1], "sizes": [2, 1, 3]}}  # twice, as interleaved heads are
    options = {"fused": fused, "lora_bias": settings.pop("lora_bias", False)}
    config = LoraConfig(
        r=2, lora_alpha=3, target_modules=["0", "1"], init_lora_weights=False, options=options, **settings
    )
    model = get_peft_model(base, config)
    if options["lora_bias"]:
        nn.init.normal_(model[1].adapters["default"].b)
    x = torch.randn(4, 6, requires_grad=True)
    y = model(x)
    update = model[1].adapters["default"]
    update = update.inner if settings.get("use_dora") else update
    dx, dA, dB = torch.autograd.grad(y.square().sum(), (x, update.A, update.B0))
    ratio = update.shares[0]
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(model.unload(), tmp_path, is_trainable=True)
    torch.testing.assert_close(theirs(x), y, rtol=1e-5, atol=1e-5)
    layer = theirs.base_model.model[1]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    their_dx, their_dA, their_dB = torch.autograd.grad(theirs(x).square().sum(), (x, A, B))
    torch.testing.assert_close((their_dx, their_dA), (dx, dA), rtol=1e-5, atol=1e-5)
    rows = [0, 1, 6, 7]
    torch.testing.assert_close(their_dB[rows, :4] * ratio, dB, rtol=1e-5, atol=1e-5)
