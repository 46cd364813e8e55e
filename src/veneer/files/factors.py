"""Changes as formats hold them that know A and B alone: ΔW = B A, with every scale inside B."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.apart.changes import Change, beside, changes
from veneer.core.adapter import Adapter
from veneer.core.config import scaling
from veneer.core.errors import AdapterError, collapsed
from veneer.files.parts import STILL_FLAT, unresolved
from veneer.safe.stored import is_finite, is_near

_WAY_OUT = "make it a plain LoRA first (veneer resize --rank R says the error)"


class Pair(NamedTuple):
    """ΔW = B A, with A `(r, in, *kernel)` and B `(out, r, 1, …)`; Δb = b, DoRA's m `(out)`, where there are such."""

    A: Tensor
    B: Tensor
    b: Tensor | None
    magnitude: Tensor | None

    @property
    def r(self) -> int:
        return len(self.A)


def pairs(adapter: Adapter, format: str, holds: str = "") -> dict[str, Pair]:
    """The adapter's changes as pairs, by path. `holds` names what else the format has a place for: "b magnitude".

    Raises `AdapterError` with all that the format cannot hold.
    """
    every = changes(adapter)
    reasons: dict[str, list[str]] = {}
    for path, change in every.items():
        for reason in _reasons(change, holds):
            reasons.setdefault(reason, []).append(path)
    if flat := unresolved(adapter):
        reasons[STILL_FLAT] = flat
    if rest := beside(adapter):
        reasons["values that are trained whole, beside the method"] = list(rest)
    if reasons:
        told = "\n".join(f"- {reason}: {collapsed(paths, 8)}" for reason, paths in reasons.items())
        raise AdapterError(f"{format} files cannot hold all of this adapter; nothing was written:\n{told}")
    return {path: _pair(path, change) for path, change in every.items()}


def _reasons(change: Change, holds: str) -> list[str]:
    found = []
    if change.config.peft_type != "LORA":
        found.append(f"{change.config.peft_type} (only LoRA has a place there: {_WAY_OUT})")
    elif change.config.use_dora and "magnitude" not in holds:
        found.append("DoRA magnitudes (no place there: merge it into its base, or extract a LoRA from the result)")
    elif change.config.use_dora and change.tensors["magnitude"].ndim == 2:
        found.append("DoRA magnitudes of the inputs (only those of the outputs have a place there)")
    elif "b" in change.tensors and "b" not in holds.split():
        found.append("changes of biases (no place there)")
    if not found and _scale(change) != 1 and not all(map(is_finite, change.tensors.values())):
        found.append("NaN or infinity, which no scale can be multiplied with")
    return found


def _scale(change: Change) -> float:
    return scaling(change.config.r, change.config.lora_alpha, change.config.use_rslora)


def _pair(path: str, change: Change) -> Pair:
    own, scale = change.tensors, _scale(change)
    b = own.get("b")
    try:
        A, B = folded(own["A"], own["B"], scale)
        return Pair(A, B, b if b is None else scaled(b, scale), own.get("magnitude"))
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from None


def folded(A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """A′ and B′ with B′ A′ = scale · B A: B′ is multiplied in fp32 and rounded once, and A′ is A.

    Where their precision is too narrow for that, a power of two goes from one to the other, so that both are in its
    midst. Raises `AdapterError` where that is not enough.
    """
    if scale == 1:
        return A, B
    wide = B.detach().to(torch.promote_types(B.dtype, torch.float32)) * scale
    product = wide.to(B.dtype)
    fits = is_near(product, wide) if B.dtype == torch.float16 else is_finite(product)
    if fits or not (is_finite(A) and is_finite(B)):
        return A, product
    own, wide = A.detach().double(), B.detach().double() * scale
    peaks = wide.abs().amax() / own.abs().amax().clamp_min(1e-30)
    shift = 2.0 ** round(peaks.clamp_min(1e-30).log2().item() / 2)
    A, B = (own * shift).to(A.dtype), (wide / shift).to(B.dtype)
    if not (is_finite(A) and is_finite(B)):
        raise AdapterError(f"a scale of {scale:g} is too large for factors of {str(B.dtype).removeprefix('torch.')}")
    return A, B


def scaled(tensor: Tensor, factor: float) -> Tensor:
    """factor · tensor in its own dtype, computed in fp32 at least and rounded once; in that where its own is too
    narrow.
    """
    if factor == 1:
        return tensor
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * factor
    own = wide.to(tensor.dtype)
    if not is_finite(wide) and is_finite(tensor):
        raise AdapterError(f"a scale of {factor:g}, with which its factors are too large")
    return own if is_near(own, wide) else wide


def of_one_rank(own: Mapping[str, Pair]) -> dict[str, Pair]:
    """The same changes, all of the largest rank among them: the others are filled up with zeros."""
    most = max(pair.r for pair in own.values())
    return {path: pair if pair.r == most else _filled(pair, most) for path, pair in own.items()}


def _filled(pair: Pair, r: int) -> Pair:
    A, B = pair.A, pair.B
    over = (0, 0) * (B.ndim - 2)
    return pair._replace(
        A=torch.cat([A, A.new_zeros(r - len(A), *A.shape[1:])]), B=F.pad(B, (*over, 0, r - B.shape[1]))
    )
