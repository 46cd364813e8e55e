"""Files as kohya's trainers and the WebUI write them: ΔW = α / r · up (mid) down, α for each module or absent: then r.

diffusers 0.42 looks for a module's own α under a name that no attention layer has, nor any layer of a text encoder
that transformers 5 builds without `text_model`; a module without α beside others with one gets theirs, too. All these
get the commonest α of their part.
"""

import re
from functools import partial
from itertools import islice

import torch
from torch import nn

from peers import known, spelling
from peers.cases import Builders, Case, commonest
from peers.pipelines import layers

_TRAINED = re.compile(r"transformer_blocks|proj_in|proj_out|self_attn|mlp")  # by default; the rest is LoCon's
_ATTENTION = re.compile(r"\.attn[12]\.|\.self_attn\.")
_FLAT = "text_encoder."  # of the class whose paths have no `text_model`
_STEP = 3  # where all layers would tell no more
_MISSHAPEN = r"size mismatch for .*lora_A"


def chosen(family: str, every: bool, step: int = 1) -> dict[str, nn.Module]:
    """What trainers adapt by default, or every linear layer and convolution; of these each, or one in so many."""
    trained = ((name, layer) for name, layer in layers(family).items() if every or _TRAINED.search(name))
    return dict(islice(trained, 0, None, step))


def plain(
    family: str,
    ranks: tuple[int, ...] = known.RANKS,
    alphas: tuple[float | None, ...] = known.ALPHAS,
    every: bool = False,
    sgm: bool = False,
    short: bool = False,
    dims: int = 0,
    dtype: torch.dtype = torch.float32,
    alpha_dtype: torch.dtype | None = None,
    suffix: str = ".safetensors",
    step: int = 1,
) -> Case:
    """A LoRA of every trained layer; `dims` are those of what has a kernel of one, where they are not the layer's."""
    built = Case(family, "diffusers", suffix=suffix)
    built.metadata = {} if suffix == ".pt" else {"ss_network_module": "networks.lora", "ss_network_dim": "4"}
    stated: dict[str, tuple[int, float | None]] = {}
    for i, (name, layer) in enumerate(chosen(family, every, step).items()):
        r, alpha = stated[name] = ranks[i % len(ranks)], alphas[i % len(alphas)]
        up, down = (values.to(dtype) for values in known.pair(layer, r, known.normal(i)))
        if dims and layer.weight.shape[2:].numel() == 1:
            up, down = (values.reshape(*values.shape[:2], *[1] * (dims - 2)) for values in (up, down))
        key = spelling.kohya(name, sgm, family == "sdxl", short)
        built.tensors |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}
        if alpha is not None:
            # a number, which some tools make a list of one
            built.tensors[f"{key}.alpha"] = torch.full((1,) * (i % 5 == 0), alpha, dtype=alpha_dtype or dtype)
        built.wanted[f"{name}.weight"] = known.lora(layer, up, down, (r if alpha is None else alpha) / r)
    built.mistakes(_misread(stated))
    if every and family == "sdxl" and not sgm:  # it takes the two layers for one, which the model has not
        built.mistakes({name: 0 for name in built.wanted if ".add_embedding." in name})
    built.refused = _MISSHAPEN if dims else "list index out of range" if short and family == "sdxl" else ""
    return built


def _misread(stated: dict[str, tuple[int, float | None]]) -> dict[str, float]:
    """By how much diffusers' α is off, for each weight."""
    factors = {}
    for part in {name.split(".")[0] for name in stated}:
        own = {name: numbers for name, numbers in stated.items() if name.startswith(f"{part}.")}
        given = [alpha for _, alpha in own.values() if alpha is not None]
        for name, (r, alpha) in own.items():
            if given and (alpha is None or _ATTENTION.search(name) or name.startswith(_FLAT)):
                factors[f"{name}.weight"] = commonest(given) / (r if alpha is None else alpha)
    return factors


