"""Pieces of a model in few passes: the model's own outputs and gradients, with fewer bytes kept."""

import copy
import pickle

import pytest
import torch
from torch import nn

from veneer import LoraConfig, get_peft_model
from veneer.core.errors import AdapterError
from veneer.core.reclass import mixin_of
from veneer.train.pieces import quick_pieces

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
FAMILIES = {
    "llama": {"QuickNorm": 5, "GatedSilu": 2, "QuickRotary": 2},
    "mistral": {"QuickNorm": 5, "GatedSilu": 2, "QuickRotary": 2},
    "qwen3": {"QuickNorm": 9, "GatedSilu": 2, "QuickRotary": 2},
    "gemma": {"QuickNormFromOne": 5, "GatedGeluTanh": 2, "QuickRotary": 2},
    "t5": {"QuickNorm": 12},
    "gpt2": {"QuickGeluTanh": 2},
    "bloom": {},
    "bert": {},
    "gpt_neox": {"QuickRotary": 2},
}
imports_inductor = pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")
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


def _kind(piece: nn.Module) -> str:
    return mixin_of(piece).__name__


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
    with quick_pieces(adapted(family)) as pieces:
        names = [_kind(piece) for piece in pieces.replaced.values()]
    assert {name: names.count(name) for name in names} == FAMILIES[family]


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
    assert _error(exact, quick) <= 1.5 * _error(exact, plain)


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
    weights, draws = bits(model), torch.get_rng_state()

    def fail() -> None:
        with quick_pieces(model) as pieces:
            assert pieces.replaced
            assert bits(model) == weights
            assert all(isinstance(module, before[path][0]) for path, module in model.named_modules())
            raise KeyError("in the middle")

    with pytest.raises(KeyError, match="in the middle"):
        fail()
    assert {path: (type(module), dict(vars(module))) for path, module in model.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), draws)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_plain(adapted, copied):
    model = adapted("llama")
    types = [type(module) for module in model.modules()]
    with quick_pieces(model):
        other = copied(model)
    assert [type(module) for module in other.modules()] == types
    assert torch.equal(_outputs(model), _outputs(other))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_under_a_compiler_operations_are_plain(adapted, family):
    model = adapted(family)
    expected = _run(model)
    with quick_pieces(model):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        found = _run(compiled)
    torch._dynamo.reset()
    assert _error(expected, found) <= 1e-5


def test_torch_func_sees_plain_operations(adapted):
    model = adapted("llama")
    own = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, parameters, (IDS,)).logits.square().sum()

    expected = torch.func.grad(loss)(own)
    with quick_pieces(model):
        found = torch.func.grad(loss)(own)
    assert _error(list(expected.values()), list(found.values())) <= 1e-5


def test_gradient_checkpointing_and_autocast(adapted):
    model = adapted("llama")
    expected = _run(model)
    model.activation_checkpointing_enable()
    model.train()
    with quick_pieces(model):
        found = _run(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = _run(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = _run(model)
    assert _error(expected, found) <= 1e-5
    assert _error(expected, half) <= 1.5 * _error(expected, plain)
    assert [tensor.dtype for tensor in half] == [tensor.dtype for tensor in plain]


def test_no_gradients(adapted):
    model = adapted("qwen3")
    with torch.no_grad():
        expected = _outputs(model)
        with quick_pieces(model):
            assert _error([expected], [_outputs(model)]) <= 1e-5


def test_modules_that_somebody_took_over_are_left_alone(adapted):
    model = adapted("llama", target_modules=["q_proj", "norm"])
    layers = model.model.layers
    seen = []
    layers[0].mlp.act_fn.register_forward_hook(lambda *_: seen.append("act_fn"))
    layers[0].input_layernorm.register_forward_hook(lambda *_: seen.append("norm"))
    layers[0].mlp.up_proj.register_forward_hook(lambda *_: seen.append("up_proj"))
    layers[1].mlp.forward = layers[1].mlp.forward
    with quick_pieces(model) as pieces:
        _run(model)
    quick = pieces.replaced
    assert sorted(seen) == ["act_fn", "norm", "up_proj"]
    assert not any("mlp" in path for path in quick)
    assert "model.norm" not in quick
    assert "model.layers.0.input_layernorm" in quick


class ClippedMLP(nn.Module):
    """Looks like a Llama's, and is not."""

    def __init__(self, limit: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(4, 4) for _ in range(3))
        self.act_fn, self.limit, self.dropout = nn.SiLU(), limit, nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = self.act_fn(self.gate_proj(x).clamp(max=self.limit)) * self.up_proj(x)
        return self.down_proj(self.dropout(product))


class CentredRMSNorm(nn.RMSNorm):
    """Says so, and is not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x - x.mean(-1, keepdim=True))


class ShiftedGELU(nn.Module):
    """Nearly a GELU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 0.5 * (1 + torch.tanh(0.8 * (x + 0.045 * x**3)))


def test_a_name_proves_nothing():
    imposters = nn.Sequential(
        ClippedMLP(7.0), ClippedMLP(1e9, dropout=0.1).eval(), CentredRMSNorm(4, 1e-6), ShiftedGELU(), nn.LayerNorm(4)
    )
    with quick_pieces(imposters) as pieces:
        assert pieces.replaced == {}
    assert not imposters[1].dropout.training
    with quick_pieces(nn.Sequential(ClippedMLP(1e9), nn.RMSNorm(4, 1e-6))) as pieces:
        assert [_kind(piece) for piece in pieces.replaced.values()] == ["GatedSilu", "QuickNorm"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@imports_inductor
def test_compiled_pieces(adapted, dtype):
    model = adapted("gemma", dtype)
    exact = _run(copy.deepcopy(model).double())
    plain, kept = _run(model), _kept(model)
    with quick_pieces(model, compile=True) as pieces:
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        quick = _run(model)
        assert _kept(model) <= 0.95 * kept
        said = pieces.payback(20)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
    assert said.startswith("compiled in ")
    assert _error(exact, quick) <= 1.5 * _error(exact, plain)
    assert all(torch.equal(a, b) for a, b in zip(plain, _run(model), strict=True))


@imports_inductor
def test_without_a_compiler_nothing_is_left_behind(adapted):
    from torch._inductor import config

    model = adapted("llama")
    types = [type(module) for module in model.modules()]
    torch._dynamo.reset()
    with (
        config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}),
        pytest.raises(AdapterError, match="cannot be compiled here"),
        quick_pieces(model, compile=True),
    ):
        pass
    torch._dynamo.reset()
    assert [type(module) for module in model.modules()] == types
