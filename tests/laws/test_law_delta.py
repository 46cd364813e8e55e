"""Delta: the forward of an adapted layer equals the formula with W + Σ weight · ΔW in the place of W."""

import inspect

import pytest
import torch
from torch import nn

WEIGHTS = [{"a": 1.0}, {"a": 0.7, "b": -1.3}, {"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 0.0, "c": 2.5}, {}]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_the_forward_equals_the_definition(case, weights):
    model = case.adapted("a", "b", "c")
    model.set_adapter(weights)
    for batch in case.example.batches:
        x = case.x(*batch)
        torch.testing.assert_close(model(x), case.dense(model.layer, weights, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "settings", [{"use_rslora": True}, {"rank_pattern": {"layer": 1}}, {"lora_dropout": 0.5}], ids=str
)
def test_the_settings_change_nothing_in_that(case, settings):
    if case.is_copy and "rank_pattern" in settings:
        pytest.skip("a copy has no rank")
    model, x = case.adapted(**settings), case.x(3)
    torch.testing.assert_close(model(x), case.dense(model.layer, {"default": 1}, x), rtol=1e-12, atol=1e-12)


def test_the_input_has_the_name_that_it_had(case):
    name = list(inspect.signature(type(case.base().layer).forward).parameters)[1]
    model, x = case.adapted(), case.x(3)
    assert torch.equal(model.layer(**{name: x}), model.layer(x))


def test_a_non_contiguous_input_is_only_an_input(case):
    model, x = case.adapted(), case.x(4)
    every_second = torch.stack([x, x], -1)[..., 0]
    for other in (every_second, x.transpose(0, -1).contiguous().transpose(0, -1)):
        assert torch.equal(other, x)
        torch.testing.assert_close(model(other), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_base_of_low_precision_keeps_its_dtype_and_trains_in_fp32(case, dtype):
    model, x = case.adapted(dtype=dtype), case.x(64, dtype=dtype)
    y = model(x)
    exact = case.dense(model.double().layer, {"default": 1}, x.double() if x.is_floating_point() else x)
    assert y.dtype == dtype
    assert (y - exact).norm() < 4 * torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_adapter_of_a_base_of_low_precision_is_fp32(case, dtype):
    model = case.adapted(dtype=dtype)
    model(case.x(3, dtype=dtype)).float().square().mean().backward()
    for parameter in case.parameters(model):
        assert parameter.dtype == parameter.grad.dtype == torch.float32


def test_autocast_computes_in_its_dtype_forward_and_backward(case):
    model, x = case.adapted(dtype=torch.float32), case.x(16, dtype=torch.float32)
    exact = case.dense(model.layer, {"default": 1}, x)
    wanted = torch.autograd.grad(exact.square().mean(), case.parameters(model))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, base = model(x), case.base(torch.float32)(x)
    assert y.dtype == base.dtype
    found = torch.autograd.grad(y.float().square().mean(), case.parameters(model))
    for low, high in [(y, exact), *zip(found, wanted, strict=True)]:
        assert (low - high).norm() < 0.05 * high.norm()
    for gradient in found:
        assert gradient.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:.*Function.*should not be instantiated:DeprecationWarning")
def test_a_compiled_model_is_the_same_model(case):
    model = case.adapted(base=case.stack(torch.float32), targets=["layer", "head"])
    x = case.x(3, dtype=torch.float32)
    torch.compiler.reset()  # what other models left in the cache counts for the limit of recompilations
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    gradients = [torch.autograd.grad(m(x).square().mean(), case.parameters(model)) for m in (compiled, model)]
    torch.testing.assert_close(*gradients)
    for switch in ({}, {"default": 0.5}):
        model.set_adapter(switch)
        torch.testing.assert_close(compiled(x), model(x))


def test_switching_adapters_reaches_every_layer(case):
    model, x = case.adapted("a", "b", base=case.stack(), targets=["layer", "head"]), case.x(3)
    outputs = {}
    for name in ("a", "b"):
        model.set_adapter(name)
        outputs[name] = model(x)
        h = case.dense(model.layer, {name: 1}, x)
        update, shift = model.head.adapters[name], model.head.adapters[name].shift(model.head.bias)
        head = model.head.weight + update.delta(model.head.weight)
        bias = model.head.bias if shift is None else model.head.bias + shift
        torch.testing.assert_close(outputs[name], nn.functional.linear(h, head, bias), rtol=1e-11, atol=1e-11)
    assert not torch.allclose(outputs["a"], outputs["b"])
