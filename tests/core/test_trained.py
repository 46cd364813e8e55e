"""What an adapter trains beside its method: whole modules."""

import re

import pytest
import torch
from torch import nn

from veneer import AdapterError, LoraConfig, get_peft_model
from veneer.core.inject import adapted_layers
from veneer.starts.eva import initialize_lora_eva_weights

TOKENS = torch.arange(3, 15).view(3, 4)


def moved(model: nn.Module, std: float = 0.1) -> nn.Module:
    """Trained: no longer what it was."""
    for _, layer in adapted_layers(model):
        for parameter in layer.adapters.parameters():
            parameter.data += std * torch.randn_like(parameter)
    return model


def refused(model: nn.Module, **settings: object) -> str:
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(AdapterError) as caught:
        get_peft_model(model, LoraConfig(**settings))
    assert {name: type(module) for name, module in model.named_modules()} == before
    return str(caught.value)


def test_a_head_is_trained_in_fp32_and_computed_in_the_dtype_of_the_base(tiny):
    base = tiny("roberta").bfloat16()
    before = base(TOKENS).logits
    model = get_peft_model(base, LoraConfig(target_modules=["query"], modules_to_save=["classifier"]))
    assert torch.equal(model(TOKENS).logits, before)
    copies = dict(model.classifier.adapters.named_parameters())
    assert {own.dtype for own in copies.values()} == {torch.float32}
    assert len(copies) == 4
    model(TOKENS).logits.sum().backward()
    assert all(own.grad is not None and own.grad.any() for own in copies.values())
    moved(model)
    live = model(TOKENS).logits
    model.merge_adapter()
    for name, own in copies.items():
        path = name.split(".", 1)[1].removesuffix(".value").replace("/", ".")
        assert torch.equal(model.classifier.get_parameter(path), own.bfloat16())
    assert torch.equal(model(TOKENS).logits, live) or (model(TOKENS).logits - live).abs().max() < 0.05
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(TOKENS).logits, before)


def test_a_merged_copy_is_not_the_adapter_s_own(tiny):
    model = moved(get_peft_model(tiny("roberta"), LoraConfig(target_modules=["query"], modules_to_save=["classifier"])))
    model.merge_adapter()
    merged = model(TOKENS).logits
    for copied in model.classifier.adapters.parameters():
        copied.data.zero_()
    assert torch.equal(model(TOKENS).logits, merged)


def test_a_task_trains_its_head_as_in_peft(tiny):
    model = get_peft_model(tiny("bert"), LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    assert model.peft_config["default"].modules_to_save == ["classifier"]
    assert model.classifier.adapters["default"].parts().keys() == {"weight", "bias"}
    assert not get_peft_model(tiny("bert"), LoraConfig(target_modules=["query"])).peft_config["default"].modules_to_save


def test_layers_in_a_saved_module_are_trained_whole_alone(tiny):
    model = get_peft_model(tiny("roberta"), LoraConfig(target_modules=["dense"], modules_to_save=["classifier"]))
    paths = [path for path, _ in adapted_layers(model) if path.startswith("classifier")]
    assert paths == ["classifier"]


class Reading(nn.Module):
    """A module with a count of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def _holding(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), layer)


@pytest.mark.parametrize(
    ("model", "settings", "said"),
    [
        (lambda: _holding(nn.Linear(3, 3)), {"modules_to_save": ["2"]}, "modules_to_save: '2' matches no module"),
        (lambda: _holding(nn.BatchNorm1d(3)), {"modules_to_save": ["1"]}, "BatchNorm1d with buffers.*'running_mean'"),
        (lambda: _holding(Reading()), {"modules_to_save": ["1"]}, "Reading with buffers, .*: 'seen'"),
        (lambda: _holding(nn.ReLU()), {"modules_to_save": ["1"]}, "1 is a ReLU without parameters"),
        (
            lambda: _holding(nn.ModuleList([nn.Linear(3, 3)])),
            {"modules_to_save": ["1"]},
            "ModuleList that is never called",
        ),
        (
            lambda: _holding(nn.Sequential(nn.Linear(3, 3))),
            {"modules_to_save": ["1"], "target_modules": None, "target_parameters": ["1.0.weight"]},
            "1.0 is a Linear that is adapted otherwise, or stands in a module that is",
        ),
    ],
)
def test_what_cannot_be_trained_whole_is_refused_by_name(model, settings, said):
    assert re.search(said, refused(model(), **{"target_modules": ["0"], **settings}))


def test_adapters_that_would_change_a_layer_in_two_ways_are_refused():
    model = nn.ModuleDict({"first": nn.Linear(3, 3), "head": nn.Sequential(nn.Linear(3, 3))})
    get_peft_model(model, LoraConfig(target_modules=["first"]), "a")
    model.add_adapter("b", LoraConfig(target_modules=[], modules_to_save=["head"]))
    for settings in ({"target_modules": ["head.0"]}, {"target_modules": [], "modules_to_save": ["head.0"]}):
        with pytest.raises(AdapterError, match=r"head\.0 is a Linear that is adapted otherwise"):
            model.add_adapter("c", LoraConfig(**settings))
    assert list(model.peft_config) == ["a", "b"]


@pytest.mark.parametrize("beams", [1, 3])
def test_mixed_rows_have_their_own_tables_and_heads(tiny, beams, expect_rows_as_alone):
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, modules_to_save=["lm_head", "embed_tokens"])
    model = get_peft_model(tiny("llama"), config, "a")
    model.add_adapter("b", config)
    moved(model)
    with model.disable_adapter():
        base = model(TOKENS).logits
    together = expect_rows_as_alone(model, TOKENS, ["b", "__base__", {"a": 2.0, "b": 0.5}], beams, new=6)
    assert torch.equal(together[1], base[1])


def test_rows_of_what_is_no_tensor_are_refused():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: list[torch.Tensor]) -> torch.Tensor:
            return x[0] * self.weight

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = Pair()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.pair([x])

    model = get_peft_model(Model(), LoraConfig(target_modules=[], modules_to_save=["pair"]), "a")
    with pytest.raises(AdapterError, match="a Pair called with list cannot be mixed by rows"):
        model(torch.ones(2, 3), adapter_names=["a", "a"])


def test_a_start_from_data_is_for_the_method_s_layers(tiny):
    config = {"target_modules": ["query"], "modules_to_save": ["classifier"], "init_lora_weights": "eva", "r": 2}
    model = get_peft_model(tiny("roberta"), LoraConfig(bias="all", **config))
    before = model(TOKENS).logits
    initialize_lora_eva_weights(model, [{"input_ids": TOKENS}])
    assert torch.equal(model(TOKENS).logits, before)
