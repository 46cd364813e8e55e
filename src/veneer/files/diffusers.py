"""diffusers' `pytorch_lora_weights.safetensors`, for the parts of a pipeline: ΔW = α / r · B A, and α = r if not said.

Now a layer's factors are `unet.<path>.lora_A.weight` and `.lora_B.weight`; before they were `.lora.down.weight` and
`.lora.up.weight` (`.lora_linear_layer.down.weight` in text encoders), and at first `.processor.to_q_lora.down.weight`.
The header may hold the parts' PEFT configs (`lora_adapter_metadata`).

What versions of diffusers make of a file differs. Without that metadata older ones (0.31, 0.34) give every layer
the α of the first, so that a layer of another rank r comes out scaled by r₁ / r; those before 0.34 do so with it too.
So what is written here has one rank in each part, α = r, and every scale inside B, and says so in the metadata.
"""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from veneer.apart.changes import Change, adapter_of, own_configs
from veneer.core.adapter import Adapter
from veneer.core.config import LoraConfig
from veneer.core.errors import AdapterError, collapsed
from veneer.files.config import judged
from veneer.files.factors import Pair, of_one_rank, pairs
from veneer.files.parts import LEVEL, PARTS, canonical, is_text, levelled, part_of
from veneer.files.stored import save
from veneer.safe.stored import is_finite, parsed

NAME = "diffusers"
ABOUT = "lora_adapter_metadata"
_UNET = re.compile(r"(down_blocks|up_blocks|mid_block|conv_in|conv_out|time_embedding|add_embedding)\b")
_NAME = re.compile(
    r"(?P<layer>.+?)(?:"
    r"\.lora_A\.weight|(?P<B>\.lora_B\.)(?P<kind>weight|bias)|"
    r"(?:_lora|\.lora|\.lora_linear_layer)\.(?:down\.weight|(?P<up>up\.)(?P<its_kind>weight|bias))|"
    r"(?P<magnitude>\.lora_magnitude_vector)(?:\.weight)?|"
    r"(?:(?:_lora|\.lora|\.lora_linear_layer)(?:\.down\.weight)?)?(?P<alpha>\.alpha))"
)
_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}  # as text encoders call them


def detects(names: Collection[str], about: Mapping[str, str]) -> bool:
    """Whether they are such names, of whichever spelling."""
    if ABOUT in about:
        return True
    ours = [name for name in names if (found := _NAME.fullmatch(name)) and not found["alpha"]]
    return bool(ours) and not any(name.startswith(("base_model.", "lora_")) for name in names)


def read(tensors: Mapping[str, Tensor], about: Mapping[str, str], where: str) -> Adapter:
    """The adapter of a file, under canonical paths: a CLIP text encoder's begin with `text_model`.

    Raises `AdapterError` with all that is wrong.
    """
    layers, faults = _by_layer(tensors)
    faults += _unfinished(layers)
    if faults:
        raise AdapterError("\n".join([f"{where}:", *faults]))
    configs, faults = _configs(layers, about, where)
    ranks = [path for path, config in configs.items() if len(layers[path]["A"]) != config.r]
    plain = [path for path, config in configs.items() if config.use_dora and "magnitude" not in layers[path]]
    told = ((f"of another rank than {ABOUT} says", ranks), (f"no lora_magnitude_vector, as {ABOUT} says", plain))
    faults += [f"{what}: {collapsed(paths)}" for what, paths in told if paths]
    if faults:
        raise AdapterError("\n".join([f"{where}:", *faults]))
    every = {path: _change(own, configs.get(path)) for path, own in layers.items()}
    metadata = {key: value for key, value in about.items() if key not in (ABOUT, "format")}
    parts = [part for part in PARTS if any(path.startswith(f"{part}.") for path in layers)]
    return adapter_of(every, metadata=metadata, parts=parts, base=metadata.get("base_model"))


def write(adapter: Adapter, path: Path) -> None:
    """Write it, whatever its ranks and alphas, so that every version of diffusers reads the same ΔW.

    Raises `AdapterError` with all that the format cannot hold.
    """
    flat, about = content(adapter)
    save(flat, path, about)


