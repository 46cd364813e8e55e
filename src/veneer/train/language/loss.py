"""The losses of learned tokens, in chunks: the `(tokens, vocabulary)` matrix of logits never exists."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from veneer.core.fused import BLOCK, product_dtype, wide_linear, wide_product
from veneer.train.pieces.frozen import QuickLinear

CHUNK = 128  # tokens in fp32, twice as many in bf16: 128 × 49,152 logits are 25 MB


def learned_losses(hidden: Tensor, head: nn.Module, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """-log softmax(head(hidden))[target] of each token, in fp32: hidden `(tokens, size)`, all else `(tokens)`.

    With label smoothing ε (Szegedy et al. 2016, arXiv:1512.00567), a target's share is 1 - ε, and ε is spread evenly
    over the vocabulary. A frozen linear head's part of the gradient is computed along with the losses; any other head
    runs again in the backward.
    """
    plain = type(head) is nn.Linear or isinstance(head, QuickLinear)
    if plain and not any(own.requires_grad for own in head.parameters()):
        return _FrozenHead.apply(hidden, head.weight, head.bias, targets, smoothing)
    parts = [
        checkpoint(_chunk_losses, head, own, wanted, smoothing, use_reentrant=False)
        for own, wanted in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    ]
    return torch.cat(parts)


def token_losses(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """The same from logits `(tokens, vocabulary)`."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)


def _chunk_losses(head: nn.Module, hidden: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    return token_losses(head(hidden), targets, smoothing)


class _FrozenHead(torch.autograd.Function):
    """The losses of a head that does not learn: `d loss / d hidden = (p - target) W`, a chunk at a time."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, smoothing: float
    ) -> Tensor:
        own = product_dtype(hidden)
        size = max(1, 4 * CHUNK // own.itemsize)
        losses = hidden.new_zeros(len(targets), dtype=torch.promote_types(hidden.dtype, torch.float32))
        into = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for i in range(0, len(targets), size):
            logits = wide_linear(hidden[i : i + size].to(own), weight, bias)  # (chunk, vocabulary)
            losses[i : i + size] = _losses_in_place(logits, targets[i : i + size, None], smoothing)
            if into is not None:
                into[i : i + size] = wide_product(logits, weight)
        ctx.save_for_backward(into)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (dhidden,) = ctx.saved_tensors
        into = torch.empty_like(dhidden)  # computed in fp32 and rounded once: fp16's scale may be beyond fp16
        return torch.mul(dhidden, grad[:, None], out=into), None, None, None, None


def _losses_in_place(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """The losses of logits `(tokens, vocabulary)`, targets `(tokens, 1)`, and p - target in the logits' place.

    By blocks of rows that stay in the cache, in fp32. log Σ exp(logits) is the largest logit less the log of its p.
    """
    wide, losses = torch.promote_types(logits.dtype, torch.float32), []
    for rows, wanted in zip(*(own.split(max(1, BLOCK // logits.shape[1])) for own in (logits, targets)), strict=True):
        block = rows.to(wide)
        p = block.softmax(-1)
        top = block.amax(-1, keepdim=True)  # (rows, 1); differences first: what is left of large logits is exact
        loss = (top - block.gather(1, wanted)).mul_(1 - smoothing).sub_(p.amax(-1, keepdim=True).log_())
        if smoothing:
            loss.sub_(block.sub_(top).mean(-1, keepdim=True), alpha=smoothing)
            p.sub_(smoothing / p.shape[1])
        losses.append(loss)
        rows.copy_(p.scatter_add_(1, wanted, torch.full_like(loss, smoothing - 1)))
    return torch.cat(losses)[:, 0]


@contextmanager
def head_input(head: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, the output layer computes nothing: what it was given, `(rows, tokens, size)`, is put into the list."""
    given: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        given.append(args[0])
        return args[0][..., :0, :], *args[1:]

    with head.register_forward_pre_hook(keep):
        yield given


def only(head: nn.Module | None, places: Tensor) -> AbstractContextManager[Any]:
    """Inside, the output layer sees only the places that are marked, of `(rows, tokens)`: `(places, size)`."""
    if head is None:
        return nullcontext()
    return head.register_forward_pre_hook(lambda _, args: (args[0][places], *args[1:]))


@torch.no_grad()
def ends_with_head(model: Any) -> bool:
    """Whether the model's logits are what its output layer gives: neither scaled nor capped afterwards."""
    head = model.get_output_embeddings()
    if head is None:
        return False
    was_training, ids = model.training, torch.arange(4, device=model.device)[None]
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}
    model.eval()
    try:
        logits = model(**inputs, use_cache=False).logits
        with head_input(head) as given:
            model(**inputs, use_cache=False)
        return len(given) == 1 and torch.equal(head(given[0]), logits)
    finally:
        model.train(was_training)
