"""Methods whose tensors may have several forms: a file says which, and the outputs are those of the formula."""

import pytest
import torch
from torch import Tensor, nn

from veneer import Adapter, AdapterError, LoraConfig, PeftModel
from veneer.apart.changes import Change, adapter_of, changes
from veneer.core.model import _first_adapter

KINDS = {
    "linear": lambda: nn.Linear(6, 4),
    "linear-of-two": lambda: nn.Linear(2, 4),
    "linear-without-bias": lambda: nn.Linear(6, 4, bias=False),
    "conv": lambda: nn.Conv2d(6, 4, 3),
    "point": lambda: nn.Conv2d(6, 4, 1),
    "conv-of-its-own": lambda: Doubled(6, 4, 3),
    "norm": lambda: nn.LayerNorm(4),
    "norm-without-bias": lambda: nn.RMSNorm(4),
    "table": lambda: nn.Embedding(5, 4),
}


class Doubled(nn.Conv2d):
    """A convolution with a forward of its own: y = 2 W ∗ x + b."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, 2 * self.weight, self.bias)


def _base(kind: str) -> nn.Sequential:
    torch.manual_seed(3)
    model = nn.Sequential()
    model.add_module("layer", KINDS[kind]())
    return model.double()


def _put(kind: str, config: LoraConfig, tensors: dict[str, Tensor]) -> PeftModel:
    adapter = adapter_of({"layer": Change(config, tensors)}, embeddings={"layer"} if kind == "table" else ())
    return _first_adapter(_base(kind), "default", adapter, False)


def _check(model: PeftModel, kind: str, delta: Tensor, shift: Tensor | None, tmp_path) -> None:
    """That the layer is the base's with W + ΔW and b + Δb, live, merged and read from a file."""
    formula = _base(kind)
    layer = formula.layer
    layer.weight.data += delta.view_as(layer.weight)
    if shift is not None:
        layer.bias = nn.Parameter(shift if layer.bias is None else layer.bias + shift)
    first = {"linear": 6, "linear-without-bias": 6, "linear-of-two": 2}.get(kind, 4)
    x = torch.randint(5, (3,)) if kind == "table" else torch.randn(3, first).double()
    if isinstance(layer, nn.Conv2d):
        x = torch.randn(2, 6, 4, 4).double()
    torch.testing.assert_close(model(x), formula(x), rtol=1e-10, atol=1e-10)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(_base(kind), tmp_path)
    torch.testing.assert_close(again(x), formula(x), rtol=1e-10, atol=1e-10)
    (change,) = changes(Adapter.load(tmp_path)).values()
    if (
        kind != "table"
        and not change.reads_weight
        and change.shape
        and change.shape[0] * change.shape[1] == delta.numel()
    ):
        torch.testing.assert_close(change.update().delta(delta.to("meta")), delta.view(change.shape))
    if getattr(_base(kind).layer, "bias", None) is not None or shift is None:
        torch.testing.assert_close(again.merge_and_unload()(x), formula(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("named", [("D",), ("D", "b"), ("b",)], ids="-".join)
def test_full_is_the_difference_of_weight_and_bias(kind, named, tmp_path):
    layer = _base(kind).layer
    if "b" in named and kind in ("table", "norm-without-bias"):
        tensors = {name: torch.ones(1) if name == "b" else torch.zeros_like(layer.weight) for name in named}
        said = r"layer\.b" if len(named) == 2 else r"missing: layer\.D"
        with pytest.raises(AdapterError, match=said):
            _put(kind, LoraConfig(peft_type="FULL"), tensors)
        return
    D, b = torch.randn_like(layer.weight), torch.randn(len(layer.weight)).double()
    filed = {"D": D.T.contiguous() if kind == "table" else D, "b": b}
    model = _put(kind, LoraConfig(peft_type="FULL"), {name: filed[name] for name in named})
    _check(model, kind, D if "D" in named else torch.zeros_like(D), b if "b" in named else None, tmp_path)


FACTORS = {
    "unlike the option": {"C": (4, 1), "D": (1, -1)},
    "C decomposed, D whole": {"C_B": (2, 1), "C_A": (1, 3), "D": (2, -3)},
    "both decomposed": {"C_B": (2, 1), "C_A": (1, 2), "D_B": (2, 3), "D_A": (3, -2)},
    "the larger first": {"C": (4, 6), "D": (1, -6)},
}


@pytest.mark.parametrize("kind", ["linear", "conv", "point"])
@pytest.mark.parametrize("factors", FACTORS.values(), ids=FACTORS)
@pytest.mark.parametrize("dora", [False, True])
def test_lokr_of_any_factorisation(kind, factors, dora, tmp_path):
    weight = _base(kind).layer.weight.flatten(1)
    tensors = {}
    for name, (rows, columns) in factors.items():
        tensors[name] = torch.randn(rows, columns if columns > 0 else weight.shape[1] // -_columns(factors)).double()
    if dora:
        tensors["magnitude"] = torch.rand(4).double()
    if kind == "conv" and "D" in tensors:  # as LyCORIS has it
        tensors["D"] = tensors["D"].view(len(tensors["D"]), -1, 3, 3)
    C, D = (
        tensors[name].flatten(1) if name in tensors else tensors[f"{name}_B"] @ tensors[f"{name}_A"] for name in "CD"
    )
    config = LoraConfig(peft_type="LOKR", r=3, lora_alpha=2, use_dora=dora, options={"decompose_factor": 3})
    delta = torch.kron(C, D) * 2 / 3
    if dora:
        changed = weight + delta
        delta = tensors["magnitude"][:, None] * changed / changed.norm(dim=1, keepdim=True) - weight
        shape = (1, 4, 1, 1) if kind != "linear" else (4,)
        tensors["magnitude"] = tensors["magnitude"].view(shape)
    _check(_put(kind, config, tensors), kind, delta, None, tmp_path)


def _columns(factors: dict[str, tuple[int, int]]) -> int:
    """-m, where D's columns are those of W divided by m."""
    return -(factors["C"] if "C" in factors else factors["C_A"])[1]


def test_lokr_of_another_size_is_refused():
    with pytest.raises(AdapterError, match=r"layer\.D expected"):
        _put("linear", LoraConfig(peft_type="LOKR"), {"C": torch.zeros(2, 2), "D": torch.zeros(2, 4)})


@pytest.mark.parametrize("kind", ["linear", "conv", "point"])
@pytest.mark.parametrize("method", ["LORA", "LOHA"])
@pytest.mark.parametrize("columns", [False, True])
def test_dora_along_either_axis(kind, method, columns, tmp_path):
    """As LyCORIS has it: ‖W + ΔV‖ over all dimensions but the one that is scaled."""
    weight = _base(kind).layer.weight.detach()
    if kind == "linear":
        weight = weight[..., None, None]
    out, into, *kernel = weight.shape
    A, A2 = (torch.randn(2, into, *kernel).double() for _ in "12")
    B, B2 = (torch.randn(out, 2).double() for _ in "12")
    V = torch.einsum("or,rikl->oikl", B, A)
    tensors = {"A": A, "B": B}
    if method == "LOHA":
        V = V * torch.einsum("or,rikl->oikl", B2, A2)
        tensors = {"A1": A.flatten(1), "B1": B, "A2": A2.flatten(1), "B2": B2}
    magnitude = torch.rand(into if columns else out).double()
    changed = weight + 2.5 * V
    if columns:
        norm = changed.transpose(0, 1).flatten(1).norm(dim=1).view(1, -1, 1, 1)
        tensors["magnitude"] = magnitude.view(1, -1)
    else:
        norm = changed.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        tensors["magnitude"] = magnitude if kind == "linear" else magnitude.view(1, -1, 1, 1)
    merged = changed * magnitude.view(norm.shape) / norm
    config = LoraConfig(peft_type=method, r=2, lora_alpha=5, use_dora=True)
    _check(_put(kind, config, tensors), kind, merged - weight, None, tmp_path)


def test_the_gradient_of_dora_on_columns_is_right():
    torch.manual_seed(0)
    tensors = {"A": torch.randn(2, 6), "B": torch.randn(4, 2), "magnitude": torch.rand(1, 6)}
    model = _put("linear", LoraConfig(r=2, use_dora=True), {name: own.double() for name, own in tensors.items()})
    update, x = model.layer.adapters["default"], torch.randn(5, 6).double()
    norm = (model.layer.weight + update.inner.delta(model.layer.weight)).norm(dim=0).detach()

    def formula(A: Tensor, B: Tensor, m: Tensor) -> Tensor:  # the norm is a constant (arXiv:2402.09353, §4.3)
        return x @ ((model.layer.weight + 4 * B @ A) * m / norm).T + model.layer.bias

    own = [update.inner.A, update.inner.B, update.magnitude]
    for parameter in own:
        parameter.requires_grad_(True)
    found = torch.autograd.grad(model(x).square().sum(), own)
    wanted = torch.autograd.grad(formula(*own).square().sum(), own)
    torch.testing.assert_close(found, wanted)


STRANGE = {
    "factors of two ranks": ("LOKR", {"C": (2, 2), "D_B": (2, 3), "D_A": (2, 3)}),
    "twice": ("LOKR", {"C": (2, 2), "C_B": (2, 1), "C_A": (1, 2), "D": (2, 3)}),
    "half": ("LOKR", {"C": (2, 2), "D_B": (2, 3)}),
    "empty": ("LOKR", {"C": (0, 2), "D": (2, 3)}),
    "no matrix": ("LOKR", {"C": (2,), "D": (2, 3)}),
    "none of LoHa": ("LOHA", {"A1": (8, 6)}),
    "none of LoRA": ("LORA", {"A": ()}),
    "a magnitude of a part": ("LORA", {"A": (8, 6), "B": (4, 8), "magnitude": (1, 5)}),
    "a magnitude of nothing": ("LORA", {"A": (8, 6), "B": (4, 8), "magnitude": (1, 0)}),
    "a change turned": ("FULL", {"D": (6, 4)}),
    "a change of nothing": ("FULL", {"D": ()}),
    "a bias of another size": ("FULL", {"D": (4, 6), "b": (3,)}),
}


@pytest.mark.parametrize(("method", "shapes"), STRANGE.values(), ids=STRANGE)
def test_strange_shapes_are_refused(method, shapes):
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    config = LoraConfig(peft_type=method, use_dora="magnitude" in shapes)
    with pytest.raises(AdapterError):
        _put("linear", config, tensors)
    change = Change(config, tensors)
    assert change.shape is None or len(change.shape) == 2
    with pytest.raises(AdapterError):
        change.update(torch.zeros(4, 6))
