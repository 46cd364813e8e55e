"""Many adapters on one layer, without gradients: two batched products reach the factors of all of them."""

from collections.abc import Mapping
from functools import lru_cache
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from veneer.core.plan import Groups

_BAGS = 8  # tokens of an adapter that rows of B are summed for one by one: reading B is all that takes time there
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
        self._places = _places(updates, self.names)

    def holds(self, names: tuple[str, ...], adapters: Mapping[str, Any]) -> bool:
        """Whether these adapters are still what they were: a few hundred addresses are compared in microseconds."""
        wanted, count = self._places, len(self.names)
        if names != self.names:
            slots = [self.slots.get(name, 0) for name in names]
            wanted = [wanted[kind + slot] for kind in range(0, 4 * count, count) for slot in slots]
        return _places(adapters, names) == wanted

    def change(self, x: Tensor, names: tuple[str, ...], groups: Groups) -> Tensor:
        """Σ weight · scale · B A x row by row, for x `(rows, …, in)` → `(rows, …, out)` in the factors' precision."""
        A, B, scales = self.A, self.B, self.scales
        if names != self.names:
            slots = self._slots(names)
            A, B, scales = A[slots], B[slots], scales[slots]
        own = x.reshape(groups.rows, x.shape[:-1].numel() // groups.rows, x.shape[-1])  # (rows, tokens, in)
        own = (own if groups.in_order else own.index_select(0, groups.take)).to(A.dtype)
        weights, (places, tokens, _), r = groups.weights * scales, own.shape, A.shape[1]
        each = places * tokens // len(names)  # the tokens of one adapter
        own = own.reshape(len(names), each, x.shape[-1])
        # (adapters, each, r), which for one token is the same as (adapters, r, 1) and that takes two thirds of the time
        h = torch.bmm(A, own.transpose(1, 2)) if each == 1 else torch.bmm(own, A.transpose(1, 2))
        h.view(*weights.shape, tokens * r).mul_(weights.unsqueeze(2))
        if 0 < each <= _BAGS:
            index, starts = _bags(len(names), each, r, B.device)
            y, *_ = torch.embedding_bag(
                B.view(-1, B.shape[2]), index, starts, per_sample_weights=h.view(-1).to(B.dtype)
            )
        else:
            y = torch.bmm(h, B)
        y = y.view(places, tokens, B.shape[2])
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


def _places(adapters: Mapping[str, Any], names: tuple[str, ...]) -> list[float]:
    """Four numbers for each adapter, which change where it does. All of this lies about in memory, not in the cache:
    loops without Python between wait for several at once.
    """
    updates = [adapters[name] for name in names]
    own = [update._parameters for update in updates]
    A, B = list(map(itemgetter("A"), own)), list(map(itemgetter("B"), own))
    addresses, sizes = [*map(Tensor.data_ptr, A), *map(Tensor.data_ptr, B)], map(Tensor.numel, A)
    return [*addresses, *sizes, *map(attrgetter("scale"), updates)]


@lru_cache(64)
def _bags(adapters: int, each: int, r: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For `embedding_bag`: which rows of B `(adapters · r, out)` each token sums, `(adapters · each · r)`, and where
    those of each begin.
    """
    index = torch.arange(adapters * r, device=device).view(adapters, 1, r).expand(adapters, each, r)
    return index.reshape(-1), torch.arange(0, index.numel(), r, device=device)


def _is_simple(update: Any) -> bool:
    """Whether its change is the product of its parameters A and B, and these are plain tensors that do not train."""
    if not update.simple:
        return False
    return not any(
        type(own.data) is not Tensor or own.requires_grad or own.is_inference() for own in (update.A, update.B)
    )
