"""loralib's state dicts, which say no α, and cloneofsimo's files, which say no names.

loralib: ΔW = α / r · B A (Hu et al. 2021), where α is known to whoever wrote the file. A fused projection has a pair of
factors for each part that is on; a convolution's B A is (out · k, in · k), read as (out, in, k, k) row by row.
cloneofsimo: ΔW = up down, for layers in the order in which their classes are met in the model.
"""

import json
from functools import partial

import torch
from torch import nn

from peers import known
from peers.cases import Builders, Case
from peers.pipelines import layers, parts, shared

ALPHA = 6.0
ENABLED = {"fused": [True, False, True], "other": [False, True]}
_ATTENTION = {"unet": {"Attention", "GEGLU"}, "text_encoder": {"CLIPAttention"}}
_NAMES = {"Attention": "CrossAttention"}  # what the class was called


def loralib_state() -> Case:
    """A layer of every kind that loralib has, each with a rank of its own."""
    built = Case("loralib", "loralib", suffix=".pt")
    built.asked = {"alpha": ALPHA, "enable_lora": ENABLED, "model": shared("loralib")}
    for i, (name, layer) in enumerate(layers("loralib", (nn.Module,)).items()):
        path, draw = name.removeprefix("model."), known.normal(i)
        r = known.RANKS[1 + i % 3]
        if isinstance(layer, nn.Conv2d):
            k = layer.kernel_size[0]
            A, B = draw(r * k, layer.in_channels * k), draw(layer.out_channels * k, r * k)
            delta = (B.double() @ A.double()).view(layer.weight.shape)
        elif path in ENABLED:
            on, into, width = ENABLED[path], layer.in_features, layer.out_features // len(ENABLED[path])
            A, B = draw(r * sum(on), into), draw(width * sum(on), r)
            pairs = iter(zip(B.double().chunk(sum(on)), A.double().chunk(sum(on)), strict=True))
            products = [(lambda b, a: b @ a)(*next(pairs)) if each else torch.zeros(width, into) for each in on]
            delta = torch.cat([product.double() for product in products])
        else:
            out, into = layer.weight.shape if isinstance(layer, nn.Linear) else layer.weight.shape[::-1]
            A, B = draw(r, into), draw(out, r)
            delta = B.double() @ A.double()
            delta = delta if isinstance(layer, nn.Linear) else delta.T
        built.tensors |= {f"{path}.lora_A": A, f"{path}.lora_B": B}
        built.wanted[f"{name}.weight"] = ALPHA / r * delta
    return built


def ordered(part: str, classes: set[str], then: bool) -> list[tuple[str, nn.Module]]:
    """The layers within modules of these classes, in the model's order; `then` in that of diffusers until 0.13.

    There a block's feed-forward stood between its two attentions.
    """
    found = []
    for path, module in parts(shared("sd1"))[part].named_modules():
        if type(module).__name__ in classes:
            inner = ((f"{path}.{name}", layer) for name, layer in module.named_modules())
            found += [(f"{part}.{name}", layer) for name, layer in inner if isinstance(layer, (nn.Linear, nn.Conv2d))]
    if not then:
        return found
    places = {"attn1": 0, "ff": 1, "attn2": 2}
    blocks: dict[str, list[tuple[str, nn.Module]]] = {}
    for name, layer in found:
        blocks.setdefault(name.split(".transformer_blocks.0.")[0], []).append((name, layer))

    def place(pair: tuple[str, nn.Module]) -> int:
        return places.get(pair[0].partition(".transformer_blocks.0.")[2].split(".")[0], 0)

    return [pair for own in blocks.values() for pair in sorted(own, key=place)]


def cloneofsimo(then: bool = False, extended: bool = False, old: bool = False) -> Case:
    """`unet:0:up`, `unet:0:down` and the ranks in the header; or, before, a pickled list of both by turns."""
    built = Case("sd1", "", suffix=".pt" if old else ".safetensors")
    for part in ("unet",) if old else _ATTENTION:
        classes = _ATTENTION[part] | ({"ResnetBlock2D"} if extended and part == "unet" else set())
        built.metadata[part] = json.dumps(sorted(_NAMES.get(name, name) for name in classes))
        for i, (name, layer) in enumerate(ordered(part, classes, then)):
            r = 4 if old else known.RANKS[i % 4]
            up, down = known.pair(layer, r, known.normal(i))
            if old:
                up, down = up.half(), down.half()
            built.tensors |= {f"{part}:{i}:up": up, f"{part}:{i}:down": down}
            built.metadata[f"{part}:{i}:rank"] = str(r)
            built.wanted[f"{name}.weight"] = known.lora(layer, up, down, 1.0)
    return built


CASES: Builders = {
    "loralib: every kind of layer": loralib_state,
    "cloneofsimo: sd1": cloneofsimo,
    "cloneofsimo: sd1, feed-forward before cross-attention": partial(cloneofsimo, then=True),
    "cloneofsimo: sd1 with convolutions": partial(cloneofsimo, extended=True),
    "cloneofsimo: the old list": partial(cloneofsimo, then=True, old=True),
}
