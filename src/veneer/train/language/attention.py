"""Attention inside the documents of a packed row: what stands in other documents is never seen.

A packed row is one row of documents laid end to end. Its `attention_mask` is not a mask but the documents' lengths
`(1, 1, 1, documents)`, which transformers hands to every layer as it is. Documents of like length are taken together.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from veneer.core.errors import AdapterError
from veneer.core.fused import HALF, product_dtype

NAME = "veneer"  # in a model's config, in place of "sdpa"
HARMLESS = {"position_ids", "cache_position", "use_cache", "return_dict", "deterministic"}  # output_… are, too
LIKE = 0.75  # of the longest document: the shortest that is taken together with it
KEPT = 2  # times a query's numbers: the most probabilities of it that are kept for the backward
# tokens; with more, torch's own kernel is faster on a CPU too: in fp32, and in half precision that is quick there
SHORT, SHORT_HALF = 192, 1024
MOST = 2**21  # probabilities that are made at once: 8 MB in fp32


class Layout(NamedTuple):
    """How rows `(tokens · heads)` of queries, and of keys, come into the groups, and back."""

    groups: list[tuple[int, ...]]  # the lengths of documents that are taken together, padded to the longest
    queries: tuple[Tensor, Tensor]  # (Σ documents · heads · longest): which row; (tokens · heads): to which place
    keys: tuple[Tensor, Tensor]


def register() -> str:
    """Make the attention known to transformers; the name that a config says it by."""
    return _registered(attend, sdpa_mask)


@contextmanager
def windows() -> Iterator[tuple[set[int | None], set[int | None]]]:
    """Inside, the windows that masks are made with, and those that attention is told: in a packed row there is no mask,
    so that only the second are known.
    """
    masks: set[int | None] = set()
    told: set[int | None] = set()

    def mask(*args: Any, **more: Any) -> Any:
        masks.add(more.get("local_size"))
        return sdpa_mask(*args, **more)

    def attention(*args: Any, **more: Any) -> Any:
        told.add(more.get("sliding_window"))
        return attend(*args, **more)

    _registered(attention, mask)
    try:
        yield masks, told
    finally:
        register()


def _registered(attention: Callable[..., Any], mask: Callable[..., Any]) -> str:
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
    return NAME


def documents(lengths: Sequence[int]) -> Tensor:
    """What a packed row has in place of its attention mask. It stays on the CPU: it is read, not computed with."""
    return torch.tensor(lengths).view(1, 1, 1, -1)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """softmax(q kᵀ · scaling) v inside each document, q `(1, heads, tokens, size)` → `(1, tokens, heads, size)`.

    A row that is not packed is left to torch's own attention. Raises `AdapterError` where the model asks for what is
    not known here: it cannot be packed then.
    """
    if attention_mask is None or attention_mask.is_floating_point() or attention_mask.dtype == torch.bool:
        more["sliding_window"] = sliding_window
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **more)
    told = {name for name, what in more.items() if what is not None and not name.startswith("output_")}
    if unknown := sorted(told - HARMLESS):
        raise AdapterError(f"attention with {', '.join(unknown)} cannot be packed")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    lengths = tuple(attention_mask.flatten().tolist())
    window = sliding_window if sliding_window is not None and sliding_window < max(lengths) else None
    if window is not None and not causal:
        raise AdapterError("attention that looks through a window in both directions cannot be packed")
    heads, size = query.shape[1], query.shape[3]
    layout = _layout(lengths, heads, key.shape[1], query.device)
    q = _Taken.apply(_rows(query), *layout.queries)
    k, v = (_Taken.apply(_rows(own), *layout.keys) for own in (key, value))
    scale = size**-0.5 if scaling is None else scaling
    found, first = [], 0
    for group in layout.groups:
        last = first + len(group) * max(group)
        shape = (len(group), key.shape[1], -1, max(group), size)  # the third: queries a key
        own_q = q[first * heads : last * heads].view(shape)
        own_k, own_v = (rows[first * key.shape[1] : last * key.shape[1]].view(shape) for rows in (k, v))
        found.append(_inside(own_q, own_k, own_v, group, causal, window, dropout, scale).reshape(-1, size))
        first = last
    y = _Returned.apply(found[0] if len(found) == 1 else torch.cat(found), layout.queries[1])
    return y.view(1, -1, heads, size), None


def _inside(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, ...],
    causal: bool,
    window: int | None,
    dropout: float,
    scale: float,
) -> Tensor:
    """Attention inside documents, q `(documents, key heads, queries a key, longest, size)`; of padding, anything."""
    lengths = (max(lengths),) if causal else lengths  # a causal query sees no padding
    quick = q.dtype in HALF and product_dtype(q.flatten(0, -2)) == q.dtype
    if q.device.type == "cpu" and not dropout and max(lengths) <= (SHORT_HALF if quick else SHORT):
        return _Products.apply(q, k, v, _bias(lengths, window, causal, q.dtype, q.device), scale, causal)
    k, v = (own.expand(q.shape).flatten(1, 2) for own in (k, v))
    plain = causal and window is None
    mask = None if plain else _bias(lengths, window, causal, q.dtype, q.device).unsqueeze(1)
    y = F.scaled_dot_product_attention(q.flatten(1, 2), k, v, mask, dropout, is_causal=plain, scale=scale)
    return y.view(q.shape)


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # it is kept, and gradients may be wanted later
def _bias(lengths: tuple[int, ...], window: int | None, causal: bool, dtype: torch.dtype, device: Any) -> Tensor:
    """`(lengths, longest, longest)`: 0 where a query sees a key, else -∞; padding sees something too."""
    places = torch.arange(max(lengths), device=device)
    if causal:
        seen = (places[:, None] >= places).unsqueeze(0)
        seen = seen if window is None else seen & (places[:, None] - places < window)
    else:
        seen = (places < torch.tensor(lengths, device=device)[:, None])[:, None, :].expand(-1, max(lengths), -1)
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _layout(lengths: tuple[int, ...], heads: int, key_heads: int, device: torch.device) -> Layout:
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    together: list[list[int]] = []
    for i in order:
        if not together or lengths[i] < LIKE * lengths[together[-1][0]]:
            together.append([])
        together[-1].append(i)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    groups, tokens, real = [], [], []
    for own in together:
        longest = lengths[own[0]]
        of_each = torch.tensor([lengths[i] for i in own])
        places = torch.arange(longest).expand(len(own), -1)  # (documents, longest)
        tokens.append(starts[own][:, None] + torch.minimum(places, of_each[:, None] - 1))
        real.append(places < of_each[:, None])
        groups.append(tuple(of_each.tolist()))

    def moves(heads: int) -> tuple[Tensor, Tensor]:
        each = torch.arange(heads)[:, None]
        take = torch.cat([(own[:, None] * heads + each).flatten() for own in tokens])  # (documents, heads, longest)
        kept = torch.cat([own[:, None].expand(-1, heads, -1).flatten() for own in real])
        back = torch.empty(sum(lengths) * heads, dtype=torch.long)
        back[take[kept]] = kept.nonzero().squeeze(1)
        return take.to(device), back.to(device)

    return Layout(groups, moves(heads), moves(key_heads))


def _rows(states: Tensor) -> Tensor:
    """(1, heads, tokens, size) → (tokens · heads, size)."""
    return states.transpose(1, 2).reshape(-1, states.shape[3])


class _Taken(torch.autograd.Function):
    """The rows that `take` says; each goes `back` to one place, and padding nowhere."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, take: Tensor, back: Tensor) -> Tensor:
        ctx.back = back
        return rows.index_select(0, take)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad.index_select(0, ctx.back), None, None


