"""What kohya's and LyCORIS's files hold of one layer ⇄ a `Change`. The names after the layer's own say the method.

lora_down, lora_up                 ΔW = α / r · up · down
… and lora_mid `(r, r, *kernel)`   ΔW = α / r · Σᵢⱼ up[·, i] mid[i, j] down[j, ·]  (Tucker; also called CP)
hada_w1_a, _b, hada_w2_a, _b       ΔW = α / r · (w1_a · w1_b) ⊙ (w2_a · w2_b)
… and hada_t1, hada_t2             each product is Σᵢⱼ a[i, ·] t[i, j] b[j, ·]
lokr_w1 or w1_a, w1_b; lokr_w2 …   ΔW = α / r · w1 ⊗ w2; the scale is 1 where neither is a product
… and lokr_t2                      w2 = Σᵢⱼ w2_a[i, ·] t2[i, j] w2_b[j, ·]
diff, diff_b; w_norm, b_norm       ΔW, Δb themselves
weight, on_input                   ΔW = weight ⊙ W by rows, or by columns
dora_scale                         m, along the outputs `(out, 1, …)` or the inputs `(1, in, …)`
"""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from veneer.apart.changes import Change
from veneer.core.config import LoraConfig, scaling
from veneer.core.errors import AdapterError, listed, named
from veneer.files.factors import scaled

Own = Mapping[str, Tensor]
_Read = tuple[dict[str, Tensor], int | None, dict[str, Any]]  # the method's tensors, the rank, options

_ALIASES = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
_UNKNOWN = {  # endings of methods that are LyCORIS's and not veneer's
    "oft_blocks": "OFT or BOFT", "oft_diag": "OFT", "rescale": "OFT or BOFT", "a1.weight": "GLoRA",
    "a2.weight": "GLoRA", "b1.weight": "GLoRA", "b2.weight": "GLoRA", "bm.weight": "GLoRA", "bias_indices":
    "a sparse rest", "bias_values": "a sparse rest", "bias_size": "a sparse rest", "lokr_t1": "LoKr with a core in w1",
}  # fmt: skip


def change_of(own: Own) -> Change:
    """What the tensors of one layer do, by their names after the layer's. Raises `AdapterError` with what is wrong."""
    if twice := [name for name, other in _ALIASES.items() if {name, other} <= own.keys()]:
        raise AdapterError(f"{_said(twice)} there under another name too")
    own = {_ALIASES.get(name, name): tensor for name, tensor in own.items()}
    if strange := {_UNKNOWN[name] for name in own if name in _UNKNOWN}:
        raise AdapterError(f"{_said(strange)} is no method of veneer")
    forms = [form for form in _FORMS if not own.keys().isdisjoint(form.names)]
    if len(forms) != 1:
        methods = listed((form.method for form in forms), say=str, between=" and ")
        raise AdapterError(f"tensors of {methods} at one layer" if forms else f"only {_said(own)}")
    (form,) = forms
    if unknown := own.keys() - {*form.names, *form.beside}:
        raise AdapterError(f"{_said(unknown)} beside {form.method}")
    if missing := [name for name in form.needs if name not in own]:
        raise AdapterError(f"{_said(own.keys() - {*form.beside})} without {_said(missing)}")
    if bare := [name for name in form.names if name in own and (own[name].ndim < form.least or not own[name].numel())]:
        raise AdapterError(f"{_said(bare)} should have at least {form.least} dimensions, none of them 0")
    tensors, rank, options = form.read(own)
    r, alpha = _numbers(own, rank, tensors)
    change = Change(_config(form.method, r, alpha, "dora_scale" in own, **options), tensors)
    return _decomposed(change, own["dora_scale"]) if "dora_scale" in own else change


def _said(names: Iterable[str]) -> str:
    return listed(sorted(names), say=named)


