"""What PyTorch offers around a model: checkpointing, autocast, functional transforms, its encoder's fast path."""

import copy

import pytest
import torch
from torch import nn

from veneer import LoraConfig, get_peft_model
from veneer.core.inject import adapted_layers

TOKENS = torch.arange(10).view(2, 5)
CONFIG = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)


def gradients(model, *inputs, **more):
    model.train().zero_grad()
    model(*inputs, **more).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "vit"])
def test_checkpointing_gives_the_same_gradients(tiny, family, reentrant):
    model = get_peft_model(tiny(family, **{"dropout_rate": 0.0} if family == "t5" else {}), CONFIG)
    given = {
        "bert": {"input_ids": TOKENS, "labels": torch.tensor([0, 1])},
        "vit": {"pixel_values": torch.randn(2, 3, 8, 8), "labels": torch.tensor([0, 1])},
    }.get(family, {"input_ids": TOKENS, "labels": TOKENS})
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    plain = gradients(model, **given)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    again = gradients(model, **given)
    assert all(gradient is not None for gradient in again.values())
    torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-4)
    model.activation_checkpointing_disable()
    model.enable_input_require_grads()
    torch.testing.assert_close(gradients(model, **given), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
def test_checkpointing_of_torch_draws_dropout_once(reentrant, dropout):
    base = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))
    config = LoraConfig(r=2, target_modules=["0", "2"], lora_dropout=dropout, init_lora_weights=False)
    model, x = get_peft_model(base, config).train(), torch.randn(3, 4, requires_grad=True)

    def run(call):
        model.zero_grad()
        torch.manual_seed(1)
        call().square().sum().backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    plain = run(lambda: model(x))
    torch.testing.assert_close(run(lambda: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("names", [["0", "1"], ["2"], ["3"]], ids=["linear", "conv", "norm"])
def test_autocast_is_that_of_the_plain_composition(names, dtype):
    base = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 8), nn.Conv1d(3, 4, 3), nn.LayerNorm(6))
    config = LoraConfig(r=1, lora_alpha=1, target_modules=names, init_lora_weights=False)
    model, x = get_peft_model(base, config), torch.randn(2, 3, 6)
    plain = copy.deepcopy(model)
    plain.merge_adapter()
    with torch.autocast("cpu", dtype=dtype):
        y, wanted = model(x), plain(x)
    assert y.dtype == wanted.dtype
    exact = plain(x)
    error, usual = ((found.double() - exact.double()).abs().max() for found in (y, wanted))
    assert error <= 3 * usual + torch.finfo(dtype).eps * exact.abs().max()
    y.float().square().sum().backward()
    for _, layer in adapted_layers(model):
        for parameter in layer.adapters.parameters():
            assert (parameter.dtype, parameter.grad.dtype) == (torch.float32, torch.float32)
            assert parameter.grad.isfinite().all()
            assert parameter.grad.abs().sum() > 0


NAMES = {
    "linear": "all-linear",
    "attention": r"layers\.\d\.(self_attn|norm1)",
    "norm": r"layers\.\d\.norm\d",
    "one": ["layers.1.linear1"],
}


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("nested", [False, True], ids=["whole", "nested"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["time", "batch"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_the_encoders_fast_path_is_right_or_off(names, norm_first, batch_first, nested, grad):
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=batch_first, norm_first=norm_first)
    base = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()
    nests = base.use_nested_tensor
    model = get_peft_model(base, LoraConfig(r=1, target_modules=names, init_lora_weights=False))
    x, mask = torch.randn(3, 4, 8), torch.arange(4)[None] >= torch.tensor([[4], [2], [3]])
    for padding in (None, mask):
        given = x if batch_first else x.transpose(0, 1)
        with torch.set_grad_enabled(grad):
            wanted = model.train()(given, src_key_padding_mask=padding)
            found = model.eval()(given, src_key_padding_mask=padding)
        if not batch_first:
            found, wanted = found.transpose(0, 1), wanted.transpose(0, 1)
        kept = slice(None) if padding is None else ~padding
        torch.testing.assert_close(found[kept], wanted[kept], rtol=1e-4, atol=1e-4)
    model.delete_adapter("default")
    assert base.use_nested_tensor == nests
    model.add_adapter("again", LoraConfig(r=1, target_modules=names))
    assert not base.use_nested_tensor
    assert model.unload().use_nested_tensor == nests


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of the first forward derivative
def test_functional_transforms_go_through():
    base = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)).eval()
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    x = torch.randn(5, 4)

    def loss(values, row):
        return torch.func.functional_call(model, values, (row,)).square().sum()

    per_row = torch.vmap(torch.func.grad(loss), (None, 0))(trained, x)
    for i, row in enumerate(x):
        model.zero_grad()
        model(row).square().sum().backward()
        for name, gradient in per_row.items():
            torch.testing.assert_close(gradient[i], model.get_parameter(name).grad)
    direction = torch.randn(5, 4)
    _, along = torch.func.jvp(model, (x,), (direction,))
    jacobian = torch.func.jacrev(lambda row: model(row))
    torch.testing.assert_close(along[0], jacobian(x[0]) @ direction[0])
    torch.func.hessian(lambda row: model(row).sum())(x[0])
