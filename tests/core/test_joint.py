"""Mixed rows without gradients: the factors of all adapters in one memory."""

import copy
import io

import pytest
import torch
from torch import nn

from veneer import LoraConfig, get_peft_model

NAMES = ["a", "b", "c", "d"]


@pytest.fixture
def model():
    made = get_peft_model(nn.Sequential(nn.Linear(6, 5)), LoraConfig(r=2, target_modules=["0"]), "a").eval()
    for r, name in zip((3, 2, 4), NAMES[1:], strict=True):
        made.add_adapter(name, LoraConfig(r=r, lora_alpha=3 * r, target_modules=["0"]))
    for parameter in made[0].adapters.parameters():
        nn.init.normal_(parameter.requires_grad_(False))
    return made


def mixed(model, x, names):
    with torch.no_grad():
        return model(x, adapter_names=names)


def alone(model, x, names):
    """Row by row, with gradients enabled: another way through the code."""
    rows = []
    for row, name in zip(x, names, strict=True):
        with model.using([] if name == "__base__" else name):
            rows.append(model(row[None]))
    return torch.cat(rows).detach()


ROWS = [
    NAMES,
    ["d", "a", "c", "b"],
    ["b", "c"],
    ["a", "c", "a", "a", "d"],
    ["__base__", "d", {"a": 0.3, "d": -2.0}, "b", "__base__"],
    ["d"] * 7 + ["a"],
]


@pytest.mark.parametrize("names", ROWS, ids=str)
@pytest.mark.parametrize("tokens", [(), (3,), (0,)], ids=str)
def test_rows_are_what_each_is_alone(model, names, tokens):
    x = torch.randn(len(names), *tokens, 6)
    torch.testing.assert_close(mixed(model, x, names), alone(model, x, names))
    assert model[0].adapters.joint is not None


def _in_place(model):
    model[0].adapters["b"].A.data.mul_(2)  # no version counter tells of this


def _assigned(model):
    model[0].adapters["c"].B.data = torch.randn(5, 2)


def _reloaded(model):
    model.load_state_dict({key: torch.randn_like(value) for key, value in model.state_dict().items()}, assign=True)


def _replaced(model):
    model.delete_adapter("b")
    model.add_adapter("b", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    model[0].adapters["b"].requires_grad_(False)


def _moved(model):
    model.double().float()


def _narrowed(model):
    own = model[0].adapters["d"]
    own.A.data, own.B.data = own.A.data[:2], own.B.data[:, :2]


def _rescaled(model):
    model[0].adapters["d"].scale *= 3


def _trained(model):
    optimizer = torch.optim.AdamW(model[0].adapters.parameters(), lr=0.1)
    for parameter in model[0].adapters.parameters():
        parameter.requires_grad_()
    model.set_adapter(NAMES)
    model(torch.randn(2, 6)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("act", [_in_place, _assigned, _reloaded, _replaced, _moved, _narrowed, _rescaled, _trained])
def test_nothing_goes_stale(model, act):
    x = torch.randn(4, 6)
    before = mixed(model, x, NAMES)
    act(model)
    after = mixed(model, x, NAMES)
    torch.testing.assert_close(after, alone(model, x, NAMES))
    assert act is _moved or not torch.allclose(before, after)


def test_a_parametrised_layer_is_served(model):
    x = torch.randn(4, 6)
    torch.nn.utils.parametrizations.weight_norm(model[0])
    torch.testing.assert_close(mixed(model, x, NAMES), alone(model, x, NAMES))
    with torch.no_grad():
        served = model(x)
    torch.testing.assert_close(served, model(x).detach())


def test_copies_and_files_have_memory_of_their_own(model):
    x = torch.randn(4, 6)
    before = mixed(model, x, NAMES)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        nn.init.zeros_(other[0].adapters["a"].B)
        assert torch.equal(mixed(model, x, NAMES), before)
        assert not torch.equal(mixed(other, x, NAMES)[0], before[0])
    trained = list(model.train()[0].adapters.parameters())
    assert all(parameter.is_contiguous() for parameter in trained)
    assert torch.equal(mixed(model.eval(), x, NAMES), before)
    assert not all(parameter.is_contiguous() for parameter in trained)
    assert not all(parameter.is_contiguous() for parameter in trained)
    for tensor in model.get_adapter("a").tensors["0"].values():  # saved by itself, it has no other adapter's memory
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert torch.equal(mixed(model, x, NAMES), before)
    tensors = model.state_dict().values()
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors)
    assert all(tensor.is_contiguous() for tensor in tensors)
    assert torch.equal(mixed(model, x, NAMES), before)


def test_ranks_that_differ_too_much_are_not_joined(model):
    model.add_adapter("wide", LoraConfig(r=64, target_modules=["0"], init_lora_weights=False))
    model[0].adapters["wide"].requires_grad_(False)
    x, names = torch.randn(5, 6), [*NAMES, "wide"]
    torch.testing.assert_close(mixed(model, x, names), alone(model, x, names))
    assert model[0].adapters.joint is None


def test_parameters_that_train_are_left_alone(model):
    model[0].adapters["c"].requires_grad_()
    x, place = torch.randn(4, 6), model[0].adapters["c"].B.data_ptr()
    torch.testing.assert_close(mixed(model, x, NAMES), alone(model, x, NAMES))
    assert model[0].adapters.joint is None
    assert model[0].adapters["c"].B.data_ptr() == place


def test_adapters_made_in_inference_mode_are_mixed(model):
    x = torch.randn(4, 6)
    with torch.inference_mode():
        model.add_adapter("e", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
        model[0].adapters["e"].requires_grad_(False)
        names = ["e", *NAMES[:3]]
        torch.testing.assert_close(model(x, adapter_names=names)[0], _one(model, x[:1], "e")[0])
        model(x)


def _one(model, x, name):
    with model.using(name):
        return model(x)


def test_dropout_drops_in_training(model):
    for update in model[0].adapters.values():
        update.dropout = 0.5
    x = torch.randn(4, 6)
    model.train()
    assert not torch.equal(mixed(model, x, NAMES), mixed(model, x, NAMES))
    model.eval()
    assert torch.equal(mixed(model, x, NAMES), mixed(model, x, NAMES))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("fault", [float("inf"), float("nan")])
def test_what_one_adapter_spoils_is_its_own_row_alone(model, grad, fault):
    names, x = ["a", "__base__", "b", "__base__"], torch.randn(4, 6)
    nn.init.constant_(model[0].adapters["a"].A, fault)
    with torch.set_grad_enabled(grad), model.disable_adapter():
        base = model(x)
    for count in (4, 2):
        with torch.set_grad_enabled(grad):
            y = model(x[:count], adapter_names=names[:count])
        assert not y[0].isfinite().any()
        assert y[1:].isfinite().all()
        assert torch.equal(y[1], base[:count][1])


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("names", [["b", "c", {"b": 1.0, "a": 0.0}], ["b", "__base__", {"a": 0.0}]], ids=str)
def test_an_adapter_of_weight_0_in_every_row_spoils_none(model, grad, names):
    nn.init.constant_(model[0].adapters["a"].A, torch.nan)
    with torch.set_grad_enabled(grad):
        assert model(torch.randn(3, 6), adapter_names=names).isfinite().all()


@pytest.mark.parametrize("grad", [False, True])
def test_rows_are_mixed_under_autocast(model, grad):
    x = torch.randn(4, 6)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
        y = model(x, adapter_names=NAMES)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), alone(model, x, NAMES), rtol=0.05, atol=0.1)
