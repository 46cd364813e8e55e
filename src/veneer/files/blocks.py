"""The order in which cloneofsimo/lora counts layers: that of their modules in a model, or in Stable Diffusion 1 and 2.

Depth first, every module of one of some classes, and in it every linear layer and convolution. The classes' names are
those of early 2023: `CrossAttention` is `Attention` now.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from torch import nn

ATTENTION, GATED, RESNET, TEXT = {"CrossAttention", "Attention"}, {"GEGLU"}, {"ResnetBlock2D"}, {"CLIPAttention"}
UNET = (ATTENTION, ATTENTION | GATED, ATTENTION | GATED | RESNET)  # the sets of classes that were in use
_MADE = ("attn1", "ff", "attn2")  # the order within a transformer block until early 2023
_WIDTH, _TEXT_WIDTH, _CONTEXT = "width", "text", "context"


class Side(NamedTuple):
    """A size of a layer: `times` one that layers share."""

    size: str
    times: int = 1


def layouts(classes: Collection[str], text_layers: int, model: nn.Module | None = None) -> list[list[str]]:
    """The paths of the layers in every order that a file may have them in; without a model, of Stable Diffusion 1 or 2,
    with a text encoder of so many layers.
    """
    if model is not None:
        paths = list(_of_model(model, classes))
    elif TEXT & set(classes):
        parts = [f"text_model.encoder.layers.{i}.self_attn" for i in range(text_layers)]
        paths = [f"{part}.{name}_proj" for part in parts for name in ("k", "v", "q", "out")]
    else:
        paths = list(_of_stable_diffusion(classes))
    now, then = paths, _as_made_then(paths)
    return [then] if now == then else [then, now]


def _of_model(model: nn.Module, classes: Collection[str]) -> Iterator[str]:
    wanted = set(classes) | (ATTENTION if ATTENTION & set(classes) else set())
    for holder, module in model.named_modules():
        if type(module).__name__ in wanted:
            for name, inner in module.named_modules(prefix=holder):
                if isinstance(inner, (nn.Linear, nn.Conv2d)):
                    yield name


def _of_stable_diffusion(classes: Collection[str]) -> Iterator[str]:
    known = set(classes)
    blocks = [(f"down_blocks.{i}", 2 * (i < 3), 2) for i in range(4)]
    blocks += [(f"up_blocks.{i}", 3 * (i > 0), 3) for i in range(4)] + [("mid_block", 1, 2)]
    for block, attentions, resnets in blocks:
        for holder in (f"{block}.attentions.{i}.transformer_blocks.0" for i in range(attentions)):
            for attention in ("attn1", "attn2") if known & ATTENTION else ():
                yield from (f"{holder}.{attention}.to_{name}" for name in ("q", "k", "v", "out.0"))
            if known & GATED:
                yield f"{holder}.ff.net.0.proj"
        for i in range(resnets if known & RESNET else 0):
            wider = block.startswith("up") or (block in ("down_blocks.1", "down_blocks.2") and i == 0)
            names = ["conv1", "time_emb_proj", "conv2"] + ["conv_shortcut"] * wider
            yield from (f"{block}.resnets.{i}.{name}" for name in names)


def _as_made_then(paths: list[str]) -> list[str]:
    """The same paths in the older order of the modules within transformer blocks."""
    homes = [path.partition(".transformer_blocks.") for path in paths]
    first: dict[tuple[str, str], int] = {}
    keys = []
    for place, (holder, _, inner) in enumerate(homes):
        number, _, name = inner.partition(".")
        module = name.partition(".")[0]
        made = _MADE.index(module) if module in _MADE else 0
        keys.append((first.setdefault((holder, number), place) if inner else place, made, place))
    return [paths[place] for *_, place in sorted(keys)]


def sides(path: str) -> tuple[Side | None, Side | None]:
    """What the rows and columns of a layer are in Stable Diffusion 1 and 2, where this says more than the layer."""
    if path.startswith("text_model."):
        return Side(_TEXT_WIDTH), Side(_TEXT_WIDTH)
    block, _, rest = path.partition(".")
    level = {"down_blocks": int(rest[:1] or 0), "up_blocks": 3 - int(rest[:1] or 0)} if rest[:1].isdigit() else {}
    width = Side(f"{_WIDTH} {level.get(block, 3)}")
    if path.endswith((".attn2.to_k", ".attn2.to_v")):
        return width, Side(_CONTEXT)
    if path.endswith(".ff.net.0.proj"):
        return width._replace(times=8), width
    if ".resnets." in path:
        return width, width if path.endswith("conv2") else None
    return width, width


def widths(shapes: Mapping[str, tuple[int, int]]) -> tuple[dict[str, int], list[str]]:
    """The sizes that such layers share, for their shapes `(out, in)` by path, and the layers that have others."""
    found: dict[str, int] = {}
    odd = []
    for path, shape in shapes.items():
        for side, size in zip(sides(path), shape, strict=True):
            if side and (size % side.times or found.setdefault(side.size, size // side.times) != size // side.times):
                odd.append(f"{path} {tuple(shape)}")
                break
    return found, odd
