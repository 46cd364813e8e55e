"""Hot swap: the outputs of the other adapter, from the same tensors and the same compiled code; or nothing at all."""

import json
from copy import deepcopy

import pytest
import torch
from torch import nn

from veneer import AdapterError, LoraConfig, PeftModel, get_peft_model

TARGETS = ["table", "conv", "1d", "norm", "head"]


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, 6, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("eoi,...i->...o", self.stack, x)


class Model(nn.Module):
    """One layer of each kind, and a stack of matrices."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.table, self.conv = nn.Embedding(9, 6), nn.Conv1d(6, 6, 3, padding=1)
        self.layers = nn.ModuleDict({"1d": Conv1D(6, 6), "norm": nn.LayerNorm(6), "head": nn.Linear(6, 4)})
        self.experts = Experts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(self.table(x).transpose(-1, -2)).transpose(-1, -2)
        y = self.experts(self.layers["1d"](y))
        return self.layers["head"](self.layers["norm"](y))


def _config(r: int, **settings: object) -> LoraConfig:
    settings = {"target_modules": TARGETS, "init_lora_weights": False, **settings}
    return LoraConfig(r=r, **settings)


OTHERS = {
    "the same": {"r": 2, "lora_alpha": 8},
    "another scale": {"r": 2, "lora_alpha": 3},
    "a smaller rank": {"r": 1, "use_rslora": True},
    "of each layer": {
        "r": 2,
        "rank_pattern": {"head": 1},
        "alpha_pattern": {"conv": 5},
        "target_modules": r".*(le|v|d|m)",
    },
}


@pytest.mark.parametrize("stack", [False, True])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("other", OTHERS)
def test_it_gives_the_outputs_of_the_other_one_and_moves_no_tensor(tmp_path, other, dora, stack):
    if dora and stack:
        pytest.skip("a stack has no DoRA")
    more = {"use_dora": dora, "target_parameters": ["experts.stack"] if stack else None}
    base, x = Model().double(), torch.randint(0, 9, (2, 5))
    fresh = get_peft_model(deepcopy(base), _config(**OTHERS[other], **more))
    fresh.save_pretrained(tmp_path / "other")
    model = get_peft_model(base, _config(2, lora_alpha=8, **more))
    model.add_adapter("b", _config(2, target_modules=["head"]))
    config, before = (
        deepcopy(model.peft_config["default"]),
        {name: (p, p.data_ptr()) for name, p in model.named_parameters()},
    )
    model.hotswap_adapter(tmp_path / "other")
    torch.testing.assert_close(model(x), fresh(x), rtol=1e-10, atol=1e-10)
    after = dict(model.named_parameters())
    assert all(after[name] is p and p.data_ptr() == place for name, (p, place) in before.items())
    assert all(p.requires_grad == ("adapters" in name) for name, p in after.items())
    assert model.peft_config["default"] == config
    model.save_pretrained(tmp_path / "again", "default")
    y = model(x)
    again = PeftModel.from_pretrained(model.unload(), tmp_path / "again")
    torch.testing.assert_close(again(x), y, rtol=0, atol=1e-10)


@pytest.mark.filterwarnings("ignore:.*Function.*should not be instantiated:DeprecationWarning")
def test_compiled_code_goes_on_without_a_recompilation(tmp_path):
    from torch._dynamo.testing import CompileCounter

    torch.compiler.reset()
    other = get_peft_model(nn.Sequential(nn.Linear(6, 6)), _config(1, lora_alpha=5, target_modules=["0"]))
    other.save_pretrained(tmp_path)
    model = get_peft_model(nn.Sequential(nn.Linear(6, 6)), _config(3, target_modules=["0"]))
    x, counter = torch.randn(2, 6), CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    first = compiled(x).detach()
    compiled.hotswap_adapter(tmp_path)
    with torch.compiler.set_stance("fail_on_recompile"):
        second = compiled(x)
    assert counter.frame_count == 1
    assert not torch.allclose(first, second)
    torch.testing.assert_close(second, PeftModel.from_pretrained(model.unload(), tmp_path)(x))


def test_an_optimizer_goes_on_with_the_tensors(tmp_path):
    model = get_peft_model(nn.Sequential(nn.Linear(6, 6)), _config(2, target_modules=["0"]))
    model.save_pretrained(tmp_path)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    model.hotswap_adapter(tmp_path)
    x = torch.randn(2, 6)
    before = model(x).square().sum()
    before.backward()
    optimizer.step()
    assert model(x).square().sum() < before


FAULTS = [
    ({"r": 2, "method_pattern": {"head": {"peft_type": "LOHA"}}}, r"one LORA is hot-swapped with another"),
    ({"r": 3}, r"cannot be hot-swapped: of another form or a larger rank than the live one: table.A, table.B, conv.A"),
    (
        {"target_modules": TARGETS[:3]},
        "only in one of the two: layers.norm.A, layers.norm.B, layers.head.A",
    ),
    ({"use_dora": True}, "'default' is LORA and the other is LORA with use_dora: one LORA is hot-swapped with another"),
    ({"peft_type": "LOHA"}, "'default' is LORA and the other is LOHA: one LORA"),
]


@pytest.mark.parametrize(("settings", "said"), FAULTS, ids=str)
def test_what_does_not_fit_is_said_and_nothing_is_copied(tmp_path, bits, settings, said):
    base = Model()
    get_peft_model(deepcopy(base), _config(**{"r": 2, **settings})).save_pretrained(tmp_path)
    model = get_peft_model(base, _config(2))
    before = bits(model)
    with pytest.raises(AdapterError, match=said):
        model.hotswap_adapter(tmp_path)
    assert bits(model) == before


def test_what_is_live_must_be_fit_for_it(tmp_path, bits):
    def make(**settings: object) -> PeftModel:
        return get_peft_model(nn.Sequential(nn.Linear(6, 6)), _config(2, target_modules=["0"], **settings))

    make().save_pretrained(tmp_path)
    pissa, still, merged = make(init_lora_weights="pissa"), make(lora_alpha=0), make()
    with pytest.raises(AdapterError, match="did not start as the LoRA that its file holds"):
        pissa.hotswap_adapter(tmp_path)
    with pytest.raises(AdapterError, match=r"cannot be told at the live scale: 0\.B"):
        still.hotswap_adapter(tmp_path)
    merged.merge_adapter()
    with pytest.raises(AdapterError, match="a hot swap while 'default' is merged would be wrong"):
        merged.hotswap_adapter(tmp_path)
    with pytest.raises(AdapterError, match=r"no adapter named 'defualt'.*did you mean 'default'"):
        merged.hotswap_adapter(tmp_path, "defualt")


def test_a_spoilt_folder_is_refused_as_it_is_when_loading(tmp_path, bits):
    model = get_peft_model(nn.Sequential(nn.Linear(6, 6)), _config(2, target_modules=["0"]))
    model.save_pretrained(tmp_path)
    config, before = tmp_path / "adapter_config.json", bits(model)
    config.write_text(json.dumps({**json.loads(config.read_text()), "r": 1, "rank_dropout": 0.5}))
    with pytest.raises(
        AdapterError, match=r"rank_dropout=0.5(.|\n)*of another shape: 0.A expected \(1, 6\) found \(2, 6\)"
    ):
        model.hotswap_adapter(tmp_path)
    assert bits(model) == before


def test_mixed_rows_see_the_new_values(tmp_path):
    base = nn.Sequential(nn.Linear(6, 6))
    other = get_peft_model(deepcopy(base), _config(1, lora_alpha=5, target_modules=["0"]))
    other.save_pretrained(tmp_path)
    model = get_peft_model(base, _config(3, target_modules=["0"]))
    model.add_adapter("b", _config(2, target_modules=["0"]))
    x, rows = torch.randn(3, 6), ["default", "b", "default"]
    with torch.no_grad():
        before = model(x, adapter_names=rows)
        model.hotswap_adapter(tmp_path)
        after = model(x, adapter_names=rows)
    torch.testing.assert_close(after[[0, 2]], other(x)[[0, 2]].detach())
    assert torch.equal(after[1], before[1])


def test_a_bias_of_b_takes_the_ratio_too(tmp_path):
    base, more = nn.Sequential(nn.Linear(6, 6)), {"target_modules": ["0"], "options": {"lora_bias": True}}
    other = get_peft_model(deepcopy(base), _config(1, lora_alpha=5, **more))
    nn.init.normal_(other[0].adapters["default"].b)
    other.save_pretrained(tmp_path)
    model, x = get_peft_model(base, _config(3, **more)), torch.randn(3, 6)
    model.hotswap_adapter(tmp_path)
    torch.testing.assert_close(model(x), other(x))
