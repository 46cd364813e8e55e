"""loralib (Hu et al. 2021, the LoRA paper's own): `<path>.lora_A` and `<path>.lora_B`, and no word of α.

ΔW = α / r · B A for linear layers and, transposed, for tables. A `MergedLinear` of n parts, e of which are adapted, has
A `(e · r, in)` and B `(e · out / n, r)`, part by part; a `Conv2d` with a kernel of k × k has A `(r · k, in · k)` and B
`(out · k, r · k)`, and its ΔW is the entries of B A in their order, `(out, in, k, k)`: a LoRA of rank r · k². The
shapes alone say neither which parts are adapted, nor whether it is a convolution; so these are asked for.

The files are what `torch.save(lora.lora_state_dict(model))` wrote. Here they are safetensors, with α = r, and say so.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.apart.changes import Change, adapter_of
from veneer.core.adapter import Adapter
from veneer.core.config import LoraConfig
from veneer.core.errors import AdapterError, collapsed, shown, unmatched
from veneer.core.ranges import is_finite
from veneer.files.factors import pairs
from veneer.files.stored import save
from veneer.safe.stored import parsed

NAME = "loralib"
ALPHA, KERNELS = "lora_alpha", "kernels"
_NAME = re.compile(r"(.+)\.lora_([AB])")
Enabled = Sequence[bool] | Mapping[str, Sequence[bool]]


def detects(names: Collection[str], about: Mapping[str, str]) -> bool:
    """Whether some are loralib's, which end where PEFT's go on."""
    return any(map(_NAME.fullmatch, names))


def read(
    tensors: Mapping[str, Tensor],
    about: Mapping[str, str],
    where: str,
    *,
    alpha: float | None = None,
    enable_lora: Enabled | None = None,
    kernels: Mapping[str, int] | None = None,
    model: nn.Module | None = None,
) -> Adapter:
    """The adapter of a state dict whose layers have this `alpha`.

    `enable_lora` is that of its `MergedLinear` layers, of all or by name; `kernels` says the kernel's size of each
    convolution, by name. The base `model`, where it is given, says which layers are convolutions and tables, and what
    parts there are where all of them are adapted. Raises `AdapterError` with all that is missing or does not fit.
    """
    layers, biases, faults = _by_layer(tensors)
    alpha, wrong = _alpha(alpha, about)
    known = dict(model.named_modules()) if model is not None else {}
    sizes = {path: layer.kernel_size[0] for path, layer in known.items() if isinstance(layer, nn.Conv2d)}
    said = parsed(about.get(KERNELS, "{}").encode(), f"{where}: {KERNELS}")
    sizes |= _named(said | dict(kernels or {}), layers, "kernels", faults)
    enabled = _named(enable_lora, layers, "enable_lora", faults) if isinstance(enable_lora, Mapping) else {}
    common = None if isinstance(enable_lora, Mapping) else enable_lora
    every: dict[str, Change] = {}
    for path, own in layers.items():
        try:
            mask = enabled.get(path, common if len(own["A"]) != own["B"].shape[1] else None)
            every[path] = _change(own, alpha, sizes.get(path, 1), mask, known.get(path))
        except AdapterError as error:
            faults.append(f"{path}: {error}")
    if faults or wrong:
        raise AdapterError("\n".join([f"{where}:", *faults, *wrong]))
    tables = [path for path, layer in known.items() if isinstance(layer, nn.Embedding) and path in layers]
    metadata = {key: value for key, value in about.items() if key not in (ALPHA, KERNELS, "format")}
    kind = "lora_only" if {path.removesuffix(".bias") for path in biases} <= layers.keys() else "all"
    beside = {path: {"value": tensor} for path, tensor in biases.items()}
    like = Adapter(LoraConfig(bias=kind if biases else "none"), beside)
    return adapter_of(every, like=like, metadata=metadata, embeddings=tables)


def write(adapter: Adapter, path: Path) -> None:
    """Write it for layers of loralib with `lora_alpha` = r; a layer of several parts is a `Linear` there.

    Raises `AdapterError` with all that the format cannot hold.
    """
    flat: dict[str, Tensor] = {}
    kernels, faults = dict[str, int](), []
    for name, pair in pairs(adapter, NAME).items():
        A, B, size = pair.A, pair.B, pair.A.shape[2:]
        if size.numel() == 1:
            A, B = A.flatten(1), B.flatten(1)
        elif len(size) == 2 and size[0] == size[1]:
            kernels[name] = k = size[0]
            A, B = _spread(A, B.flatten(1), k)
        else:
            faults.append(f"{name} {tuple(pair.A.shape)}")
            continue
        flat |= {f"{name}.lora_A": A, f"{name}.lora_B": B}
    if faults:
        raise AdapterError(f"loralib has square kernels alone, of two dimensions; found: {collapsed(faults)}")
    save(flat, path, {**adapter.metadata, ALPHA: "r", KERNELS: json.dumps(kernels)})


def _by_layer(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], list[str]]:
    """The factors by path, the biases that were trained, and what is wrong."""
    layers: dict[str, dict[str, Tensor]] = {}
    biases, strangers = {}, []
    for name, tensor in tensors.items():
        if match := _NAME.fullmatch(name):
            layers.setdefault(match[1], {})[match[2]] = tensor
        elif name.endswith(".bias"):
            biases[name] = tensor
        else:
            strangers.append(name)
    whole = {path: own for path, own in layers.items() if len(own) == 2}
    flat = [path for path, own in whole.items() if any(t.ndim != 2 or not t.numel() for t in own.values())]
    told = (
        ("unexpected tensors (save lora.lora_state_dict(model) alone)", strangers),
        ("only one of lora_A and lora_B", [path for path in layers if path not in whole]),
        ("factors that are no matrices", flat),
    )
    faults = [f"{what}: {collapsed(names)}" for what, names in told if names]
    return {path: own for path, own in whole.items() if path not in flat}, biases, faults


def _alpha(asked: float | None, about: Mapping[str, str]) -> tuple[float | None, list[str]]:
    """α, or None where it is each layer's own rank; and what is wrong."""
    if asked is None and about.get(ALPHA) == "r":
        return None, []
    if is_finite(asked):
        return asked, []
    if asked is not None:
        return None, [f"alpha should be a number, found {shown(asked)}"]
    return None, [
        "loralib's files do not say alpha, by which a change is scaled (alpha / r): give alpha=… or --alpha, the "
        "lora_alpha that the layers were made with (loralib's own default is 1)"
    ]