def _numbers(own: Own, rank: int | None, tensors: Own) -> tuple[int, float]:
    """r and α. Where there is no product there is no rank, and α says nothing: r is one at which LoKr makes none."""
    numbers = {}
    for name in ("alpha", "scalar"):
        if (tensor := own.get(name)) is not None:
            if tensor.numel() != 1 or not math.isfinite(tensor.item()):
                found = tensor.item() if tensor.numel() == 1 else f"shape {tuple(tensor.shape)}"
                raise AdapterError(f"{name} should be one finite number, found {found}")
            numbers[name] = float(tensor.item())
    if rank is None:
        whole = [tensors[name].flatten(1).shape for name in "CD" if "C" in tensors]
        r = max([1, *(math.ceil(max(shape) / 2) for shape in whole)])
        return r, r * numbers.get("scalar", 1.0)
    if numbers.get("alpha") == 0:
        raise AdapterError("alpha 0, which kohya's programs take for the rank and others for no change at all")
    return rank, numbers.get("alpha", rank) * numbers.get("scalar", 1.0)


@lru_cache(1024)
def _config(method: str, r: int, lora_alpha: float, use_dora: bool, **options: Any) -> LoraConfig:
    config = LoraConfig(r, lora_alpha, peft_type=method, use_dora=use_dora)
    config.options |= options  # in one layer's config, what names layers is whether it is one of them
    return config


def _matching(told: str, **sizes: int) -> None:
    """Raises `AdapterError` where sizes that should be the same are not."""
    if len(set(sizes.values())) > 1:
        raise AdapterError(f"{told} should have one rank, found {', '.join(f'{n} {s}' for n, s in sizes.items())}")


def _core(t: Tensor, a: Tensor, b: Tensor, told: str) -> Tensor:
    """Σⱼ t[·, j] b[j, ·] as a matrix `(i, in · kernel)`, in fp32 at least: what is left is a product with aᵀ."""
    if t.shape[:2] != (len(a), len(b)):
        raise AdapterError(f"{told} of {tuple(t.shape)} does not stand between ranks {len(a)} and {len(b)}")
    return torch.einsum("ij...,jn->in...", _wide(t), _wide(b.flatten(1)))


def _lora(own: Own) -> _Read:
    A, B, mid = own["lora_down.weight"], own["lora_up.weight"], own.get("lora_mid.weight")
    if B.shape[2:].numel() != 1:
        raise AdapterError(f"lora_up of {tuple(B.shape)} is a kernel of more than one point")
    if mid is None:
        _matching("lora_down and lora_up", lora_down=len(A), lora_up=B.shape[1])
        return {"A": A, "B": B}, len(A), {}
    if A.shape[2:].numel() != 1:
        raise AdapterError(f"lora_down of {tuple(A.shape)} beside lora_mid is a kernel of more than one point")
    _matching("lora_down, lora_mid and lora_up", lora_down=len(A), lora_up=B.shape[1], lora_mid=len(mid))
    return {"A": _core(mid, B.flatten(1).t(), A, "lora_mid"), "B": B}, len(A), {}


def _loha(own: Own) -> _Read:
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    if len({"hada_t1", "hada_t2"} & own.keys()) == 1:
        raise AdapterError("one of hada_t1 and hada_t2 without the other")
    for which in "12":
        a, b, t = own[f"hada_w{which}_a"], own[f"hada_w{which}_b"], own.get(f"hada_t{which}")
        if t is not None:
            a, b = a.flatten(1).t(), _core(t, a, b, f"hada_t{which}").flatten(1)
        tensors |= {f"A{which}": b, f"B{which}": a}
        ranks |= {f"hada_w{which}_a": a.shape[1], f"hada_w{which}_b": len(b)}
    _matching("LoHa's factors", **ranks)
    sides = {(len(tensors[f"B{which}"]), tensors[f"A{which}"].shape[1:].numel()) for which in "12"}
    if len(sides) > 1:
        raise AdapterError(f"LoHa's two products have different sizes, {listed(sorted(sides), say=str)}")
    return tensors, len(tensors["A1"]), {}


