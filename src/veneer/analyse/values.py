"""What the values of an adapter show: how large its changes are, and which tensors cannot be trusted."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from veneer.apart.changes import Change
from veneer.core.adapter import Adapter
from veneer.core.errors import AdapterError, collapsed, listed
from veneer.safe.stored import is_finite

_HALF = torch.finfo(torch.float16)
_SAMPLE = 2**12  # values of a tensor that are looked at for being subnormal
_MANY = 0.2  # share of them that is told


@dataclass(frozen=True)
class Values:
    """What was found by reading every tensor once. ‖ΔW‖ is Frobenius' norm; with DoRA, that of the change before rows
    are rescaled.
    """

    norms: dict[str, float | None]  # by path; None where ΔW depends on the base's weight
    dead: tuple[str, ...]  # layers whose change is all zero
    doubts: tuple[str, ...]
    faults: tuple[str, ...]  # NaN and infinity; tensors that make no change together

    def among(self, paths: Iterable[str]) -> float:
        """‖ΔW‖ of these layers together: √ Σ ‖ΔW‖²."""
        return math.hypot(*(self.norms.get(path) or 0.0 for path in paths))

    def largest(self, most: int) -> list[str]:
        """The paths of the largest changes, the largest first."""
        norms = {path: norm for path, norm in self.norms.items() if norm}
        return sorted(norms, key=lambda path: -norms[path])[:most]


def values_of(adapter: Adapter, changes: Mapping[str, Change]) -> Values:
    """Read all tensors, a layer at a time."""
    norms = dict[str, float | None]()
    unfit: dict[str, list[str]] = defaultdict(list)
    broken, large, small = list[str](), list[str](), list[str]()
    for path, tensors in adapter.tensors.items():
        named = {".".join(filter(None, (path, name))): tensor for name, tensor in tensors.items()}
        bad = [name for name, tensor in named.items() if not is_finite(tensor)]
        broken += bad
        large += [name for name, tensor in named.items() if not bad and overflows(tensor)]
        small += [name for name, tensor in named.items() if subnormal(tensor) > _MANY]
        if path in changes and not bad:
            try:
                norms[path] = norm_of(changes[path])
            except AdapterError as error:
                unfit[str(error)].append(path)
    dead = tuple(path for path, norm in norms.items() if norm == 0)
    twins = [" = ".join(paths) for paths in _twins(changes, norms)]
    less = f"{_HALF.smallest_normal:.2g}, where float16 loses digits"
    doubts = {
        "layers that change nothing, as if never trained": collapsed(dead) if dead else "",
        "layers with the same values to the bit": listed(twins, say=str, between="; ") if twins else "",
        f"values beyond {_HALF.max:g}, which float16 cannot hold": collapsed(large) if large else "",
        f"more than {_MANY:.0%} of the values are below {less}": collapsed(small) if small else "",
    }
    faults = [f"NaN or infinity in: {collapsed(broken)}"] * bool(broken)
    faults += [f"{collapsed(paths)}: {error}" for error, paths in unfit.items()]
    return Values(norms, dead, tuple(f"{what}: {where}" for what, where in doubts.items() if where), tuple(faults))


@torch.no_grad()
def norm_of(change: Change) -> float | None:
    """‖ΔW‖ without ΔW where it is a product: ‖s · B A‖² = s² tr((BᵀB)(AAᵀ)), ‖s · C ⊗ D‖ = |s| ‖C‖ ‖D‖.

    None where ΔW depends on the base's weight; what DoRA does to the rows is left out. Summed in float64.
    """
    if change.config.use_dora:
        tensors = {name: tensor for name, tensor in change.tensors.items() if name != "magnitude"}
        change = replace(change, config=replace(change.config, use_dora=False), tensors=tensors)
    if change.reads_weight or change.shape is None:
        return None
    update = change.update()
    if (factors := update.factors()) is not None:
        A, B = factors.A.double(), factors.B.double()
        squared = torch.sum((B.t() @ B) * (A @ A.t())).item()
        return abs(factors.scale) * math.sqrt(max(0.0, squared))
    if change.config.peft_type == "LOKR":
        return abs(update.scale) * _product_norm("C", change.tensors) * _product_norm("D", change.tensors)
    return torch.linalg.vector_norm(update.delta(torch.empty(change.shape, device="meta")), dtype=torch.float64).item()


def _product_norm(name: str, tensors: Mapping[str, Tensor]) -> float:
    """‖C‖ of LoKr's C, which may be a product of two."""
    whole = tensors.get(name)
    if whole is None:
        B, A = (tensors[f"{name}_{side}"].double().flatten(1) for side in "BA")
        return math.sqrt(max(0.0, torch.sum((B.t() @ B) * (A @ A.t())).item()))
    return torch.linalg.vector_norm(whole, dtype=torch.float64).item()


def overflows(tensor: Tensor) -> bool:
    """Whether float16 would make an infinity of one of the values."""
    wider = tensor.is_floating_point() and tensor.dtype != torch.float16 and tensor.numel()
    return bool(wider) and any(abs(end.item()) > _HALF.max for end in tensor.aminmax())


def subnormal(tensor: Tensor) -> float:
    """The share of a float16 tensor's values that have lost digits, of a sample of them."""
    if tensor.dtype != torch.float16 or not tensor.numel():
        return 0.0
    flat = tensor.reshape(-1)
    sizes = flat[:: max(1, flat.numel() // _SAMPLE)].float().abs()
    return ((sizes > 0) & (sizes < _HALF.smallest_normal)).float().mean().item()


def _twins(changes: Mapping[str, Change], norms: Mapping[str, float | None]) -> list[list[str]]:
    """The paths of layers that have all tensors alike, but for those that change nothing."""
    alike: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for path, norm in norms.items():
        if norm:
            alike[changes[path].shape, norm].append(path)
    found = []
    for paths in alike.values():
        first = changes[paths[0]].tensors
        same = [path for path in paths[1:] if _equal(first, changes[path].tensors)]
        found += [[paths[0], *same]] * bool(same)
    return found


def _equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