class _Returned(torch.autograd.Function):
    """The rows in their first order again, without padding."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, back: Tensor) -> Tensor:
        ctx.back, ctx.count = back, len(rows)
        return rows.index_select(0, back)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad.new_zeros(ctx.count, grad.shape[1]).index_copy_(0, ctx.back, grad), None


class _Products(torch.autograd.Function):
    """softmax(scale · q kᵀ + bias) v by batched products, some queries after others, with the keys that these may see.

    Keeps q, k and v, and of short documents the probabilities, which are made again of longer ones.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, causal: bool) -> Tensor:
        ctx.shape, ctx.scale, ctx.causal = k.shape, scale, causal
        k, v = k.flatten(0, 2), v.flatten(0, 2)  # (documents · key heads, longest, size)
        parts, p = [], q
        for rows, seen in _blocks(q, causal):
            p = _probabilities(_flat(q, rows), k[:, :seen], _of_rows(bias, q, rows, seen), scale)
            parts.append(torch.bmm(p, v[:, :seen]).view(*q.shape[:3], -1, q.shape[4]))
        ctx.kept = len(parts) == 1 and p.numel() <= KEPT * q.numel()
        ctx.save_for_backward(q, k, v, p if ctx.kept else bias)
        return parts[0] if len(parts) == 1 else torch.cat(parts, 3)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, own = ctx.saved_tensors
        dqs, dks, dvs = [], [], []
        for rows, seen in _blocks(q, ctx.causal):
            q_own, grad_own = _flat(q, rows), _flat(grad, rows)
            p = own
            if not ctx.kept:
                p = _probabilities(q_own, k[:, :seen], _of_rows(own, q, rows, seen), ctx.scale)
            dvs.append(torch.bmm(p.transpose(1, 2), grad_own))
            dp = torch.bmm(grad_own, v[:, :seen].transpose(1, 2))
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype).mul_(ctx.scale)
            dqs.append(torch.bmm(ds, k[:, :seen]).view(*q.shape[:3], -1, q.shape[4]))
            dks.append(torch.bmm(ds.transpose(1, 2), q_own))
        dq = dqs[0] if len(dqs) == 1 else torch.cat(dqs, 3)
        return dq, _summed(dks).view(ctx.shape), _summed(dvs).view(ctx.shape), None, None, None


