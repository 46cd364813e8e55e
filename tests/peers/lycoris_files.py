"""Files as LyCORIS writes them, whose methods may differ from layer to layer.

LyCORIS 4.1 multiplies by α / r twice when it merges LoHa and LoKr from a file (its forward does so once); it reads no
(IA)³, no DoRA along the inputs, no module without α, and takes the sizes of some LoKr factors for others.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn

from peers import known, spelling
from peers.cases import Builders, Case
from peers.pipelines import layers

Tensors = dict[str, Tensor]
Made = tuple[Tensors, Tensor, float]  # tensors by their endings, ΔW by the formula, and what LyCORIS multiplies it by


def _scaled(r: int, i: int, stated: bool) -> tuple[Tensors, float]:
    """α, and α / r; it is r where it is not stated."""
    alpha = known.ALPHAS[i % 7]
    return ({"alpha": torch.tensor(alpha)}, alpha / r) if stated else ({}, 1)


def locon(layer: nn.Module, i: int, draw: known.Draw, core: bool = False, stated: bool = True) -> Made:
    """LoRA, on convolutions too, with a core between the factors where there is a kernel."""
    r = known.RANKS[i % 4]
    up, down = known.pair(layer, r, draw)
    tensors, scale = _scaled(r, i, stated)
    tensors |= {"lora_up.weight": up, "lora_down.weight": down}
    if core and layer.weight[0, 0].numel() > 1:
        tensors["lora_mid.weight"] = mid = draw(r, r, *layer.weight.shape[2:])
        tensors["lora_down.weight"] = down = draw(r, layer.weight.shape[1], 1, 1)
        return tensors, known.tucker(layer, up, mid, down, scale), 1
    return tensors, known.lora(layer, up, down, scale), 1


def loha(layer: nn.Module, i: int, draw: known.Draw, core: bool = False, stated: bool = True) -> Made:
    """Two products, on convolutions over the flat kernel, or with a core each."""
    r = known.RANKS[i % 4]
    out, into, *kernel = layer.weight.shape
    tensors, scale = _scaled(r, i, stated)
    for half in (1, 2):
        if core and math.prod(kernel) > 1:
            tensors |= {f"hada_t{half}": draw(r, r, *kernel), f"hada_w{half}_a": draw(r, out)}
            tensors[f"hada_w{half}_b"] = draw(r, into)
        else:
            tensors |= {f"hada_w{half}_a": draw(out, r), f"hada_w{half}_b": draw(r, into * math.prod(kernel))}
    return tensors, known.loha(layer, tensors, scale), scale


def lokr(
    layer: nn.Module,
    i: int,
    draw: known.Draw,
    factor: int = -1,
    both: bool = False,
    core: bool = False,
    stated: bool = True,
) -> Made:
    """w₁ is small and w₂ large; each is a product where that is smaller than the whole, w₁ only if `both`."""
    r = (1, 2)[i % 2]
    out, into, *kernel = layer.weight.shape
    (a, b), (c, d) = _pair(out, factor), _pair(into, factor)
    tensors, scale = _scaled(r, i, stated)
    whole = {1: not (both and r < max(a, c) / 2), 2: not r < max(b, d) / 2}
    if whole[1]:
        tensors["lokr_w1"] = draw(a, c)
    else:
        tensors |= {"lokr_w1_a": draw(a, r), "lokr_w1_b": draw(r, c)}
    if whole[2]:
        tensors["lokr_w2"] = draw(b, d, *kernel)
    elif core and math.prod(kernel) > 1:
        tensors |= {"lokr_t2": draw(r, r, *kernel), "lokr_w2_a": draw(r, b), "lokr_w2_b": draw(r, d)}
    else:
        tensors |= {"lokr_w2_a": draw(b, r), "lokr_w2_b": draw(r, d * math.prod(kernel))}
    scale = 1 if all(whole.values()) else scale
    return tensors, known.lokr(layer, tensors, scale), scale


def _pair(size: int, factor: int) -> tuple[int, int]:
    """Two numbers whose product is the size, the smaller first: the factor and the rest, or nearly equal ones."""
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    most = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    small = next(n for n in range(most, 0, -1) if size % n == 0)
    return small, size // small


def full(layer: nn.Module, i: int, draw: known.Draw) -> Made:
    """ΔW itself, and that of the bias."""
    tensors = {"diff": draw(*layer.weight.shape)}
    if layer.bias is not None:
        tensors["diff_b"] = draw(*layer.bias.shape)
    return tensors, tensors["diff"].double(), 1


def norm(layer: nn.Module, i: int, draw: known.Draw) -> Made:
    tensors = {"w_norm": draw(*layer.weight.shape), "b_norm": draw(*layer.bias.shape)}
    return tensors, tensors["w_norm"].double(), 1


def ia3(layer: nn.Module, i: int, draw: known.Draw) -> Made:
    """ΔW = W ⊙ l, along the inputs where `on_input` says so (Liu et al. 2022, arXiv:2205.05638).

    The bias stays: LyCORIS scales it where it bypasses the weight, and not where it trains as usual or merges.
    """
    along = i % 2
    sizes = [1] * layer.weight.dim()
    sizes[along] = layer.weight.shape[along]
    scale = draw(layer.weight.shape[along])
    stored = scale if layer.weight.dim() == 2 else scale.view(1, -1, 1, 1)
    tensors = {"weight": stored, "on_input": torch.tensor(along)}
    return tensors, layer.weight.double() * scale.double().view(sizes), 1


def build(
    family: str,
    makes: tuple[Callable[[nn.Module, int, known.Draw], Made], ...],
    refused: str = "",
    kinds: tuple[type, ...] = (nn.Linear, nn.Conv2d),
    dora: int | None = None,
    sgm: bool = False,
) -> Case:
    """A file one in three of whose layers is changed, by one method after the other; `dora`: what magnitudes lie along.

    In sgm's words LyCORIS itself finds no layer of diffusers' UNet.
    """
    built = Case(family, "" if sgm else "lycoris", metadata={"ss_network_module": "lycoris.kohya"}, refused=refused)
    for i, (name, layer) in enumerate(islice(layers(family, kinds).items(), 0, None, 3)):
        tensors, delta, again = makes[i % len(makes)](layer, i, known.normal(i))
        if dora is not None:
            tensors, moved = _decomposed(layer, tensors, delta, dora, known.normal(1000 + i))
            if again != 1:
                built.mistaken[f"{name}.weight"] = known.dora(layer, delta * again, tensors["dora_scale"])
            delta, again = moved, 1
        key = spelling.kohya(name, sgm, numbered=family == "sdxl")
        built.tensors |= {f"{key}.{ending}": tensor for ending, tensor in tensors.items()}
        built.wanted[f"{name}.weight"] = delta
        built.mistakes({f"{name}.weight": again})
        for ending in tensors.keys() & {"diff_b", "b_norm"}:
            built.wanted[f"{name}.bias"] = tensors[ending].double()
    return built


def _decomposed(
    layer: nn.Module, tensors: Tensors, delta: Tensor, along: int, draw: known.Draw
) -> tuple[Tensors, Tensor]:
    shape = [1] * layer.weight.dim()
    shape[along] = layer.weight.shape[along]
    magnitude = 1 + draw(*shape).abs()
    return {**tensors, "dora_scale": magnitude}, known.dora(layer, delta, magnitude)


_KRONECKER = (lokr, partial(lokr, factor=2), partial(lokr, both=True), partial(lokr, factor=4, both=True))
_NORMS = nn.GroupNorm, nn.LayerNorm
_UNSTATED = tuple(partial(make, stated=False) for make in (locon, loha, lokr))
CASES: Builders = {
    "lycoris: LoCon": partial(build, "sd1", (locon,)),
    "lycoris: LoCon of sdxl": partial(build, "sdxl", (locon,)),
    "lycoris: LoCon with cores": partial(build, "sd1", (partial(locon, core=True),)),
    "lycoris: LoHa": partial(build, "sd1", (loha,)),
    "lycoris: LoHa with cores": partial(build, "sd1", (partial(loha, core=True),)),
    "lycoris: LoKr": partial(build, "sd1", (lokr,)),
    "lycoris: LoKr in four factorisations": partial(build, "sd1", _KRONECKER),
    "lycoris: LoKr with cores": partial(build, "sd1", (partial(lokr, core=True),), "lokr_w2_a"),
    "lycoris: LoKr with cores, all products": partial(
        build, "sd1", (partial(lokr, both=True, core=True),), "lokr_w2_a"
    ),
    "lycoris: whole differences": partial(build, "sd1", (full,)),
    "lycoris: norms": partial(build, "sd1", (norm,), kinds=_NORMS),
    "lycoris: (IA)³": partial(build, "sd1", (ia3,), "takes 4 positional"),
    "lycoris: many methods": partial(build, "sdxl", (locon, loha, lokr, full, partial(locon, core=True))),
    "lycoris: many methods in sgm's words": partial(build, "sdxl", (locon, loha, lokr, full), sgm=True),
    "lycoris: norms in sgm's words": partial(build, "sdxl", (norm,), kinds=_NORMS, sgm=True),
    "lycoris: no alpha": partial(build, "sd1", _UNSTATED, "not .NoneType"),
    "lycoris: DoRA on LoCon": partial(build, "sd1", (locon,), dora=0),
    "lycoris: DoRA on LoHa and LoKr": partial(build, "sd1", (loha, lokr), dora=0),
    "lycoris: DoRA by input": partial(build, "sd1", (locon, loha, lokr), "broadcast shape", dora=1),
}