def content(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, and what it says of itself. Raises `AdapterError` as `write` does."""
    if not adapter.parts:
        raise AdapterError(
            "diffusers files say of which part of a pipeline their layers are, and this adapter is of one model: "
            "say which (--part unet, or joined({'unet': adapter}))"
        )
    own = pairs(adapter, NAME, holds="b magnitude")
    flat: dict[str, Tensor] = {}
    config: dict[str, Any] = {}
    for part in adapter.parts:
        layers = {layer: pair for layer, pair in own.items() if layer.startswith(f"{part}.")}
        if not layers:
            continue
        flat |= _spelt(part, layers := of_one_rank(layers))
        config |= {f"{part}.{key}": value for key, value in _config(part, layers).items()}
    return flat, {**adapter.metadata, ABOUT: json.dumps(config, indent=2, sort_keys=True)}


def _by_layer(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """The tensors by path and letter, and what is wrong with the names."""
    layers: dict[str, dict[str, Tensor]] = {}
    strangers, twice = [], []
    of_parts = {name for name in tensors if part_of(name)}
    for name, tensor in tensors.items():
        found = _NAME.fullmatch(name.replace(".processor.", "."))
        if not found or (of_parts and name not in of_parts):
            strangers.append(name)
            continue
        letter = "magnitude" if found["magnitude"] else "alpha" if found["alpha"] else "A"
        if found["B"] or found["up"]:
            letter = "b" if "bias" in (found["kind"], found["its_kind"]) else "B"
        own = layers.setdefault(_path(found["layer"]), {})
        if letter in own:
            twice.append(name)
        own[letter] = tensor
    told = (("unexpected tensors", strangers), ("tensors that are there under another spelling too", twice))
    return layers, [f"{what}: {collapsed(names)}" for what, names in told if names]


def _path(layer: str) -> str:
    """The path of the layer that a file of any age means."""
    if not part_of(layer) and _UNET.match(layer):
        layer = f"unet.{layer}"
    if is_text(layer):
        holder, _, last = layer.rpartition(".")
        return canonical(f"{holder}.{_TEXT.get(last, last)}")
    return f"{layer}.0" if layer.endswith(".to_out") else layer


def _unfinished(layers: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    """Layers without both factors, or whose factors do not fit each other."""
    missing = [f"{path}.{letter}" for path, own in layers.items() for letter in "AB" if letter not in own]
    unfit = [
        f"{path} A {tuple(own['A'].shape)} and B {tuple(own['B'].shape)}"
        for path, own in layers.items()
        if {"A", "B"} <= own.keys() and not _fit(own["A"], own["B"])
    ]
    alphas = [
        path
        for path, own in layers.items()
        if "alpha" in own and not (own["alpha"].numel() == 1 and is_finite(own["alpha"]))
    ]
    told = (("missing", missing), ("factors that do not fit", unfit), ("alphas that are not one number", alphas))
    return [f"{what}: {collapsed(names)}" for what, names in told if names]


def _fit(A: Tensor, B: Tensor) -> bool:
    return min(A.ndim, B.ndim) >= 2 and len(A) == B.shape[1] > 0


def _configs(
    layers: Mapping[str, Any], about: Mapping[str, str], where: str
) -> tuple[dict[str, LoraConfig], list[str]]:
    """The config of every layer of which the header says something, and what is wrong with it."""
    if ABOUT not in about:
        return {}, []
    said = parsed(about[ABOUT].encode("utf-8", "replace"), f"{where}: {ABOUT}")
    parts = {part for path in layers if (part := part_of(path))}
    prefixed = any(map(part_of, said))
    found: dict[str, LoraConfig] = {}
    faults: list[str] = []
    for part in sorted(parts) or [""]:
        within = f"{part}." if part and prefixed else ""
        own = {key.removeprefix(within): value for key, value in said.items() if key.startswith(within)}
        if not own:
            faults.append(f"{ABOUT} says nothing of {part}")
            continue
        if is_text(part):
            for key in ("rank_pattern", "alpha_pattern"):
                if isinstance(own.get(key), dict):
                    own[key] = {levelled(pattern): value for pattern, value in own[key].items()}
        config, wrong = judged(own, f"{ABOUT} of {part or 'the model'}")
        faults += wrong
        if config is not None:
            paths = [path for path in layers if not part or path.startswith(f"{part}.")]
            try:
                each = own_configs(config, [path.removeprefix(f"{part}.") for path in paths])
                found |= {path: each[path.removeprefix(f"{part}.")] for path in paths}
            except AdapterError as error:
                faults.append(f"{ABOUT} of {part or 'the model'}: {error}")
    return found, faults


def _change(own: Mapping[str, Tensor], config: LoraConfig | None) -> Change:
    r, tensors = len(own["A"]), {letter: tensor for letter, tensor in own.items() if letter != "alpha"}
    if "alpha" in own:
        config = replace(config or LoraConfig(r=r), lora_alpha=float(own["alpha"]))
    alpha, rslora = (config.lora_alpha, config.use_rslora) if config else (r, False)
    return Change(_own_config(r, alpha, rslora, "magnitude" in own, "b" in own), tensors)


@cache
def _own_config(r: int, alpha: float, use_rslora: bool, use_dora: bool, has_bias: bool) -> LoraConfig:
    options = {"lora_bias": has_bias}
    return LoraConfig(r=r, lora_alpha=alpha, use_rslora=use_rslora, use_dora=use_dora, options=options)


def _spelt(part: str, layers: Mapping[str, Pair]) -> dict[str, Tensor]:
    """The tensors of one part, by the names that all versions know.

    Text encoders keep the older names, as the current ones are not recognised where no attention projection is among
    them, and the whole name of a magnitude, which is lost without its end.
    """
    down, up = ("lora_linear_layer.down", "lora_linear_layer.up") if is_text(part) else ("lora_A", "lora_B")
    some_shift = any(pair.b is not None for pair in layers.values())
    flat = {}
    for path, pair in layers.items():
        flat[f"{path}.{down}.weight"], flat[f"{path}.{up}.weight"] = pair.A, pair.B
        if pair.magnitude is not None:
            flat[f"{path}.lora_magnitude_vector{'.weight' * is_text(part)}"] = pair.magnitude
        if some_shift:  # they have one in all layers or in none
            flat[f"{path}.{up}.bias"] = pair.B.new_zeros(len(pair.B)) if pair.b is None else pair.b
    return flat


def _config(part: str, layers: Mapping[str, Pair]) -> dict[str, Any]:
    """What the metadata says of a part, of fields that every PEFT has."""
    with_magnitude = [path for path, pair in layers.items() if pair.magnitude is not None]
    if 0 < len(with_magnitude) < len(layers):
        raise AdapterError(
            f"diffusers files have DoRA magnitudes in all layers of {part} or in none, and here only in: "
            f"{collapsed(with_magnitude, 8)}; nothing was written"
        )
    r = next(iter(layers.values())).r
    names = [path.removeprefix(f"{part}.") for path in layers]
    said: dict[str, Any] = {
        "r": r,
        "lora_alpha": r,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": sorted(name.removeprefix(LEVEL) if is_text(part) else name for name in names),
    }
    if with_magnitude:
        said["use_dora"] = True
    if any(pair.b is not None for pair in layers.values()):
        said["lora_bias"] = True
    return said