def _named(asked: Mapping[str, Any], layers: Collection[str], what: str, faults: list[str]) -> dict[str, Any]:
    """What is asked for the layers whose path, or its end, is a key; keys that match none are faults."""
    found: dict[str, Any] = {}
    for key, value in asked.items():
        meant = [path for path in layers if path == key or path.endswith(f".{key}")]
        found |= dict.fromkeys(meant, value)
        faults += [] if meant else [f"{what}: {unmatched([key], 'layer of the file', layers)}"]
    return found


def _change(
    own: Mapping[str, Tensor], alpha: float | None, k: int, enabled: Sequence[bool] | None, layer: nn.Module | None
) -> Change:
    A, B = own["A"], own["B"]
    parts, odd = divmod(len(A), B.shape[1])
    shapes = f"lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)}"
    if odd or not parts or len(B) % parts:
        raise AdapterError(f"{shapes} do not fit each other")
    if getattr(layer, "groups", 1) != 1:
        raise AdapterError("a grouped convolution's change is no LoRA: it cannot be read")
    if k != 1:
        if parts != 1 or not isinstance(k, int) or k < 1 or len(A) % k or A.shape[1] % k or len(B) % k:
            raise AdapterError(f"{shapes} are not those of a convolution with a kernel of {shown(k)}")
        return _scaled(*_gathered(A, B, k), len(A) // k, alpha)
    if parts != 1 or enabled is not None:
        B = _placed(B, _mask(shapes, parts, len(B), enabled, layer))
    return _scaled(A, B, len(A) // parts, alpha)


def _scaled(A: Tensor, B: Tensor, r: int, alpha: float | None) -> Change:
    """The change α / r · B A, of factors that may have another rank than r; α = r if there is none."""
    return Change(_config(len(A), len(A) * (1 if alpha is None else alpha / r)), {"A": A, "B": B})


@cache
def _config(r: int, alpha: float) -> LoraConfig:
    return LoraConfig(r=r, lora_alpha=alpha)


def _mask(shapes: str, parts: int, rows: int, enabled: Any, layer: nn.Module | None) -> Sequence[bool]:
    """Which parts of a layer's rows are adapted."""
    if enabled is None and len(getattr(layer, "weight", ())) == rows:
        return [True] * parts
    if enabled is None:
        raise AdapterError(
            f"{shapes} are {parts} parts of a MergedLinear, and not which: give its enable_lora, as "
            "enable_lora=[True, False, True], or by name, {'c_attn': […]}"
        )
    fits = isinstance(enabled, (list, tuple)) and all(isinstance(part, bool) for part in enabled)
    if not fits or sum(enabled) != parts:
        raise AdapterError(f"{shapes} are {parts} parts, which enable_lora={shown(enabled)} does not say")
    return enabled


def _placed(B: Tensor, enabled: Sequence[bool]) -> Tensor:
    """B of all rows `(out, e · r)`: each part's block `(rows, r)` at its rows and its r columns, and zeros."""
    count, r = sum(enabled), B.shape[1]
    rows = len(B) // count
    whole = B.new_zeros(len(enabled) * rows, count * r)
    for block, part in enumerate(part for part, on in enumerate(enabled) if on):
        whole[part * rows : (part + 1) * rows, block * r : (block + 1) * r] = B[block * rows : (block + 1) * rows]
    return whole


def _gathered(A: Tensor, B: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The factors `(k R, in, k, k)` and `(out, k R, 1, 1)` of a convolution whose own are `(R, in k)` and `(out k, R)`.

    The rows j, k + j, … of B A are the j-th stretch of the flattened kernels: ΔW = Σ_j B_j [0 … A … 0]. Where R = k · r
    and they are as `_spread` makes them, r is all that is needed.
    """
    R, columns = A.shape
    blocks = B.view(-1, k, k, R // k)  # (out, j, block, r)
    if not any(blocks[:, j, i].any() for j in range(k) for i in range(k) if i != j) and all(
        torch.equal(blocks[:, j, j], blocks[:, 0, 0]) for j in range(k)
    ):
        thin = A.view(k, R // k, columns).transpose(0, 1)  # (r, j, in · k)
        return thin.reshape(R // k, -1, k, k), blocks[:, 0, 0][..., None, None]
    whole = A.new_zeros(k, R, k, columns)
    for j in range(k):
        whole[j, :, j] = A
    return whole.view(k * R, -1, k, k), B.reshape(-1, k * R, 1, 1)


def _spread(A: Tensor, B: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """loralib's factors `(r · k, in · k)`, `(out · k, r · k)` of a convolution: A's stretches, and B in k blocks."""
    r = len(A)
    blocks = B.new_zeros(len(B), k, k, r)
    for j in range(k):
        blocks[:, j, j] = B
    return A.reshape(r, k, -1).transpose(0, 1).reshape(k * r, -1), blocks.view(len(B) * k, k * r)
