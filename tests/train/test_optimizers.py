"""Parts learn at rates of their own and LoRA+'s B faster; everything that trains is in exactly one group. Over fp16
the loss is scaled.
"""

import math

import pytest
import torch
from torch import nn

from veneer import AdapterError, LoraConfig, get_peft_model, lora_plus_groups
from veneer.train.optimizers import Stepper, optimizer
from veneer.train.settings import TrainSettings


@pytest.mark.parametrize("dora", [False, True])
def test_b_has_the_larger_rate_and_nothing_is_left_out(dora):
    model = get_peft_model(
        nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), LoraConfig(target_modules="0|1", use_dora=dora)
    )
    slow, fast = lora_plus_groups(model, 1e-3, 8)
    assert (slow["lr"], fast["lr"]) == (1e-3, 8e-3)
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(names[id(parameter)].endswith(".B") for parameter in fast["params"])
    assert len(fast["params"]) == 2
    assert {id(parameter) for parameter in slow["params"] + fast["params"]} == set(names)
    torch.optim.AdamW([slow, fast], lr=1.0)


def test_a_model_without_b_is_refused():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(target_modules=["0"], peft_type="LOHA"))
    with pytest.raises(AdapterError, match="trains none"):
        lora_plus_groups(model, 1e-3)


def in_parts(**keys):
    """Two parts, the first of which has a part of its own that is called like the beginning of the second."""
    torch.manual_seed(0)
    parts = nn.ModuleDict({"unet": nn.Linear(6, 6), "text": nn.Sequential(nn.Linear(6, 6)), "text_2": nn.Linear(6, 6)})
    config = LoraConfig(r=2, target_modules=".*", init_lora_weights=False, bias="all")
    return get_peft_model(parts, config), TrainSettings(lr=1e-2, weight_decay=0, **keys)


def stepped(model, stepper, lr):
    """How far a first step of AdamW moves each parameter whose gradient is 1: its rate."""
    before = trained(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    stepper.step(lr)
    return {name: (before[name] - after).abs().mean().item() for name, after in trained(model).items()}


@pytest.mark.parametrize("lr", [1e-2, 2.5e-3], ids=str)
@pytest.mark.parametrize("ratio", [None, 16.0], ids=str)
def test_parts_learn_at_rates_of_their_own_at_each_point_of_the_schedule(ratio, lr):
    model, settings = in_parts(max_grad_norm=0, loraplus_ratio=ratio)
    stepper = Stepper(model, settings, {"text": 1e-3, "text.0": 5e-3, "text_2": 4e-2})
    for name, moved in stepped(model, stepper, lr).items():
        own = {"unet": 1e-2, "text": 5e-3, "text_2": 4e-2}[name.split(".")[0]]
        faster = ratio if ratio and name.endswith(".B") else 1.0
        assert moved == pytest.approx(own * faster * lr / settings.lr, rel=1e-3), name


def test_everything_that_trains_is_in_one_group_and_matrices_alone_decay():
    model, settings = in_parts(loraplus_ratio=8)
    groups = optimizer(model, settings.model_copy(update={"weight_decay": 0.1}), {"text": 1e-3}).param_groups
    found = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(found) == sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)
    for group in groups:
        assert {parameter.ndim >= 2 for parameter in group["params"]} == {group["weight_decay"] > 0}


def test_a_run_with_own_rates_goes_on_to_the_same_bits():
    rates, ends = {"text": 1e-3}, []
    for cut in (False, True):
        model, settings = in_parts(loraplus_ratio=4)
        stepper = Stepper(model, settings, rates)
        stepped(model, stepper, 1e-2)
        if cut:
            kept = stepper.state()
            model, _ = in_parts(loraplus_ratio=4)
            stepper = Stepper(model, settings, rates)
            stepper.restore(*kept)
        stepped(model, stepper, 5e-3)
        ends.append(trained(model))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_rate_for_what_does_not_train_is_refused():
    model, settings = in_parts()
    with pytest.raises(AdapterError, match="'vae' should have a learning rate of its own"):
        Stepper(model, settings, {"text": 1e-3, "vae": 1e-3})
    without = get_peft_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(target_modules=["0"], peft_type="LOHA"))
    with pytest.raises(AdapterError, match="trains none"):
        Stepper(without, TrainSettings(loraplus_ratio=16))


