"""Quantised linear layers keep their own forward, and a change is added to it.

The real libraries run where they are installed; a layer of our own, which does as they do, runs everywhere.
"""

import copy

import pytest
import torch
from torch import Tensor, nn

from veneer import AdapterError, LoraConfig, PeftModel, get_peft_model


class Rounded(nn.Linear):
    """What such layers are, without any library: int8 values, a scale for each row, and nobody else may read it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features)
        self.bias.data = layer.bias.data
        self.scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        values = (layer.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(values.flatten().unsqueeze(1), requires_grad=False)  # packed, as others are

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.view(self.out_features, self.in_features) * self.scale
        return nn.functional.linear(x, weight.to(x.dtype), self.bias)


def rounded(model: nn.Sequential) -> nn.Sequential:
    return nn.Sequential(*(Rounded(layer) if isinstance(layer, nn.Linear) else layer for layer in model))


def of_torchao(model: nn.Sequential) -> nn.Sequential:
    quantization = pytest.importorskip("torchao.quantization", exc_type=ImportError)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def of_bitsandbytes(name: str, **settings: object) -> object:
    def quantised(model: nn.Sequential) -> nn.Sequential:
        bitsandbytes = pytest.importorskip("bitsandbytes", exc_type=ImportError)
        made = []
        for layer in model:
            if isinstance(layer, nn.Linear):
                own = getattr(bitsandbytes.nn, name)(layer.in_features, layer.out_features, **settings)
                own.load_state_dict(layer.state_dict())
                layer = own.to("cpu")
            made.append(layer)
        return nn.Sequential(*made)

    return quantised


LIBRARIES = {
    "own": (rounded, False),
    "torchao": (of_torchao, True),
    "bitsandbytes-8": (of_bitsandbytes("Linear8bitLt", has_fp16_weights=False), False),
    "bitsandbytes-4": (of_bitsandbytes("Linear4bit"), False),
}


@pytest.fixture(params=LIBRARIES.values(), ids=LIBRARIES)
def library(request):
    return request.param


@pytest.fixture
def base(library):
    return library[0](nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32)))


def config(**settings):
    return LoraConfig(**{"r": 2, "target_modules": ["0", "2"], "init_lora_weights": False, **settings})


@pytest.mark.parametrize("settings", [{}, {"peft_type": "LOHA"}, {"peft_type": "LOKR"}, {"peft_type": "VERA"}], ids=str)
def test_the_change_is_added_and_learned(base, tmp_path, settings):
    x = torch.randn(3, 64)
    before, plain = base(x), copy.deepcopy(base)
    model = get_peft_model(base, config(**settings))
    first = model[0].adapters["default"].parts()[""].delta(torch.empty(64, 64)).detach()
    hidden = torch.tanh(plain[0](x) + x @ first.T)
    second = model[2].adapters["default"].parts()[""].delta(torch.empty(32, 64)).detach()
    torch.testing.assert_close(model(x), plain[2](hidden) + hidden @ second.T, rtol=1e-4, atol=1e-4)
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or (parameter.dtype, bool(parameter.grad.abs().sum())) == (
            torch.float32,
            True,
        ), name
    with model.disable_adapter():
        assert torch.equal(model(x), before)
    live = model(x)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)(x), live)
    with pytest.raises(AdapterError, match=r"weights that are quantised .*: '0\.weight', '2\.weight'"):
        model.merge_adapter()
    assert torch.equal(model(x), live)
    assert torch.equal(model.unload()(x), before)
    assert type(base[0]) is type(plain[0])


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_what_wants_the_weight_gets_it_or_is_refused(library, base, settings):
    x = torch.randn(3, 64)
    before = base(x)
    if not library[1]:
        with pytest.raises(AdapterError, match=r"whose weight is quantised .* and cannot be read"):
            get_peft_model(base, config(**settings))
        assert torch.equal(base(x), before)
        return
    model = get_peft_model(base, config(**{"init_lora_weights": True, **settings}))
    torch.testing.assert_close(model(x), before)
    model(x).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_a_quantised_table_is_refused():
    table = nn.Sequential(nn.Embedding(4, 3))
    table[0].weight = nn.Parameter(torch.zeros(4, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(AdapterError, match=r"Embedding whose weight is quantised \(torch.int8\)"):
        get_peft_model(table, config(target_modules=["0"]))


def test_quanto_is_refused():
    quanto = pytest.importorskip("optimum.quanto", exc_type=ImportError)
    base = nn.Sequential(nn.Linear(64, 64))
    quanto.quantize(base, weights=quanto.qint8)
    with pytest.raises(AdapterError, match="QLinear of a class that Python cannot exchange"):
        get_peft_model(base, config(target_modules=["0"]))
    assert not hasattr(base[0], "adapters")
