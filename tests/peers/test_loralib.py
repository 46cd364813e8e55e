"""loralib, the LoRA paper's own code: the same weights give the same outputs, gradients and merged weights."""

import pytest
import torch
from torch import nn

from veneer import LoraConfig, get_peft_model

loralib = pytest.importorskip("loralib")


def _pair(bias: bool, dropout: float = 0.0) -> tuple[nn.Module, nn.Module]:
    """An adapted `nn.Linear` and a `loralib.Linear` with the same weights."""
    theirs = loralib.Linear(6, 5, r=3, lora_alpha=7, lora_dropout=dropout, bias=bias).double()
    nn.init.normal_(theirs.lora_B)
    base = nn.Linear(6, 5, bias=bias).double()
    base.load_state_dict({name: value for name, value in theirs.state_dict().items() if "lora" not in name})
    config = LoraConfig(r=3, lora_alpha=7, lora_dropout=dropout, target_modules=["0"])
    ours = get_peft_model(nn.Sequential(base), config)
    with torch.no_grad():
        ours[0].adapters["default"].A.copy_(theirs.lora_A)
        ours[0].adapters["default"].B.copy_(theirs.lora_B)
    return ours, theirs


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6)], ids=str)
def test_the_outputs_and_gradients_are_the_same(bias, shape):
    ours, theirs = _pair(bias)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    update = ours[0].adapters["default"]
    torch.testing.assert_close(ours(x), theirs(x))
    found = torch.autograd.grad(ours(x).square().sum(), (x, update.A, update.B))
    torch.testing.assert_close(found, torch.autograd.grad(theirs(x).square().sum(), (x, theirs.lora_A, theirs.lora_B)))


def test_the_merged_weight_is_the_same():
    ours, theirs = _pair(True)
    ours.merge_adapter()
    theirs.eval()  # loralib merges as a side effect of this
    torch.testing.assert_close(ours[0].weight, theirs.weight)


def test_the_start_is_the_same():
    torch.manual_seed(3)
    theirs = loralib.Linear(6, 5, r=3)
    base = nn.Sequential(nn.Linear(6, 5))
    base[0].load_state_dict({name: value for name, value in theirs.state_dict().items() if "lora" not in name})
    update = get_peft_model(base, LoraConfig(r=3, target_modules=["0"]))[0].adapters["default"]
    bound = 6**-0.5
    assert not update.B.any()
    assert not theirs.lora_B.any()
    assert update.A.abs().max() <= bound
    assert theirs.lora_A.abs().max() <= bound


OTHERS = {
    "table": (lambda: loralib.Embedding(7, 5, r=3, lora_alpha=7), lambda: nn.Embedding(7, 5)),
    # of a larger kernel loralib factors another matrix, (out · k, in · k), so its A and B mean another change
    "point": (lambda: loralib.Conv2d(4, 5, 1, r=3, lora_alpha=7), lambda: nn.Conv2d(4, 5, 1)),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_tables_and_convolutions_are_the_same(kind):
    theirs, base = (make().double() for make in OTHERS[kind])
    for parameter in (theirs.lora_A, theirs.lora_B):
        nn.init.normal_(parameter)
    plain = theirs.conv if kind == "point" else theirs
    base.load_state_dict({name: value for name, value in plain.state_dict().items() if "lora" not in name})
    ours = get_peft_model(nn.Sequential(base), LoraConfig(r=3, lora_alpha=7, target_modules=["0"]))
    update = ours[0].adapters["default"]
    with torch.no_grad():
        update.A.copy_(theirs.lora_A)
        update.B.copy_(theirs.lora_B)
    x = torch.randint(0, 7, (2, 3)) if kind == "table" else torch.randn(2, 4, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))
    found = torch.autograd.grad(ours(x).square().sum(), (update.A, update.B))
    torch.testing.assert_close(found, torch.autograd.grad(theirs(x).square().sum(), (theirs.lora_A, theirs.lora_B)))
    ours.merge_adapter()
    theirs.eval()  # loralib merges as a side effect of this
    torch.testing.assert_close(ours[0].weight, plain.weight)


@pytest.mark.parametrize("enabled", [[True, False, True], [True, True, True], [False, True]], ids=str)
@pytest.mark.parametrize("conv1d", [False, True])
def test_a_fused_projection_in_parts_is_the_same(enabled, conv1d):
    """Equal ranks and sizes, which are all that loralib knows."""
    from transformers.pytorch_utils import Conv1D

    theirs = loralib.MergedLinear(6, 12, r=2, lora_alpha=7, enable_lora=enabled).double()
    nn.init.normal_(theirs.lora_B)
    base = (Conv1D(12, 6) if conv1d else nn.Linear(6, 12)).double()
    with torch.no_grad():
        base.weight.copy_(theirs.weight.T if conv1d else theirs.weight)
        base.bias.copy_(theirs.bias)
    split = {"r": [2 * on for on in enabled], "sizes": [12 // len(enabled)] * len(enabled)}
    config = LoraConfig(lora_alpha=7, target_modules=["0"], options={"fused": {"0": split}})
    ours = get_peft_model(nn.Sequential(base), config)
    update = ours[0].adapters["default"]
    parts = [update.get_parameter(f"B{i}") for i, on in enumerate(enabled) if on]
    with torch.no_grad():
        update.A.copy_(theirs.lora_A)
        for B, values in zip(parts, theirs.lora_B.chunk(sum(enabled)), strict=True):
            B.copy_(values)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(ours(x), theirs(x))
    dx, dA, *dB = torch.autograd.grad(ours(x).square().sum(), (x, update.A, *parts))
    found = (dx, dA, torch.cat(dB))
    torch.testing.assert_close(found, torch.autograd.grad(theirs(x).square().sum(), (x, theirs.lora_A, theirs.lora_B)))