def tucker(family: str) -> Case:
    """`lora_mid` on every convolution with a kernel: diffusers does not know the word."""
    built = Case(family, "diffusers", refused="have not been correctly renamed.*lora_mid")
    for i, (name, layer) in enumerate(layers(family, (nn.Conv2d,)).items()):
        if layer.kernel_size == (1, 1):
            continue
        r, alpha, draw = known.RANKS[i % 4], known.ALPHAS[i % 7], known.normal(i)
        up, mid = draw(layer.out_channels, r, 1, 1), draw(r, r, *layer.kernel_size)
        down, key = draw(r, layer.in_channels, 1, 1), spelling.kohya(name, family == "sdxl", family == "sdxl")
        built.tensors |= {f"{key}.lora_up.weight": up, f"{key}.lora_mid.weight": mid, f"{key}.lora_down.weight": down}
        built.tensors[f"{key}.alpha"] = torch.tensor(alpha)
        built.wanted[f"{name}.weight"] = known.tucker(layer, up, mid, down, alpha / r)
    return built


def dora(family: str, along: int) -> Case:
    """`dora_scale` for each output (along 0) or each input (1): diffusers leaves it out and adds the plain LoRA."""
    built = plain(family, ranks=(2,), alphas=(2.0,), every=True, step=_STEP)
    for i, (name, layer) in enumerate(chosen(family, True, _STEP).items()):
        weight, change = layer.weight, built.wanted[f"{name}.weight"]
        shape = [1] * weight.dim()
        shape[along] = weight.shape[along]
        magnitude = 1 + known.normal(1000 + i)(*shape).abs()
        built.tensors[f"{spelling.kohya(name, numbered=family == 'sdxl')}.dora_scale"] = magnitude
        built.mistaken.setdefault(f"{name}.weight", change)
        built.wanted[f"{name}.weight"] = known.dora(layer, change, magnitude)
    return built


_SOME = (2.0, None, 1.0, 2.0)
CASES: Builders = {
    "kohya: sd1": partial(plain, "sd1"),
    "kohya: sd1, one rank and alpha": partial(plain, "sd1", ranks=(4,), alphas=(2.0,)),
    "kohya: sd1 with convolutions": partial(plain, "sd1", every=True),
    "kohya: sd1, alpha in some": partial(plain, "sd1", alphas=_SOME, step=_STEP),
    "kohya: sd1, alpha as a whole number": partial(
        plain, "sd1", alphas=(2.0, 1.0, 2.0), alpha_dtype=torch.int64, step=_STEP
    ),
    "kohya: sd1, alpha in none": partial(plain, "sd1", every=True, alphas=(None,), step=_STEP),
    "kohya: sd1, 1×1 as matrices": partial(plain, "sd1", every=True, alphas=(None,), dims=2, step=_STEP),
    "kohya: sd1 in fp16": partial(plain, "sd1", dtype=torch.float16, step=_STEP),
    "kohya: sd1 in bf16": partial(plain, "sd1", alphas=(None,), dtype=torch.bfloat16, step=_STEP),
    "kohya: sd1, without text_model": partial(plain, "sd1", alphas=(None,), short=True, step=_STEP),
    "kohya: sd1, lora_mid": partial(tucker, "sd1"),
    "kohya: sd1, DoRA by output": partial(dora, "sd1", 0),
    "kohya: sd1, DoRA by input": partial(dora, "sd1", 1),
    "kohya: sd1, a pickle": partial(plain, "sd1", alphas=(None,), suffix=".pt", step=_STEP),
    "kohya: sd2": partial(plain, "sd2"),
    "kohya: sd2, matrices as 1×1": partial(plain, "sd2", alphas=(None,), dims=4, step=_STEP),
    "kohya: sdxl in sgm's words": partial(plain, "sdxl", sgm=True),
    "kohya: sdxl in sgm's words with convolutions": partial(plain, "sdxl", sgm=True, every=True, alphas=(None,)),
    "kohya: sdxl in diffusers' words with convolutions": partial(plain, "sdxl", every=True, alphas=(None,)),
    "kohya: sdxl, without text_model": partial(plain, "sdxl", sgm=True, alphas=(None,), short=True),
    "kohya: sdxl, DoRA by output": partial(dora, "sdxl", 0),
}
