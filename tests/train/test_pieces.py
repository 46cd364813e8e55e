"""Pieces of a model in few passes: the model's own outputs and gradients, with fewer bytes kept."""

import copy
import pickle

import pytest
import torch
from torch import nn

from veneer import LoraConfig, get_peft_model
from veneer.train.pieces import quick_pieces

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
FAMILIES = {
    "llama": {"QuickNorm": 5, "GatedSilu": 2},
    "mistral": {"QuickNorm": 5, "GatedSilu": 2},
    "qwen3": {"QuickNorm": 9, "GatedSilu": 2},
    "gemma": {"QuickNormFromOne": 5, "GatedGeluTanh": 2},
    "t5": {"QuickNorm": 12},
    "gpt2": {"QuickGeluTanh": 2},
    "bloom": {},
    "bert": {},
    "gpt_neox": {},
}
IDS = torch.tensor([[5, 9, 3, 60, 33, 7, 21]])


@pytest.fixture
def adapted(tiny):
    """`adapted("llama")`: a tiny model with an adapter that does something, in training."""

    def build(family: str, dtype: torch.dtype = torch.float32, **config: object) -> nn.Module:
        dropout = {"dropout_rate": 0.0} if family == "t5" else {}
        model = tiny(family, **dropout).to(dtype)
        for name, parameter in model.named_parameters():
            if "norm" in name.lower():
                parameter.data.uniform_(0.5, 1.5)
        config = {"target_modules": "all-linear", "init_lora_weights": False, **config}
        return get_peft_model(model, LoraConfig(r=2, lora_alpha=0.2, **config))

    return build


def _outputs(model: nn.Module) -> torch.Tensor:
    inputs = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    return model(input_ids=IDS, **inputs).logits


def _run(model: nn.Module) -> list[torch.Tensor]:
    """The logits, and the gradients of all that trains."""
    model.zero_grad()
    logits = _outputs(model)
    (logits.float() if logits.dtype == torch.bfloat16 else logits).square().sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None)]


def _error(expected: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    """The largest of the tensors' errors, each relative to its size."""
    return max(float((b - a).norm() / (a.norm() + 1e-12)) for a, b in zip(expected, found, strict=True))


def _kept(model: nn.Module) -> int:
    """Bytes kept for the backward, parameters not counted."""
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = _outputs(model)
    del logits
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_replaced(adapted, family):
    with quick_pieces(adapted(family)) as quick:
        names = [piece.__name__ for piece in quick.values()]
    assert {name: names.count(name) for name in names if name != "QuickRotary"} == FAMILIES[family]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_are_the_models_own(adapted, family, dtype):
    model = adapted(family, dtype)
    expected = _run(model)
    with quick_pieces(model):
        found = _run(model)
    assert _error(expected, found) <= TOLERANCE[dtype]
    assert all(torch.equal(a, b) for a, b in zip(expected, _run(model), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_is_as_good_as_the_models_own(adapted, family):
    model = adapted(family, torch.bfloat16)
    exact = _run(copy.deepcopy(model).double())
    plain = _run(model)
    with quick_pieces(model):
        quick = _run(model)
    assert _error(exact, quick) <= 1.25 * _error(exact, plain)


@pytest.mark.parametrize(
    ("family", "dtype", "most"),
    [
        ("llama", torch.float32, 0.98),
        ("llama", torch.bfloat16, 0.85),
        ("gemma", torch.bfloat16, 0.85),
        ("t5", torch.bfloat16, 0.9),
        ("gpt2", torch.float32, 0.7),
    ],
    ids=str,
)
def test_less_is_kept(adapted, family, dtype, most):
    model = adapted(family, dtype)
    plain = _kept(model)
    with quick_pieces(model):
        assert _kept(model) <= most * plain


def test_nothing_is_left_behind(adapted, bits):
    model = adapted("llama")
    before = {path: (type(module), dict(vars(module))) for path, module in model.named_modules()}
    weights = bits(model)

    def fail() -> None:
        with quick_pieces(model) as quick:
            assert quick
            assert bits(model) == weights
            assert all(isinstance(module, before[path][0]) for path, module in model.named_modules())
            raise KeyError("in the middle")

    with pytest.raises(KeyError, match="in the middle"):
        fail()
    assert {path: (type(module), dict(vars(module))) for path, module in model.named_modules()} == before


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_plain(adapted, copied):
    model = adapted("llama")
    types = [type(module) for module in model.modules()]
    with quick_pieces(model):
        other = copied(model)
    assert [type(module) for module in other.modules()] == types
    assert torch.equal(_outputs(model), _outputs(other))
