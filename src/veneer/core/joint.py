"""Many adapters on one layer, without gradients: two batched products reach the factors of all of them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.plan import Groups

_WASTE = 2  # times the memory of the factors that ranks of different sizes may cost


class Joint:
    """The factors of a layer's adapters, side by side: A `(adapters, r, in)`, B `(adapters, r, out)`.

    They *are* the memory of the parameters, each of which becomes a view: there is nothing to go stale and nothing is
    held twice. Whoever gives a parameter other memory is noticed (`holds`). Parameters that train are left alone: to
    optimizers and files the view of a larger memory is not the same.
    """

    def __init__(self, updates: Mapping[str, Any]) -> None:
        pairs = {name: (update.A, update.B) for name, update in updates.items()}
        r = max(len(A) for A, _ in pairs.values())
        first, last = next(iter(pairs.values()))
        with torch.inference_mode(False), torch.no_grad():
            self.A = first.new_zeros(len(pairs), r, first.shape[1])
            self.B = last.new_zeros(len(pairs), r, last.shape[0])
            self.scales = torch.tensor([[update.scale] for update in updates.values()]).to(first)
            for i, (A, B) in enumerate(pairs.values()):
                self.A[i, : len(A)], self.B[i, : len(A)] = A, B.t()
                A.data, B.data = self.A[i, : len(A)], self.B[i, : len(A)].t()
        self.slots = {name: i for i, name in enumerate(pairs)}
        self.names = tuple(pairs)
        self._places = [_place(update) for update in updates.values()]

    def holds(self, names: tuple[str, ...], adapters: Mapping[str, Any]) -> bool:
        """Whether these adapters are still what they were: a few hundred addresses are compared in microseconds."""
        wanted = self._places if names == self.names else [self._places[self.slots.get(name, 0)] for name in names]
        return [_place(adapters[name]) for name in names] == wanted

    def change(self, x: Tensor, names: tuple[str, ...], groups: Groups) -> Tensor:
        """Σ weight · scale · B A x row by row, for x `(rows, …, in)` → `(rows, …, out)` in the factors' precision."""
        A, B, scales = self.A, self.B, self.scales
        if names != self.names:
            slots = self._slots(names)
            A, B, scales = A[slots], B[slots], scales[slots]
        own = x.reshape(groups.rows, x.shape[:-1].numel() // groups.rows, x.shape[-1])  # (rows, tokens, in)
        own = (own if groups.in_order else own.index_select(0, groups.take)).to(A.dtype)
        tokens = own.shape[:2].numel() // len(names)
        h = torch.bmm(own.reshape(len(names), tokens, x.shape[-1]), A.transpose(1, 2))  # (adapters, most · tokens, r)
        h.view(*groups.weights.shape, own.shape[1] * h.shape[2]).mul_((groups.weights * scales).unsqueeze(2))
        y = torch.bmm(h, B).view(*own.shape[:2], B.shape[2])
        if not groups.in_order:
            y = y.new_zeros(groups.rows, *y.shape[1:]).index_add_(0, groups.take, y)
        return y.view(*x.shape[:-1], B.shape[2])

    def _slots(self, names: tuple[str, ...]) -> slice | list[int]:
        slots = [self.slots[name] for name in names]
        in_order = slots == list(range(slots[0], slots[0] + len(slots)))
        return slice(slots[0], slots[0] + len(slots)) if in_order else slots


def joined(before: Joint | None, adapters: nn.ModuleDict, names: tuple[str, ...]) -> Joint | None:
    """The joint memory of the named adapters: `before` where it still is, or a new one, or None where there is none."""
    modules: Any = adapters._modules
    if before is not None and before.holds(names, modules):
        return before
    if not all(_is_simple(modules[name]) for name in names):
        return None
    simple = {name: update for name, update in modules.items() if _is_simple(update)}
    ranks = [len(update.A) for update in simple.values()]
    alike = {(update.A.dtype, update.A.device, update.B.device) for update in simple.values()}
    if len(alike) > 1 or max(ranks) * len(ranks) > _WASTE * sum(ranks):
        return None
    return Joint(simple)


def parted(adapters: nn.ModuleDict) -> None:
    """Give the parameters memory of their own again, for those who save, train or spread them."""
    with torch.inference_mode(False), torch.no_grad():
        for parameter in adapters.parameters():
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)


def _place(update: Any) -> tuple[int, int, torch.Size, float]:
    A, B = update._parameters["A"], update._parameters["B"]
    return A.data_ptr(), B.data_ptr(), A.shape, update.scale


def _is_simple(update: Any) -> bool:
    """Whether its change is the product of its parameters A and B, and these are plain tensors that do not train."""
    if not update.simple:
        return False
    return not any(
        type(own.data) is not Tensor or own.requires_grad or own.is_inference() for own in (update.A, update.B)
    )
