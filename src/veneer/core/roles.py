"""Layers by what they do in a transformer, whatever its family calls them."""

import re
from collections.abc import Callable

from torch import nn

from veneer.core.kinds import kind_of
from veneer.core.kinds.attention import AdaptedAttention

# What families call the modules that hold the layers of a role: (their own names, the ends of their classes' names)
_ATTENTION = (re.compile(r"(.*_)?(attn|attention)\d*"), ("Attention",))
_FEED_FORWARD = (
    re.compile(r"(.*_)?(mlp|ff|ffn|feed_forward)"),
    ("MLP", "FeedForward", "FFN", "Intermediate", "Output", "ActDense", "Mlp"),
)
_DIRECT = {"fc1", "fc2", "linear1", "linear2"}  # OPT and nn.TransformerEncoderLayer keep these in the block itself


def _is_linear(path: str, modules: dict[str, nn.Module]) -> bool:
    kind = kind_of(modules[path])
    return kind is not None and kind.linear


def _is_norm(path: str, modules: dict[str, nn.Module]) -> bool:
    kind = kind_of(modules[path])
    return kind is not None and kind.norm


def _stands_in(path: str, modules: dict[str, nn.Module], places: tuple[re.Pattern[str], tuple[str, ...]]) -> bool:
    names, classes = places
    parts = path.split(".")[:-1]
    holders = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(
        names.fullmatch(part) or type(modules[holder]).__name__.endswith(classes)
        for part, holder in zip(parts, holders, strict=True)
    )


def _is_attention(path: str, modules: dict[str, nn.Module]) -> bool:
    if _is_linear(path, modules):
        return _stands_in(path, modules, _ATTENTION)
    return kind_of(modules[path]) is AdaptedAttention


def _is_feed_forward(path: str, modules: dict[str, nn.Module]) -> bool:
    if not _is_linear(path, modules) or _is_attention(path, modules):
        return False
    return path.rpartition(".")[2] in _DIRECT or _stands_in(path, modules, _FEED_FORWARD)


ROLES: dict[str, Callable[[str, dict[str, nn.Module]], bool]] = {
    "all-linear": _is_linear,
    "attention": _is_attention,
    "feed-forward": _is_feed_forward,
    "norm": _is_norm,
}