TOKENS = torch.arange(24).view(2, 12)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def adapted(tiny, dtype, device="cpu"):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", modules_to_save=["lm_head"], init_lora_weights=False)
    model = get_peft_model(tiny("llama").to(device, dtype), config).train()
    return model, Stepper(model, TrainSettings(lr=1e-2))


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def losses(model, stepper, steps=8):
    """Of each step that was taken; the first scale is too large for some."""
    tokens, found = TOKENS.to(model.device), []
    while len(found) < steps:
        total = 0.0
        for rows in tokens.split(1):
            loss = model(input_ids=rows, labels=rows).loss / 2
            stepper.backward(loss)
            total += loss.item()
        norm = stepper.step(1e-2)
        if not stepper.lowers(norm):
            assert math.isfinite(norm)
            found.append(total)
    return found


@pytest.mark.parametrize("device", DEVICES)
def test_fp16_learns_as_fp32_does(tiny, device):
    half, full = (losses(*adapted(tiny, dtype, device)) for dtype in (torch.float16, torch.float32))
    assert half[-1] < half[0] - 1
    assert half == pytest.approx(full, rel=1e-2)


@pytest.mark.parametrize("device", DEVICES)
def test_small_gradients_survive_fp16_by_the_scale(tiny, device):
    """A loss of 1e-5 of its size has gradients that fp16 rounds to 0, were they not scaled: compared with fp32's."""

    def gradients(dtype, scaled):
        model, stepper = adapted(tiny, dtype, device)
        loss = model(input_ids=TOKENS.to(device), labels=TOKENS.to(device)).loss * 1e-5
        if scaled:
            stepper.backward(loss)
            stepper.scaler.unscale_(stepper.optimizer)
        else:
            loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    exact = gradients(torch.float32, False)
    off = {scaled: (gradients(torch.float16, scaled) - exact).norm() / exact.norm() for scaled in (True, False)}
    assert off[True] < 1e-2 < 10 * off[True] < off[False]


@pytest.mark.parametrize("device", DEVICES)
def test_an_overflow_skips_the_step_and_halves_the_scale(tiny, device):
    model, stepper = adapted(tiny, torch.float16, device)
    losses(model, stepper, 1)
    before, scale, skipped = trained(model), stepper.scaler.get_scale(), stepper.skipped
    stepper.backward(model(input_ids=TOKENS.to(device), labels=TOKENS.to(device)).loss * 1e4)
    norm = stepper.step(1e-2)
    assert not math.isfinite(norm)
    assert stepper.lowers(norm)
    assert (stepper.skipped, stepper.scaler.get_scale()) == (skipped + 1, scale / 2)
    assert all(torch.equal(before[name], value) for name, value in trained(model).items())
    assert all(state["step"] == 1 for state in stepper.optimizer.state.values())
    stepper.scaler.update(0.5)
    stepper.backward(model(input_ids=TOKENS.to(device), labels=TOKENS.to(device)).loss * torch.inf)
    assert not stepper.lowers(stepper.step(1e-2))


def test_without_fp16_nothing_is_scaled_and_a_bad_step_is_not_taken(tiny):
    model, stepper = adapted(tiny, torch.bfloat16)
    losses(model, stepper, 1)
    before = trained(model)
    stepper.backward(model(input_ids=TOKENS, labels=TOKENS).loss * torch.inf)
    assert not stepper.lowers(stepper.step(1e-2))
    assert all(torch.equal(before[name], value) for name, value in trained(model).items())
    with pytest.raises(AdapterError, match="no adapter got a gradient"):
        stepper.step(1e-2)


def test_a_loss_that_nothing_trained_made_is_refused(tiny):
    _, stepper = adapted(tiny, torch.float32)
    with pytest.raises(AdapterError, match="no adapter got a gradient"):
        stepper.backward(torch.zeros(()))