def _blocks(q: Tensor, causal: bool) -> list[tuple[slice, int]]:
    """Which queries are taken at once, and how many keys they may see."""
    longest = q.shape[3]
    size = max(1, MOST // (q.shape[:3].numel() * longest * 64)) * 64
    stops = [*range(size, longest, size), longest]
    return [(slice(start, stop), stop if causal else longest) for start, stop in zip([0, *stops], stops, strict=False)]


def _summed(parts: list[Tensor]) -> Tensor:
    """The sum, in fp32, of parts `(…, keys, size)` of which the last has all keys, and the others the first of them."""
    if len(parts) == 1:
        return parts[0]
    total = torch.zeros_like(parts[-1], dtype=torch.promote_types(parts[-1].dtype, torch.float32))
    for part in parts:
        total[:, : part.shape[1]] += part
    return total.to(parts[-1].dtype)


def _flat(q: Tensor, rows: slice) -> Tensor:
    """(documents · key heads, queries a key · rows, size)."""
    return q[:, :, :, rows].flatten(0, 1).flatten(1, 2)


def _of_rows(bias: Tensor, q: Tensor, rows: slice, seen: int) -> Tensor:
    """(1 or documents · key heads, queries a key · rows, seen)."""
    bias = bias[:, rows, :seen]
    bias = bias.repeat_interleave(q.shape[1], 0) if len(bias) > 1 else bias
    return bias.repeat(1, q.shape[2], 1)


def _probabilities(q: Tensor, k: Tensor, bias: Tensor, scale: float) -> Tensor:
    scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scale)
    if scores.dtype not in HALF:
        return scores.softmax(-1)
    return scores.softmax(-1, dtype=torch.float32).to(scores.dtype)  # half the time of the kernel for half precision
