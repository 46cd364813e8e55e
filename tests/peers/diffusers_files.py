"""Files as diffusers writes and wrote them: ΔW = scale · B A, where only a header can say another scale than 1.

A trainer keeps the config of PEFT's that it had, one for each part, in the header; diffusers 0.42 takes it literally.
"""

import json
import math
from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from peers import known, spelling
from peers.cases import Builders, Case, commonest
from peers.kohya_files import chosen
from peers.peft_files import said_by_peft
from peers.pipelines import layers

_HEADER = "lora_adapter_metadata"
_TODAY = ".lora_A.weight", ".lora_B.weight"


def _name(name: str) -> str:
    """What PEFT's config calls a layer: its path within the part's own model."""
    return name.split(".", 1)[1]


def _pattern(name: str, names: list[str]) -> str:
    """What means this layer alone, of all whose path may end so."""
    path = _name(name)
    return f"^{path}" if any(other.endswith(f".{path}") and other != name for other in names) else path


def _drawn(
    family: str, every: bool, ranks: tuple[int, ...], step: int = 1
) -> dict[str, tuple[nn.Module, Tensor, Tensor]]:
    """The layers with their B and A."""
    trained = chosen(family, every, step).items()
    return {
        name: (layer, *known.pair(layer, ranks[i % len(ranks)], known.normal(i)))
        for i, (name, layer) in enumerate(trained)
    }


def plain(family: str, spelled: Callable[[str], str], endings: tuple[str, str] = _TODAY, every: bool = True) -> Case:
    """No header: B A as it is, whatever the ranks."""
    built = Case(family, "diffusers")
    for name, (layer, B, A) in _drawn(family, every, known.RANKS).items():
        built.tensors |= {spelled(name) + endings[0]: A, spelled(name) + endings[1]: B}
        built.wanted[f"{name}.weight"] = known.lora(layer, B, A, 1.0)
    return built


def with_header(family: str, rslora: bool = False, dora: bool = False, bias: bool = False, step: int = 1) -> Case:
    """A header that gives each part its own ranks, alphas and exceptions of them, as PEFT writes them."""
    built = Case(family, "diffusers")
    drawn = _drawn(family, True, known.RANKS, step)
    if bias:  # PEFT's word for it is for all layers or none
        drawn = {name: own for name, own in drawn.items() if own[0].bias is not None}
    header: dict[str, object] = {}
    for part in dict.fromkeys(name.split(".")[0] for name in drawn):
        own = [name for name in drawn if name.startswith(f"{part}.")]
        ranks = {name: drawn[name][2].shape[0] for name in own}
        alphas = {name: known.ALPHAS[i % len(known.ALPHAS)] for i, name in enumerate(own)}
        r, alpha = commonest(ranks.values()), commonest(alphas.values())
        said = {
            "r": r, "lora_alpha": alpha, "use_rslora": rslora, "use_dora": dora, "lora_bias": bias,
            "target_modules": [_name(name) for name in own],
            "rank_pattern": {_pattern(name, own): value for name, value in ranks.items() if value != r},
            "alpha_pattern": {_pattern(name, own): value for name, value in alphas.items() if value != alpha},
        }  # fmt: skip
        header |= {f"{part}.{key}": value for key, value in said_by_peft(**said).items()}
        for name in own:
            scale = alphas[name] / (math.sqrt(ranks[name]) if rslora else ranks[name])
            _add(built, name, drawn[name], scale, dora, bias)
    built.metadata = {"format": "pt", _HEADER: json.dumps(header, indent=2, sort_keys=True)}
    return built


def _add(built: Case, name: str, drawn: tuple[nn.Module, Tensor, Tensor], scale: float, dora: bool, bias: bool) -> None:
    layer, B, A = drawn
    key = f"{name.split('.')[0]}.{_name(name)}"
    built.tensors |= {key + _TODAY[0]: A, key + _TODAY[1]: B}
    delta = known.lora(layer, B, A, scale)
    draw = known.normal(len(built.tensors))
    if dora:
        magnitude = 1 + draw(layer.weight.shape[0]).abs()
        built.tensors[f"{key}.lora_magnitude_vector"] = magnitude.view(1, -1, 1, 1) if delta.dim() == 4 else magnitude
        if not name.startswith("unet."):  # a text encoder's get lost: ‖W‖, from which training starts, stays
            start = layer.weight.double().norm(dim=1)
            built.mistaken[f"{name}.weight"] = known.dora(layer, delta, start)
        delta = known.dora(layer, delta, magnitude)
    if bias:
        built.tensors[f"{key}.lora_B.bias"] = draw(layer.weight.shape[0])
        built.wanted[f"{name}.bias"] = scale * built.tensors[f"{key}.lora_B.bias"].double()
    built.wanted[f"{name}.weight"] = delta


def old(family: str, spelled: Callable[[str], str], every: bool = False) -> Case:
    """The two older spellings, which only attention has in common with today's."""
    return plain(family, spelled, (".down.weight", ".up.weight"), every)


def attention(family: str, prefixed: bool = True) -> Case:
    """The attention layers alone, as in diffusers' first files; those had no text encoder and no `unet.` either."""
    built = Case(family, "diffusers")
    for i, (name, layer) in enumerate(layers(family, (nn.Linear,)).items()):
        if ".attn" not in name and not (prefixed and ".self_attn." in name):
            continue
        up, down = known.pair(layer, 4, known.normal(i))
        key = spelling.with_processors(name)
        key = key if prefixed else key.removeprefix("unet.")
        built.tensors |= {f"{key}.up.weight": up, f"{key}.down.weight": down}
        built.wanted[f"{name}.weight"] = known.lora(layer, up, down, 1.0)
    if not prefixed:  # diffusers has forgotten them, and says in its log that it loads nothing
        built.mistakes(dict.fromkeys(built.wanted, 0))
    return built


def halved(family: str) -> Case:
    """Today's spelling in fp16."""
    built = plain(family, spelling.diffusers, every=False)
    built.tensors = {name: tensor.half() for name, tensor in built.tensors.items()}
    for name, layer in chosen(family, every=False).items():
        A, B = (built.tensors[spelling.diffusers(name) + ending] for ending in _TODAY)
        built.wanted[f"{name}.weight"] = known.lora(layer, B, A, 1.0)
    return built


CASES: Builders = {
    "diffusers: sd1": partial(plain, "sd1", spelling.diffusers),
    "diffusers: sd1 in fp16": partial(halved, "sd1"),
    "diffusers: sdxl": partial(plain, "sdxl", spelling.diffusers),
    "diffusers: a transformer": partial(plain, "flux", spelling.diffusers),
    "diffusers: a transformer with a header": partial(with_header, "flux"),
    "diffusers: a prior": partial(plain, "prior", spelling.diffusers),
    "diffusers: sd1 with a header": partial(with_header, "sd1"),
    "diffusers: sdxl with a header": partial(with_header, "sdxl"),
    "diffusers: sd1, rsLoRA": partial(with_header, "sd1", rslora=True, step=3),
    "diffusers: sd1, DoRA": partial(with_header, "sd1", dora=True, step=3),
    "diffusers: sd1, biases": partial(with_header, "sd1", bias=True, step=3),
    "diffusers: sd1 as until 0.26": partial(old, "sd1", spelling.with_linear_layers),
    "diffusers: sdxl as until 0.26": partial(old, "sdxl", spelling.with_linear_layers),
    "diffusers: sd1 as until 0.17": partial(attention, "sd1"),
    "diffusers: sd1 as until 0.17, the UNet alone": partial(attention, "sd1", prefixed=False),
}
