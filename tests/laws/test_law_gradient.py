"""Gradient: it equals that of the dense form; the frozen base gets none; every adapted layer learns."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from veneer import AdapterError, get_peft_model


def _gradients(y: Tensor, wanted: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad((y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum(), wanted)


def _trained_input(case, *batch: int) -> tuple[Tensor, list[Tensor]]:
    """An input, and the list of it when it can have a gradient (a table's indices cannot)."""
    x = case.x(*batch)
    return (x.requires_grad_(), [x]) if x.is_floating_point() else (x, [])


@pytest.mark.parametrize("weights", [{"a": 1.0}, {"a": 0.7, "b": -1.3}], ids=str)
def test_the_gradient_is_that_of_the_dense_form(case, weights):
    model = case.adapted("a", "b")
    model.set_adapter(weights)
    own = case.trained(*(model.layer.adapters[name] for name in weights))
    for batch in case.example.batches:
        x, wanted = _trained_input(case, *batch)
        found = _gradients(model(x), wanted + own)
        exact = _gradients(case.dense(model.layer, weights, x), wanted + own)
        torch.testing.assert_close(found, exact, rtol=1e-11, atol=1e-11)


def test_where_nothing_could_be_dropped_dropout_is_refused(case):
    if not case.kind.drops and not case.is_copy:
        with pytest.raises(AdapterError, match=r"no input that lora_dropout=0\.1 could drop"):
            get_peft_model(case.base(), replace(case.config(), lora_dropout=0.1))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_finite_differences_agree(case, dropout, request):
    model = case.adapted(lora_dropout=dropout).train()
    if hasattr(model.layer, "padding_idx"):
        model.layer.padding_idx = None  # what it gives is no derivative
    request.getfixturevalue("constants_held")
    x, wanted = _trained_input(case, 3)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    def outputs(*values: Tensor) -> Tensor:
        torch.manual_seed(1)  # the same mask every time
        return functional_call(model, dict(zip(names, values, strict=False)), (values[-1] if wanted else x,))

    assert torch.autograd.gradcheck(outputs, (*case.parameters(model), *wanted))


def test_an_unfrozen_base_gets_its_own_gradient(case):
    if case.is_copy:
        pytest.skip("a copy takes the place of the base")
    model, x = case.adapted(), case.x(3)
    own = [parameter.requires_grad_() for parameter in model.layer.parameters(recurse=False)]
    exact = _gradients(case.dense(model.layer, {"default": 1}, x), own)
    torch.testing.assert_close(_gradients(model(x), own), exact, rtol=1e-11, atol=1e-11)


def test_a_frozen_base_gets_none_and_two_layers_both_learn(case):
    model = get_peft_model(case.stack(), case.config(["layer", "head"])).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    x = case.x(3)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(".adapters." in name for name in learning)
    for _ in range(2):  # A learns from the second step on, when B is no longer zero
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        trains = name in learning
        assert (parameter.grad is not None) == trains, name
        assert torch.equal(parameter, start[name]) != trains, name


def test_a_frozen_adapter_lets_the_gradient_pass(case):
    model = case.adapted(base=case.stack(), targets=["layer", "head"])
    exact = _gradients(model(x := case.x(3)), case.trained(model.layer.adapters))
    model.head.adapters.requires_grad_(False)
    torch.testing.assert_close(_gradients(model(x), case.trained(model.layer.adapters)), exact)


def test_an_adapter_that_does_not_act_gets_none(case):
    model = case.adapted("a", "b")
    model.set_adapter("b")
    model(case.x(3)).sum().backward()
    assert all(parameter.grad is None for parameter in model.layer.adapters["a"].parameters())
    assert all(parameter.grad is not None for parameter in case.trained(model.layer.adapters["b"]))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_gradient(case, use_reentrant):
    model = case.adapted(base=case.stack(), targets=["layer", "head"], lora_dropout=0.4 * case.kind.drops).train()
    x, wanted = _trained_input(case, 3)
    if use_reentrant and not wanted:
        pytest.skip("the reentrant kind needs an input that has a gradient")
    found = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant)):
        torch.manual_seed(1)
        model.zero_grad()
        y = run(x)
        (y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum().backward()
        found.append([parameter.grad.clone() for parameter in case.parameters(model)])
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_dropout_keeps_the_expectation(case):
    model, x = case.adapted(lora_dropout=0.3), case.x(3)
    exact = model(x)  # eval mode drops nothing
    assert torch.equal(model(x), exact)
    with torch.no_grad():
        outputs = torch.stack([model.train()(x) for _ in range(4000)])
    error = (outputs.mean(0) - exact).abs()
    assert (error <= 5 * outputs.std(0) / 4000**0.5 + 1e-9).all()
    assert (outputs.std(0) > 0).any()


def test_only_the_change_is_dropped(case):
    model, x = case.adapted(lora_dropout=0.9).train(), case.x(3)
    with model.disable_adapter():
        base = model(x)
    model.set_adapter({"default": 0.0})
    assert torch.equal(model(x), base)