def _lokr(own: Own) -> _Read:
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for which, name in (("1", "C"), ("2", "D")):
        whole, a, b, t = (own.get(f"lokr_{key}") for key in (f"w{which}", f"w{which}_a", f"w{which}_b", f"t{which}"))
        if (whole is None) != (a is not None and b is not None) or (a is None) != (b is None):
            raise AdapterError(f"expected lokr_w{which}, or lokr_w{which}_a with lokr_w{which}_b")
        if whole is not None:
            tensors[name] = whole
        elif a is not None and b is not None:
            if t is not None:
                a, b = a.flatten(1).t(), _core(t, a, b, f"lokr_t{which}").flatten(1)
            tensors |= {f"{name}_B": a, f"{name}_A": b}
            ranks |= {f"lokr_w{which}_a": a.shape[1], f"lokr_w{which}_b": len(b)}
    if "lokr_t2" in own and "lokr_w2" in own:
        raise AdapterError("lokr_t2 beside lokr_w2, which is no product")
    _matching("LoKr's products", **ranks)
    return tensors, next(iter(ranks.values()), None), {"decompose_both": "C_A" in tensors}


def _full(own: Own) -> _Read:
    found = {name: own[key] for name, keys in _FULL.items() for key in keys if key in own}
    if len(found) == 2 and found["b"].numel() != len(found["D"]):
        raise AdapterError(f"changes of {len(found['D'])} outputs and of {found['b'].numel()} biases")
    return found, None, {}


def _ia3(own: Own) -> _Read:
    w, on_input = own["weight"], own["on_input"]
    if on_input.numel() != 1 or on_input.item() not in (0, 1):
        raise AdapterError("on_input should be 0 or 1")
    if w.numel() not in w.shape:
        raise AdapterError(f"(IA)³'s weight of {tuple(w.shape)} is no vector")
    inner = bool(on_input.item())
    kernel = w.ndim > 2  # a convolution's, which PEFT's files hold as `(1, out, 1, 1)` too
    shape = (1, -1, *w.shape[2:]) if inner or kernel else (-1, 1)
    return {"l": (_wide(w) + 1).reshape(shape)}, None, {"feedforward_modules": inner, "scales_bias": False}


def _decomposed(change: Change, m: Tensor) -> Change:
    """With DoRA's magnitudes, in the shapes of PEFT's files."""
    shape = change.shape
    if shape is None:
        raise AdapterError(f"dora_scale beside {change.config.peft_type}")
    rows, columns = shape
    if m.numel() == rows and (m.ndim < 2 or len(m) == rows):
        m = m.reshape(-1) if m.ndim < 3 else m.reshape(1, -1, *m.shape[2:])
    elif m.ndim > 1 and len(m) == 1 and m.numel() == m.shape[1] and columns % m.numel() == 0:
        m = m.reshape(1, -1)
    else:
        raise AdapterError(f"dora_scale of {tuple(m.shape)} for {rows} outputs and {columns} inputs (times the kernel)")
    return Change(change.config, {**change.tensors, "magnitude": m})


class _Form(NamedTuple):
    method: str
    names: tuple[str, ...]
    needs: tuple[str, ...]
    read: Callable[[Own], _Read]
    beside: tuple[str, ...] = ("alpha", "dora_scale", "scalar")
    least: int = 2  # dimensions of its tensors


_FULL = {"D": ("diff", "w_norm"), "b": ("diff_b", "b_norm")}
_LORA = ("lora_down.weight", "lora_up.weight")
_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
_FORMS = (
    _Form("LORA", (*_LORA, "lora_mid.weight"), _LORA, _lora),
    _Form("LOHA", (*_LOHA, "hada_t1", "hada_t2"), _LOHA, _loha),
    _Form("LOKR", _LOKR, (), _lokr),
    _Form("FULL", ("diff", "diff_b"), (), _full, ("alpha",), 1),
    _Form("FULL", ("w_norm", "b_norm"), (), _full, ("alpha",), 1),
    _Form("IA3", ("weight", "on_input"), ("weight", "on_input"), _ia3, ("alpha",), 0),
)
LYCORIS_ONLY = frozenset(name for form in _FORMS if form.method != "LORA" for name in form.names) | _UNKNOWN.keys()
_THEIRS = {
    "LORA": {"A": "lora_down.weight", "B": "lora_up.weight"},
    "LOHA": {"B1": "hada_w1_a", "A1": "hada_w1_b", "B2": "hada_w2_a", "A2": "hada_w2_b"},
    "LOKR": {"C": "lokr_w1", "C_B": "lokr_w1_a", "C_A": "lokr_w1_b", "D": "lokr_w2", "D_B": "lokr_w2_a",
             "D_A": "lokr_w2_b"},
    "FULL": {"D": "diff", "b": "diff_b"},
}  # fmt: skip


