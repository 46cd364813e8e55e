"""Layers by what they do in a transformer, whatever its family calls them."""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from veneer.core.kinds.attention import AdaptedAttention

if TYPE_CHECKING:
    from veneer.core.search import Search

# What families call the modules that hold the layers of a role: (their own names, the ends of their classes' names)
_ATTENTION = (re.compile(r"(.*_)?(attn|attention)\d*"), ("Attention",))
_FEED_FORWARD = (
    re.compile(r"(.*_)?(mlp|ff|ffn|feed_forward)"),
    ("MLP", "FeedForward", "FFN", "Intermediate", "Output", "ActDense", "Mlp"),
)
_DIRECT = {"fc1", "fc2", "linear1", "linear2"}  # OPT and nn.TransformerEncoderLayer keep these in the block itself


def _is_linear(path: str, search: "Search") -> bool:
    return getattr(search.kind(path), "linear", False)


def _is_norm(path: str, search: "Search") -> bool:
    return getattr(search.kind(path), "norm", False)


def _stands_in(path: str, search: "Search", names: re.Pattern[str], classes: tuple[str, ...]) -> bool:
    while path := path.rpartition(".")[0]:
        if names.fullmatch(path.rpartition(".")[2]) or type(search.modules[path]).__name__.endswith(classes):
            return True
    return False


def _is_attention(path: str, search: "Search") -> bool:
    linear = _is_linear(path, search)
    return _stands_in(path, search, *_ATTENTION) if linear else search.kind(path) is AdaptedAttention


def _is_feed_forward(path: str, search: "Search") -> bool:
    if not _is_linear(path, search) or _is_attention(path, search):
        return False
    return path.rpartition(".")[2] in _DIRECT or _stands_in(path, search, *_FEED_FORWARD)


ROLES: dict[str, Callable[[str, "Search"], bool]] = {
    "all-linear": _is_linear,
    "attention": _is_attention,
    "feed-forward": _is_feed_forward,
    "norm": _is_norm,
}
