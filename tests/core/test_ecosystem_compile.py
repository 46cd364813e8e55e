"""`torch.compile(fullgraph=True)`: the same numbers, and graphs that are counted, not one for every adapter."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from veneer import LoraConfig, PeftModel, get_peft_model

TOKENS = torch.arange(10).view(2, 5)
NAMES = [f"a{i}" for i in range(12)]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def model(tiny):
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(tiny("llama", num_hidden_layers=1), config, NAMES[0])
    for name in NAMES[1:]:
        model.add_adapter(name, config)
    return model


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def agree(model: PeftModel, compiled: nn.Module, **more: object) -> None:
    y = compiled(TOKENS, use_cache=False, **more).logits
    torch.testing.assert_close(y, model(TOKENS, use_cache=False, **more).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_one_graph_serves_every_adapter_and_every_weight(model, grad):
    compiled = torch.compile(model.train(grad), backend="eager", fullgraph=True)
    with torch.set_grad_enabled(grad):
        for name in (*NAMES, *NAMES):
            model.set_adapter(name)
            agree(model, compiled)
        switching = graphs()
        for weight in (0.3, 0.4, 0.5, -2.0):
            model.set_adapter({NAMES[1]: weight, NAMES[2]: 1 - weight})
            agree(model, compiled)
        blending = graphs() - switching
        with model.disable_adapter():
            agree(model, compiled)
        before = graphs()
        for spec in (NAMES[5], {NAMES[3]: 0.7, NAMES[4]: 0.1}, [], NAMES[0], {NAMES[1]: 3.0, NAMES[2]: -1.0}):
            model.set_adapter(spec)
            agree(model, compiled)
    assert switching <= 2
    assert blending <= 2
    assert before == switching + blending + 1
    assert graphs() == before


def test_gradients_are_those_of_the_model_that_is_not_compiled(model):
    compiled = torch.compile(model.train(), backend="aot_eager", fullgraph=True)
    found = []
    for run in (model, compiled):
        model.zero_grad()
        run(TOKENS, labels=TOKENS).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert len(found[0]) == 14
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


METHODS = {
    "dora": LoraConfig(r=2, target_modules=["0", "1"], use_dora=True, init_lora_weights=False),
    "loha": LoraConfig(r=2, target_modules=["0", "1"], peft_type="LOHA", init_lora_weights=False),
    "vera": LoraConfig(r=2, target_modules=["0", "1"], peft_type="VERA", init_lora_weights=False),
    "norm": LoraConfig(r=1, target_modules=["2"], init_lora_weights=False),
    "dropout": LoraConfig(r=2, target_modules=["0"], lora_dropout=0.5, init_lora_weights=False),
}


@pytest.mark.parametrize("grad", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
def test_other_methods_and_kinds(config, grad):
    model = get_peft_model(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4), nn.LayerNorm(4)).eval(), config)
    model.add_adapter("b", config)
    for parameter in model.parameters():
        parameter.requires_grad_(grad)
    compiled, x = torch.compile(model, backend="eager", fullgraph=True), torch.randn(3, 4)
    for name in ("default", "b", "default"):
        model.set_adapter(name)
        torch.testing.assert_close(compiled(x), model(x))
    assert graphs() <= 2


def test_mixed_rows(model):
    compiled, batches = torch.compile(model, backend="eager", fullgraph=True), (["a0", "a1"], ["a2", "__base__"])
    with torch.no_grad():
        found = [compiled(TOKENS, use_cache=False, adapter_names=names).logits for names in (*batches, *batches)]
        assert graphs() == 2
        wanted = [model(TOKENS, use_cache=False, adapter_names=names).logits for names in (*batches, *batches)]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inductor():
    config = LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4)), config)
    model.add_adapter("b", config)
    compiled, x = torch.compile(model, fullgraph=True), torch.randn(3, 4)
    for name in ("default", "b", "default"):
        model.set_adapter(name)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))
        found, wanted = compiled(x), model(x)
        torch.testing.assert_close(found, wanted)
        inputs = [p for n, p in model.named_parameters() if f".{name}." in n]
        grads = [torch.autograd.grad(y.square().sum(), inputs) for y in (found, wanted)]
        torch.testing.assert_close(*grads)
    assert graphs() <= 4
