"""PEFT: the same folder gives the same logits and the same gradients there and here."""

import copy

import pytest
import torch
from torch import nn

import veneer

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`")

TOKENS = torch.arange(3, 15).view(2, 6)
CHOICES = {
    "names": {},
    "all-linear": {"target_modules": "all-linear", "r": 3, "lora_alpha": 7},
    "rslora": {"target_modules": "all-linear", "use_rslora": True, "lora_alpha": 5},
    "one layer": {"target_modules": ["{last}"], "layers_to_transform": [1]},
    "numbered": {"target_modules": ["{last}"], "layers_to_transform": 0, "layers_pattern": "{block}"},
    "patterns": {"target_modules": "all-linear", "rank_pattern": {"{last}": 2}, "alpha_pattern": {".*{block}.0.*": 3}},
    "exclude": {"target_modules": "all-linear", "exclude_modules": ["{last}"]},
    "expression": {"target_modules": r".*\.{block}\.1\..*{last}"},
}
NOT_IN_PEFT = {  # what only veneer takes, and writes so that PEFT reads it
    "all-linear in one layer": {"target_modules": "all-linear", "layers_to_transform": [1]},
    "an expression in one layer": {"target_modules": r".*{last}", "layers_to_transform": 1},
}
FAMILIES = {"llama": ("layers", "down_proj"), "gpt2": ("h", "c_proj"), "bert": ("layer", "query")}


def _said(value: object, family: str) -> object:
    block, last = FAMILIES[family]
    if isinstance(value, str):
        return value.replace("{block}", block).replace("{last}", last)
    if isinstance(value, list):
        return [_said(each, family) for each in value]
    return {_said(key, family): each for key, each in value.items()} if isinstance(value, dict) else value


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def settings(request, family) -> dict[str, object]:
    return {name: _said(value, family) for name, value in {**CHOICES, **NOT_IN_PEFT}[request.param].items()}


def _run(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The logits, and the gradient of each factor by the name that PEFT's files use."""
    model.zero_grad()
    logits = model(TOKENS).logits
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if isinstance(model, veneer.PeftModel):
        for short, ending in (("A", "lora_A"), ("B", "lora_B")):
            gradients = {
                name.replace(f".adapters.default.{short}", f".{ending}.default.weight"): gradient
                for name, gradient in gradients.items()
            }
    else:
        gradients = {name.removeprefix("base_model.model."): gradient for name, gradient in gradients.items()}
    return logits, gradients


def _agree(ours: nn.Module, theirs: nn.Module) -> None:
    (logits, gradients), (their_logits, their_gradients) = _run(ours), _run(theirs)
    torch.testing.assert_close(logits, their_logits, rtol=1e-5, atol=1e-5)
    assert gradients
    assert gradients.keys() == their_gradients.keys()
    for name, gradient in their_gradients.items():
        assert (gradients[name] - gradient).norm() <= 2e-5 * gradient.norm(), name


@pytest.mark.parametrize("settings", [*CHOICES, *NOT_IN_PEFT], indirect=True)
def test_what_veneer_saves_peft_reads(tiny, family, settings, tmp_path):
    base = tiny(family)
    ours = veneer.get_peft_model(copy.deepcopy(base), veneer.LoraConfig(init_lora_weights=False, **settings))
    ours.save_pretrained(tmp_path)
    _agree(ours, peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True))


@pytest.mark.parametrize("settings", CHOICES, indirect=True)
def test_what_peft_saves_veneer_reads(tiny, family, settings, tmp_path):
    base = tiny(family)
    ours = copy.deepcopy(base)
    theirs = peft.get_peft_model(base, peft.LoraConfig(init_lora_weights=False, **settings))
    theirs.save_pretrained(tmp_path)
    _agree(veneer.PeftModel.from_pretrained(ours, tmp_path, is_trainable=True), theirs)


def test_merging_gives_the_weights_that_peft_gives(tiny, family, tmp_path):
    base = tiny(family)
    ours = veneer.get_peft_model(
        copy.deepcopy(base), veneer.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    )
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).merge_and_unload().state_dict()
    torch.testing.assert_close(dict(ours.merge_and_unload().state_dict()), dict(theirs), rtol=1e-5, atol=1e-6)