def own_of(change: Change) -> dict[str, Tensor]:
    """The tensors of one layer in a LyCORIS file, by their names after the layer's: a LoRA with an α of its own, others
    with their scale in a factor. What is read back is the same change. Raises `AdapterError` where it has no place.
    """
    config, tensors = change.config, dict(change.tensors)
    magnitude = tensors.pop("magnitude", None)
    if config.peft_type == "IA3":
        weight = _wide(tensors["l"]) - 1
        weight = weight.reshape((1, -1, *weight.shape[2:]) if weight.ndim > 2 else -1)
        return {"weight": weight, "on_input": torch.tensor(float(bool(config.options["feedforward_modules"])))}
    names = _THEIRS.get(config.peft_type)
    if names is None:
        raise AdapterError(f"{config.peft_type}, which has no form there: make it a plain LoRA first")
    if config.peft_type == "FULL" and "D" in tensors and tensors["D"].ndim == 1:
        names = {"D": "w_norm", "b": "b_norm"}
    if strange := [name for name in tensors if name not in names]:
        raise AdapterError(f"{config.peft_type} with {_said(strange)}, which have no place there")
    alpha = alpha_of(config)
    if config.peft_type == "LORA" and alpha == 0:  # which kohya's programs would take for r
        tensors["B"], alpha = torch.zeros_like(tensors["B"]), config.r
    if config.peft_type != "LORA":
        tensors, alpha = _unscaled(config, tensors), config.r
    own = {theirs: tensors[name] for name, theirs in names.items() if name in tensors}
    if config.peft_type != "FULL":
        own["alpha"] = exact(alpha)
    if magnitude is not None:
        own["dora_scale"] = _scale_of(magnitude, change)
    return own


def _unscaled(config: LoraConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same change with a scale of 1, which LyCORIS 4.1 would apply twice where it merges LoHa or LoKr; and with
    LoKr's smaller factor as a whole, as it takes that for another one if it is a product and the larger is none.
    """
    scale = scaling(config.r, config.lora_alpha, config.use_rslora)
    if "B1" in tensors:
        return {**tensors, "B1": scaled(tensors["B1"], scale)}
    if not {"C", "C_A"} & tensors.keys() or ("C" in tensors and scale == 1):
        return tensors
    C = _wide(tensors["C"]) if "C" in tensors else _wide(tensors["C_B"]) @ _wide(tensors["C_A"])
    return {name: own for name, own in tensors.items() if name not in ("C_A", "C_B")} | {"C": scale * C}


def _scale_of(m: Tensor, change: Change) -> Tensor:
    """DoRA's magnitudes as `dora_scale`, with as many dimensions as the layer's weight, where the tensors say it."""
    rows, columns = change.shape or (0, 0)
    sides = max([m.ndim, 2, *(own.ndim for name, own in change.tensors.items() if name in "ABD")])
    if m.numel() == rows and (m.ndim != 2 or rows == 1):
        return m.reshape(-1, *[1] * (sides - 1))
    sides = 4 if sides == 2 and m.numel() < columns else sides
    return m.reshape(1, -1, *[1] * (sides - 2))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def alpha_of(config: LoraConfig) -> float:
    """α with which α / r is the layer's scale."""
    return config.lora_alpha * (math.sqrt(config.r) if config.use_rslora else 1)


def exact(number: float) -> Tensor:
    """A tensor of this one number, in fp32 where that is exact."""
    own = torch.tensor(float(number))
    return own if own.item() == number else torch.tensor(number, dtype=torch.float64)
